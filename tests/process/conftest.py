"""Stacks that tests share: each is booted once for all the tests that leave it as they found it (stack.py boots)."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from local.__main__ import Platform
from tests.process.fault_rows import TABLE, Row, read_table
from tests.process.stack import Driver, boot, boot_platform, wait_until

# A model that is named and missing (no network is asked), and little patience with a node that does not let go.
FAULT_SETTINGS = {
    "INTERRUPT_GRACE_S": "1",
    "COMFYUI_MAX_DEATHS": "1000",
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


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, Any]:
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def worker(fault_stack: Driver, request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The stack that is there to suffer. Each fault that a test arms must strike; it is taken back after the test."""
    yield fault_stack
    wait_until(fault_stack.comfyui_answers, "ComfyUI is up after the test")
    struck = {**fault_stack.faults(), **fault_stack.platform_faults()}
    fault_stack.disarm()
    for kind in fault_stack.platform_faults():
        fault_stack.platform_fault(kind, times=0)
    if request.node.stash.get(PASSED, False):
        assert [kind for kind, times in struck.items() if not times] == [], "faults that were armed and did not strike"


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """One whose workers a test starts itself; it takes one that has not pinged for 3 s for lost."""
    with boot_platform(tmp_path / "platform-log", "--lost-s", "3") as running:
        yield running


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row of FAULTS.md that a test is marked with."""
    mark = request.node.get_closest_marker("fault")
    table_row = read_table(TABLE.read_text())[mark.args[0]]
    found = Row(table_row, is_alone=len(table_row.tests) == 1 and not hasattr(request.node, "callspec"))
    yield found
    if request.node.stash.get(PASSED, False):
        found.check_complete()
