"""ComfyUI's process as start.sh records it: real processes, real files."""

import os
import shutil
import signal
import subprocess
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
