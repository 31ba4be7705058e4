"""The RAM disk's faults: rows R of FAULTS.md. Most need a tmpfs of their own, which takes root."""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from local.__main__ import Platform
from tests.process.conftest import FAULT_SETTINGS
from tests.process.fault_rows import Row
from tests.process.stack import (
    Driver,
    base64_of,
    boot,
    boot_worker,
    invert_job,
    invert_workflow,
    inverted,
    picture_bytes,
    start_long_job,
    start_worker,
    wait_until,
)

pytestmark = pytest.mark.xdist_group("ramdisk")  # one boot on the small RAM disk serves most of them

MB = 1 << 20
SMALL_MB = 32
MARKER = ".comfy-endpoint-ramdisk"
LEFTOVERS = 10_000


# --- small RAM disks ---


def mount(*arguments: str | Path) -> None:
    """Skips the test where mounting is not allowed."""
    finished = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {finished.stderr.strip()}")


@contextlib.contextmanager
def small_disk(options: str) -> Iterator[Path]:
    """A tmpfs of its own in an otherwise unused place; whatever is mounted there goes at the end."""
    folder = Path(f"/dev/shm/comfy-endpoint-test-{os.getpid()}-{random.randbytes(4).hex()}")
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", options, "comfy-endpoint-test", folder)
        yield folder
    finally:
        while os.path.ismount(folder):
            subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def small_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """A worker on a RAM disk of SMALL_MB that takes 300 files."""
    log_path = tmp_path_factory.mktemp("small") / "log"
    with (
        small_disk(f"size={SMALL_MB}m,nr_inodes=300") as folder,
        boot(log_path, **FAULT_SETTINGS, RAMDISK_DIR=str(folder)) as driver,
    ):
        yield driver


@pytest.fixture
def small(small_stack: Driver) -> Iterator[Driver]:
    yield small_stack
    small_stack.disarm()


def free_bytes(driver: Driver) -> int:
    usage = os.statvfs(driver.ramdisk)
    return usage.f_bavail * usage.f_frsize


@contextlib.contextmanager
def filled(driver: Driver, left_bytes: int) -> Iterator[None]:
    """The RAM disk has so much left, and not more; what takes the rest is no job's."""
    filler = driver.ramdisk / "user" / "filler"
    with filler.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free_bytes(driver) - left_bytes)
    try:
        yield
    finally:
        filler.unlink()


