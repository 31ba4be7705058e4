"""ComfyUI's process as start.sh records it: real processes, real files."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.process import LOG_TAIL_BYTES, ComfyUIProcess, ProcessState

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that does nothing; all of them are gone after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(program: str = "sleep") -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([program, "60"]))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.wait(5)


@pytest.fixture
def comfyui(tmp_path: Path) -> ComfyUIProcess:
    return ComfyUIProcess(tmp_path)


def record(run_dir: Path, pid: int, generation: int = 1) -> ProcessState:
    (run_dir / "comfyui").write_text(f"{pid} {generation}\n")
    return ProcessState(pid, generation)


# --- is it the one, does it live ---


@pytest.mark.parametrize("content", [None, "", "\n", "12", "12 1 7", "twelve 1", "12 \N{SNOWMAN}"])
def test_a_record_that_is_not_there_or_not_two_numbers_is_no_state(
    comfyui: ComfyUIProcess, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "comfyui").write_text(content)
    assert comfyui.state() is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40))
def test_any_bytes_in_the_record_are_a_state_or_none(comfyui: ComfyUIProcess, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "comfyui").write_bytes(content)
    state = comfyui.state()
    assert state is None or all(isinstance(number, int) for number in state)


def test_the_recorded_process_lives_until_it_ends(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    process = start()
    state = record(tmp_path, process.pid, 3)
    assert comfyui.state() == state
    assert comfyui.is_alive(state)
    process.kill()
    process.wait(5)
    assert not comfyui.is_alive(state)


def test_a_zombie_is_dead(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    """start.sh may not have reaped it yet."""
    process = start()
    state = record(tmp_path, process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has reaped it
    assert Path(f"/proc/{process.pid}").exists()
    assert not comfyui.is_alive(state)


def test_a_newer_start_means_that_the_older_one_is_gone(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    process = start()
    old = record(tmp_path, process.pid, 1)
    new = record(tmp_path, process.pid, 2)  # the kernel may give the same pid again
    assert not comfyui.is_alive(old)
    assert comfyui.is_alive(new)


def test_only_the_start_whose_port_was_seen_open_has_booted(
    comfyui: ComfyUIProcess, tmp_path: Path, start: Start
) -> None:
    process = start()
    state = record(tmp_path, process.pid, 2)
    for content in (None, "", "1\n", "soon"):
        if content is not None:
            (tmp_path / "listened").write_text(content)
        assert not comfyui.has_booted(state)
    (tmp_path / "listened").write_text("2\n")
    assert comfyui.has_booted(state)
    process.kill()
    process.wait(5)
    assert not comfyui.has_booted(state)


def test_the_name_of_the_program_does_not_confuse(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    sleep = shutil.which("sleep")
    assert sleep
    program = tmp_path / "a) Z (b"
    shutil.copy(sleep, program)
    assert comfyui.is_alive(record(tmp_path, start(str(program)).pid))


# --- ending it ---


def test_kill_ends_the_process(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    process = start()
    comfyui.kill(record(tmp_path, process.pid))
    assert process.wait(5) == -signal.SIGKILL


def test_kill_leaves_a_newer_start_alone(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    process = start()
    old = record(tmp_path, process.pid, 1)
    new = record(tmp_path, process.pid, 2)
    comfyui.kill(old)
    assert process.poll() is None
    assert comfyui.is_alive(new)


@pytest.mark.parametrize("pid", [0, -1])
def test_kill_never_signals_a_group(
    comfyui: ComfyUIProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    """kill(0) is the caller's own group, kill(-1) everybody."""
    signalled: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append((pid, number)))
    comfyui.kill(record(tmp_path, pid))
    assert signalled == []


def test_a_retired_start_is_noted_and_ended_and_asked_nothing_more(
    comfyui: ComfyUIProcess, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start()
    state = record(tmp_path, process.pid, 4)
    (tmp_path / "listened").write_text("4\n")
    assert comfyui.has_booted(state)
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *sent: signals.append(sent))  # one that takes a while to go
    comfyui.retire(state)
    assert signals == [(process.pid, signal.SIGKILL)]
    assert (tmp_path / "retired").read_text() == "4\n"
    assert comfyui.is_alive(state)
    assert not comfyui.has_booted(state)


