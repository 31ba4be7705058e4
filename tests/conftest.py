"""How tests are spread over processes (make test: pytest-xdist, --dist loadgroup)."""

import signal

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file stays together, for the sake of what its tests share; rows of FAULTS.md, which mostly wait, do not."""
    for item in items:
        if item.get_closest_marker("fault") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_configure() -> None:
    """A shell starts what goes into the background with SIGINT ignored, and so would be what the tests interrupt."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