def noise(size: int = 512) -> bytes:
    """A PNG that is as large as its pixels: 3 bytes each."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (size, size), random.Random(5).randbytes(3 * size * size)).save(stream, "PNG")
    return stream.getvalue()


def job_with(content: bytes) -> dict[str, Any]:
    return {"workflow": invert_workflow(), "images": {"a.png": base64_of(content)}}


@pytest.mark.fault("R1")
def test_inputs_that_do_not_fit_are_refused_with_both_figures(row: Row, small: Driver) -> None:
    picture = noise()
    with filled(small, left_bytes=len(picture) // 2):
        details = row.fails(small.run(job_with(picture)), "RAM_DISK_FULL", str(len(picture)), "--shm-size")
        assert details["needed_bytes"] == len(picture)
        assert 0 < details["free_bytes"] < len(picture)
    row.next_job_runs(small)


@pytest.mark.fault("R1")
def test_a_ram_disk_without_a_single_byte_left_costs_one_job(row: Row, small: Driver) -> None:
    picture = noise(128)
    with filled(small, left_bytes=0):  # the wipe of ComfyUI's log may give back a page
        details = row.fails(small.run(job_with(picture)), "RAM_DISK_FULL", "--shm-size")
        assert details["needed_bytes"] == len(picture) > details["free_bytes"]
    row.next_job_runs(small)


@pytest.mark.fault("R2")
def test_a_ram_disk_that_runs_full_under_the_inputs_is_told_with_what_they_need(row: Row, small: Driver) -> None:
    files = {f"{number}.txt": base64_of(b"text") for number in range(400)}  # more than the RAM disk has names for
    answer = small.run({"workflow": invert_workflow("0.txt"), "files": files})
    details = row.fails(answer, "RAM_DISK_FULL", "need 1600 bytes", "cannot hold another file", "--shm-size")
    assert details["needed_bytes"] == 1600
    assert details["free_bytes"] > MB
    row.next_job_runs(small)


@pytest.mark.fault("R3")
def test_a_ram_disk_that_runs_full_while_comfyui_saves_is_told_with_what_is_there(row: Row, small: Driver) -> None:
    picture = noise()
    with filled(small, left_bytes=int(1.5 * len(picture))):
        details = row.fails(small.run(job_with(picture)), "RAM_DISK_FULL", "bytes left", "--shm-size")
        assert details["used_bytes"]["input"] == len(picture)
        assert details["used_bytes"]["output"] < len(picture)
        assert details["free_bytes"] < len(picture)
        assert (details["node_id"], details["node_type"]) == ("3", "SaveImage")
    row.next_job_runs(small)


@pytest.mark.fault("R4")
def test_a_ram_disk_that_is_small_is_a_warning_with_the_flag_to_set(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with (
        small_disk("size=64m") as folder,  # Docker's own default
        boot_worker(platform, tmp_path / "log", RAMDISK_DIR=str(folder)) as worker,
    ):
        warnings = [line for line in worker.log().splitlines() if "WARNING" in line]
        assert len(warnings) == 1
        assert "less than RAMDISK_MIN_MB=256 MB; give the container more (docker: --shm-size=1g)" in warnings[0]
        row.succeeds(worker.run(invert_job()))
        row.next_job_runs(worker)
        worker.worker.process.send_signal(signal.SIGTERM)
        assert worker.worker.process.wait(20) == 0  # though a mount point cannot be removed
        assert list(folder.iterdir()) == []


# --- what does not belong there ---


@pytest.fixture
def outside(small: Driver) -> Iterator[Path]:
    """A folder on the same file system, so that hard links can lead there, which the wipe must not touch."""
    folder = small.ramdisk / "user" / "outside"
    folder.mkdir()
    for name in ("linked", "hard", "kept"):
        (folder / name).write_bytes(inverted(picture_bytes()))
    yield folder
    shutil.rmtree(folder)


def plant(folder: Path, outside: Path) -> None:
    """All that a file can be and should not: under names that the next job uses, too."""
    (folder / "a.png").symlink_to(outside / "linked")
    (folder / "inverted_00001_.png").symlink_to(outside / "linked")
    (folder / "folder").symlink_to(outside)
    (folder / "hard").hardlink_to(outside / "hard")
    os.mkfifo(folder / "pipe")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "deep" / "er" / "pipe")


def is_untouched(outside: Path) -> bool:
    content = inverted(picture_bytes())
    return {path.name: path.read_bytes() for path in outside.iterdir()} == dict.fromkeys(
        ("linked", "hard", "kept"), content
    )


@pytest.mark.fault("R5")
def test_what_is_planted_before_a_job_leads_nowhere(row: Row, small: Driver, outside: Path) -> None:
    for name in ("input", "output", "temp"):
        plant(small.ramdisk / name, outside)
    row.succeeds(small.run(invert_job()))
    assert is_untouched(outside)
    row.next_job_runs(small)


@pytest.mark.fault("R5")
def test_what_is_planted_during_a_job_leads_nowhere(row: Row, small: Driver, outside: Path) -> None:
    job_id = start_long_job(small, seconds=1)
    for name in ("input", "output", "temp"):
        (small.ramdisk / name / "a.png").unlink(missing_ok=True)
        plant(small.ramdisk / name, outside)
    answer = small.finish(job_id)
    if answer["status"] == "COMPLETED":  # it was saved beside what was planted: ComfyUI counts the names that it finds
        assert not answer["output"]["images"][0]["filename"].startswith("inverted_00001_")
    row.succeeds(answer)
    assert is_untouched(outside)
    row.next_job_runs(small)


@pytest.mark.fault("R5")
def test_an_output_that_is_no_file_is_never_returned(row: Row, small: Driver) -> None:
    for kind, said in (("symlink", "cannot be opened"), ("fifo", "not a regular file"), ("folder", "regular file")):
        small.fault("file_swapped", text=kind, path="/etc/passwd")
        answer = small.run(invert_job())
        row.fails(answer, "OUTPUT_MISSING", said)
        assert "root:" not in str(answer)
    assert Path("/etc/passwd").read_text().startswith("root:")
    row.next_job_runs(small)


@pytest.mark.fault("R5")
def test_an_output_with_another_name_elsewhere_is_not_overwritten_there(row: Row, small: Driver, outside: Path) -> None:
    small.fault("file_swapped", text="hardlink", path=str(outside / "kept"))
    row.succeeds(small.run(invert_job()))
    assert is_untouched(outside)
    row.next_job_runs(small)


# --- a RAM disk that cannot be used ---


@pytest.mark.fault("R6")
def test_a_read_only_ram_disk_at_the_start_is_one_sentence(row: Row, platform: Platform, tmp_path: Path) -> None:
    with (
        small_disk("size=64m,ro") as folder,
        start_worker(platform, tmp_path / "log", RAMDISK_DIR=str(folder)) as broken,
    ):
        job_id = broken.start_job(invert_job())
        assert broken.worker.process.wait(20) == 1
        (line,) = broken.log().splitlines()
        assert "cannot be written; is /dev/shm full or read-only (docker: --shm-size)?" in line
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.succeeds(worker.finish(job_id))
        row.next_job_runs(worker)


@pytest.mark.fault("R6")
def test_a_ram_disk_that_turns_read_only_replaces_the_worker(row: Row, platform: Platform, tmp_path: Path) -> None:
    with (
        small_disk("size=64m") as folder,
        boot_worker(platform, tmp_path / "log", RAMDISK_DIR=str(folder)) as broken,
    ):
        # A second mount over the first: a file that is open for writing would keep that one from being remounted.
        mount("--bind", folder, folder)
        mount("-o", "remount,bind,ro", folder)
        row.fails(broken.run(invert_job()), "RAM_DISK_ERROR", "Read-only file system")
        assert broken.worker.process.wait(20) == 1
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@contextlib.contextmanager
def held_before_naming(pid: int) -> Iterator[None]:
    """A process that stands still between writing a file and giving it its name."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed; it holds the handler between writing a file and naming it")
    hold = ["-e", "trace=?renameat,renameat2", "-e", "inject=?renameat,renameat2:delay_enter=60s"]
    attach = [strace, "-f", "-o", "/dev/null", *hold, "-p", str(pid)]
    with subprocess.Popen(attach, stderr=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stderr is not None
            if "attached" not in (said := tracer.stderr.readline()):
                pytest.skip(f"strace may not attach to a process here: {said.strip()}")
            yield
        finally:
            tracer.kill()


@pytest.mark.fault("R7")
def test_what_a_killed_handler_has_half_written_is_gone_at_the_next_start(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with boot_worker(platform, tmp_path / "log") as killed:

        def half_written() -> list[Path]:
            return [path for path in killed.job_files() if path.name.endswith(".part") and path.stat().st_size]

        with held_before_naming(killed.pid_of("rp_handler.py")):
            job_id = killed.start_job(invert_job())
            (partial,) = wait_until(half_written, "a file is written and has no name yet")
            held = partial.open("rb")
            for pid in killed.own_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        # Every process of the killed worker has the lock of the RAM disk, and dies in its own time.
        subprocess.run(["flock", "--wait", "20", killed.ramdisk / MARKER, "true"], check=True)
        with held, boot_worker(platform, tmp_path / "second-log", RAMDISK_DIR=str(killed.ramdisk)) as second:
            assert held.read() == bytes(len(picture_bytes()))
            assert not partial.exists()
            row.succeeds(second.finish(job_id))
            row.next_job_runs(second)


@pytest.mark.fault("R8")
def test_ten_thousand_leftovers_are_wiped_before_the_job(row: Row, worker: Driver) -> None:
    for number in range(LEFTOVERS):
        folder = worker.ramdisk / ("input", "output", "temp")[number % 3] / f"folder-{number % 7}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").write_bytes(b"leftover")
    held = [path.open("rb") for path in worker.job_files()[:: LEFTOVERS // 100]]
    result = row.succeeds(worker.run(invert_job()))
    print(f"{LEFTOVERS} files wiped in {result['timings_ms']['clear'] / 1000:.2f} s")
    for stream in held:
        with stream:
            assert stream.read() == bytes(len(b"leftover"))
    row.next_job_runs(worker)


@pytest.mark.fault("R9")
def test_without_its_marker_file_nothing_is_wiped(row: Row, platform: Platform, tmp_path: Path) -> None:
    with boot_worker(platform, tmp_path / "log") as broken:
        (broken.ramdisk / MARKER).unlink()
        kept = broken.ramdisk / "input" / "somebodys.png"
        kept.write_bytes(b"somebody's")
        row.fails(broken.run(invert_job()), "RAM_DISK_ERROR", "has no marker file", "refusing to wipe it")
        assert broken.worker.process.wait(20) == 1
        assert kept.read_bytes() == b"somebody's"
        shutil.rmtree(broken.ramdisk)
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@pytest.mark.fault("R10")
def test_leftovers_that_fill_the_ram_disk_do_not_keep_the_next_worker_from_starting(
    row: Row, platform: Platform, tmp_path: Path
) -> None:
    with small_disk("size=64m") as folder:
        (folder / MARKER).write_text("comfy-endpoint\n")
        for name in ("input", "output", "temp", "run", "user"):
            (folder / name).mkdir()
        with (folder / "output" / "large").open("wb") as leftover:
            os.posix_fallocate(leftover.fileno(), 0, os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize)
        with boot_worker(platform, tmp_path / "log", RAMDISK_DIR=str(folder)) as worker:
            assert "Wiping what an earlier worker left" in worker.log()
            row.succeeds(worker.run(invert_job()))
            row.next_job_runs(worker)


@pytest.mark.fault("R11")
def test_a_job_folder_that_leads_elsewhere_replaces_the_worker(row: Row, platform: Platform, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "somebodys.png").write_bytes(b"somebody's")
    with boot_worker(platform, tmp_path / "log") as broken:
        (broken.ramdisk / "output").rmdir()
        (broken.ramdisk / "output").symlink_to(elsewhere)
        row.fails(broken.run(invert_job()), "RAM_DISK_ERROR", "cannot be wiped")
        assert broken.worker.process.wait(20) == 1
        shutil.rmtree(broken.ramdisk)
    assert (elsewhere / "somebodys.png").read_bytes() == b"somebody's"
    with boot_worker(platform, tmp_path / "second-log") as worker:
        row.next_job_runs(worker)


@pytest.mark.fault("R12")
def test_a_sparse_file_larger_than_the_ram_disk_is_wiped(row: Row, small: Driver) -> None:
    held = []
    job_id = start_long_job(small, seconds=1)
    for name in ("input", "output", "temp"):
        with (small.ramdisk / name / "sparse.dat").open("wb") as stream:  # as np.memmap makes one
            stream.seek(512 * MB)
            stream.write(b"somebody's")
            stream.truncate(1024 * MB)
        held.append((small.ramdisk / name / "sparse.dat").open("rb"))
    row.succeeds(small.finish(job_id))
    for stream in held:
        with stream:
            stream.seek(512 * MB)
            assert stream.read(10) == bytes(10)
    row.next_job_runs(small)