def test_a_start_that_has_ended_by_itself_is_not_retired(
    comfyui: ComfyUIProcess, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = record(tmp_path, start().pid, 1)
    record(tmp_path, start().pid, 2)
    monkeypatch.setattr(os, "kill", lambda *sent: pytest.fail(f"{sent} was sent"))
    comfyui.retire(old)
    assert not (tmp_path / "retired").exists()


def test_a_success_is_noted_for_the_start_that_had_it(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    comfyui.note_success(ProcessState(5, 2))
    comfyui.note_success(ProcessState(9, 3))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"last-success": "3\n"}


# --- its log ---


def test_the_tail_is_the_last_lines(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    (tmp_path / "comfyui.log").write_text("".join(f"line {number}\n" for number in range(9999)))
    assert comfyui.log_tail(lines=3) == ["line 9996", "line 9997", "line 9998"]
    assert len(comfyui.log_tail()) == 15


def test_the_tail_of_endless_lines_is_bounded(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    (tmp_path / "comfyui.log").write_text("x" * (3 * LOG_TAIL_BYTES))
    assert sum(map(len, comfyui.log_tail())) == LOG_TAIL_BYTES


def test_odd_bytes_and_empty_lines_do_not_spoil_the_tail(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    (tmp_path / "comfyui.log").write_bytes(b"\0\0\0first\n\n  \n\xff\xfe 50%\r100%\nlast  \n")
    assert comfyui.log_tail() == ["first", "\N{REPLACEMENT CHARACTER}" * 2 + " 50%", "100%", "last"]


def test_no_log_is_an_empty_tail(comfyui: ComfyUIProcess) -> None:
    assert comfyui.log_tail() == []


def test_the_log_is_overwritten_before_it_is_cut(
    comfyui: ComfyUIProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = tmp_path / "comfyui.log", []
    log.write_text("a lighthouse at dusk")
    real_truncate = os.truncate

    def truncate(path: Path, length: int) -> None:
        seen.append(log.read_bytes())
        real_truncate(path, length)

    monkeypatch.setattr(os, "truncate", truncate)
    with log.open("ab") as comfyuis_own:
        comfyui.scrub_log()
        comfyuis_own.write(b"next\n")
    assert seen == [bytes(20)]
    assert log.read_bytes() == b"next\n"


def test_scrubbing_a_log_that_is_not_there_is_no_error(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    comfyui.scrub_log()
    assert list(tmp_path.iterdir()) == []


# --- how it ended ---


@pytest.mark.parametrize(
    ("noted", "code", "said"),
    [
        ("1 137", 137, "exit code 137, SIGKILL."),
        ("1 139", 139, "exit code 139, SIGSEGV."),
        ("1 70", 70, "exit code 70."),
        ("1 0", 0, "exit code 0."),
        ("1 255", 255, "exit code 255."),
        ("2 137", None, "not known"),
        ("broken", None, "not known"),
        (None, None, "not known"),
    ],
)
def test_the_exit_code_is_that_of_the_start_which_ended(
    comfyui: ComfyUIProcess, tmp_path: Path, noted: str | None, code: int | None, said: str
) -> None:
    if noted is not None:
        (tmp_path / "ended").write_text(noted)
    death = comfyui.death_of(ProcessState(5, 1))
    assert (death.exit_code, death.out_of_memory) == (code, False)
    assert said in death.sentence


def test_an_exit_code_that_start_sh_notes_a_moment_later_is_waited_for(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    noted = threading.Timer(0.1, (tmp_path / "ended").write_text, ("1 139",))
    noted.start()
    assert comfyui.death_of(ProcessState(5, 1)).exit_code == 139


@pytest.mark.parametrize(
    ("group", "counter", "words"),
    [
        ("0::/pod/a", "pod/a/memory.events", "low 0\noom 2\noom_kill {}\n"),
        ("0::/seen/from/outside", "memory.events", "low 0\noom_kill {}\n"),
        ("9:cpu:/x\n4:memory:/pod/b\n0::/", "memory/pod/b/memory.oom_control", "under_oom 0\noom_kill {}\n"),
        ("4:cpu,memory:/seen/from/outside", "memory/memory.oom_control", "oom_kill {}\n"),
    ],
)
@pytest.mark.parametrize("kills", [0, 1])
def test_the_kernels_count_of_kills_tells_an_out_of_memory_death(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str, counter: str, words: str, kills: int
) -> None:
    monkeypatch.setattr("worker.process.CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr("worker.process.PROC", tmp_path / "proc")
    (tmp_path / "proc/5").mkdir(parents=True)
    (tmp_path / "proc/5/cgroup").write_text(group + "\n")
    path = tmp_path / "cgroup" / counter
    path.parent.mkdir(parents=True)
    path.write_text(words.format(7))
    comfyui, state = ComfyUIProcess(tmp_path), ProcessState(5, 1)
    comfyui.watch_memory(state)
    path.write_text(words.format(7 + kills))
    (tmp_path / "ended").write_text("1 137")
    death = comfyui.death_of(state)
    assert death.out_of_memory is (kills == 1)
    assert ("memory was used up" in death.sentence) is (kills == 1)


def test_without_a_count_nothing_is_claimed(comfyui: ComfyUIProcess, tmp_path: Path) -> None:
    comfyui.watch_memory(ProcessState(2**22 + 1, 1))  # above the kernel's highest pid
    (tmp_path / "ended").write_text("1 137")
    assert not comfyui.death_of(ProcessState(2**22 + 1, 1)).out_of_memory


def test_processor_time_is_that_of_the_process(comfyui: ComfyUIProcess, tmp_path: Path, start: Start) -> None:
    idle = record(tmp_path, start().pid)
    assert comfyui.cpu_s(idle) < 0.5
    own = ProcessState(os.getpid(), 1)
    before = comfyui.cpu_s(own)
    while comfyui.cpu_s(own) - before < 0.05:
        sum(range(100_000))
    times = os.times()
    assert comfyui.cpu_s(own) == pytest.approx(times.user + times.system, abs=0.1)
    assert comfyui.cpu_s(ProcessState(2**22 + 1, 1)) == 0.0
