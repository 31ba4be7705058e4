"""Stacks that tests share: each is booted once for all the tests that leave it as they found it (stack.py boots)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from local.__main__ import Platform
from tests.process.fault_rows import TABLE, Row, read_table
from tests.process.stack import Driver, boot, boot_platform, wait_until

# A model that is named and missing (no network is asked), and little patience with a node that does not let go.
FAULT_SETTINGS = {
    "INTERRUPT_GRACE_S": "1",
    "MODELS": "org/repo:absent.safetensors:checkpoints",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def shared_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with boot(tmp_path_factory.mktemp("stack") / "log") as driver:
        yield driver


@pytest.fixture
def driver(shared_driver: Driver) -> Iterator[Driver]:
    """The shared stack; every test must leave it empty."""
    yield shared_driver
    wait_until(shared_driver.comfyui_is_idle, "ComfyUI is idle after the test")


@pytest.fixture(scope="session")
def fault_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with boot(tmp_path_factory.mktemp("faults") / "log", **FAULT_SETTINGS) as driver:
        yield driver


@pytest.fixture
def worker(fault_stack: Driver) -> Iterator[Driver]:
    """The stack that is there to suffer; the faults of a test are disarmed after it."""
    yield fault_stack
    wait_until(fault_stack.comfyui_answers, "ComfyUI is up after the test")
    fault_stack.disarm()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """One whose workers a test starts itself; it takes one that has not pinged for 3 s for lost."""
    with boot_platform(tmp_path / "platform-log", "--lost-s", "3") as running:
        yield running


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of FAULTS.md that a test is marked with."""
    mark = request.node.get_closest_marker("fault")
    found = Row(read_table(TABLE.read_text())[mark.args[0]])
    failed_before = request.session.testsfailed
    yield found
    if request.session.testsfailed == failed_before:
        found.check_complete()
