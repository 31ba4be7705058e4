"""The RAM-disk race: each input is synced, then named, and only then is ComfyUI told. Proven on the system calls."""

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process.stack import Driver, base64_of, invert_workflow, picture_bytes, wait_until

SYSCALLS = "fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,sendto,sendmsg,write,openat"


@pytest.fixture
def trace(driver: Driver, tmp_path: Path) -> Iterator[Path]:
    """strace's record of the handler, all threads, from now on."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed; test_ramdisk.py holds the order inside the process")
    record = tmp_path / "trace"
    command = [strace, "-f", "-s", "64", "-e", f"trace={SYSCALLS}", "-o", str(record)]
    tracer = subprocess.Popen([*command, "-p", str(driver.pid_of("rp_handler.py"))], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    if "attached" not in said:
        tracer.wait(5)
        pytest.skip(f"strace may not attach to a process here: {said.strip()}")
    yield record
    tracer.send_signal(signal.SIGINT)  # it detaches; the handler goes on
    tracer.wait(5)


def test_fsync_then_rename_then_post_prompt(driver: Driver, trace: Path) -> None:
    names = ["a.png", "b.png"]
    workflow = invert_workflow("a.png")
    workflow["4"] = {"class_type": "LoadImage", "inputs": {"image": "b.png"}}
    answer = driver.run({"workflow": workflow, "images": {name: base64_of(picture_bytes()) for name in names}})
    assert answer["status"] == "COMPLETED", answer
    wait_until(lambda: "POST /history" in trace.read_text(), "the trace is written")
    lines = trace.read_text().splitlines()

    def first(pattern: str, after: int = 0) -> int:
        for position in range(after, len(lines)):
            if re.search(pattern, lines[position]):
                return position
        pytest.fail(f"no line after {after} matches {pattern}: {lines[after : after + 40]}")

    posted = first(r'send(to|msg)\(.*"POST /prompt ')
    position = 0
    for name in names:
        opened = first(r'openat\(.*\.part", .*O_CREAT.* = \d+$', position)
        descriptor = lines[opened].rsplit("= ", 1)[1]
        synced = first(rf"fsync\({descriptor}\) += 0", opened)
        named = first(rf'renameat2?\(.*\.part", .*"{re.escape(name)}".*= 0$', synced)
        assert opened < synced < named < posted
        position = named
