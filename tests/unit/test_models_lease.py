"""The lease of a file on a network volume: one works, the others wait; a dead one is no obstacle. Real files."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker.models.lease import HEARTBEAT_S, STALE_S, age_s, heartbeat, lease

PATIENCE_S = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".a.safetensors.lease"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No lease, no probe of the clock, no grave."""
    yield
    assert list(tmp_path.iterdir()) == []


def never() -> bool:
    return False


def make_old(path: Path, by_s: float) -> None:
    os.utime(path, (time.time() - by_s,) * 2)


def test_a_free_lease_is_taken_and_given_back(path: Path) -> None:
    with lease(path, is_done=never) as is_ours:
        assert is_ours
        assert path.exists()
    with pytest.raises(ZeroDivisionError), lease(path, is_done=never):
        raise ZeroDivisionError


def test_one_that_is_held_is_waited_for(path: Path) -> None:
    path.touch()
    waits_s: list[float] = []

    def sleep(wait_s: float) -> None:
        waits_s.append(wait_s)
        make_old(path, STALE_S - 5)  # it beats from time to time
        if len(waits_s) == 3:
            path.unlink()

    with lease(path, is_done=never, poll_s=0.7, sleep=sleep) as is_ours:
        assert is_ours
    assert waits_s == [0.7] * 3


def test_what_another_has_done_is_not_done_again(path: Path) -> None:
    path.touch()
    done = False

    def sleep(_: float) -> None:
        nonlocal done
        done = True

    with lease(path, is_done=lambda: done, sleep=sleep) as is_ours:
        assert not is_ours
        assert path.exists()  # it is the other's still
    path.unlink()
    with lease(path, is_done=lambda: True) as is_ours:  # ended between the first look and the lease
        assert not is_ours


def test_the_lease_of_a_dead_one_is_taken_over(path: Path) -> None:
    path.touch()
    make_old(path, STALE_S + 5)
    with lease(path, is_done=never, sleep=lambda _: pytest.fail("it need not wait")) as is_ours:
        assert is_ours
        assert age_s(path) < STALE_S  # and it is alive again


def test_one_that_works_beats(path: Path) -> None:
    with heartbeat(path, interval_s=0.01):
        make_old(path, 3600)
        deadline_s = time.monotonic() + PATIENCE_S
        while age_s(path) > 60:
            assert time.monotonic() < deadline_s
    assert HEARTBEAT_S < STALE_S / 3  # two beats may be lost


def test_a_beat_that_fails_is_not_the_end(path: Path) -> None:
    with heartbeat(path, interval_s=0.01):
        path.unlink()
        time.sleep(0.05)
        path.touch()
        make_old(path, 3600)
        deadline_s = time.monotonic() + PATIENCE_S
        while age_s(path) > 60:
            assert time.monotonic() < deadline_s


def test_the_age_is_told_by_the_file_system_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    make_old(path, 40)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # hosts do not agree on the time
    assert 39 < age_s(path) < 100
    path.unlink()
    with pytest.raises(FileNotFoundError):
        age_s(path)


def test_of_many_one_works_at_a_time(path: Path) -> None:
    at_work, most, results = 0, 0, []
    guard = threading.Lock()

    def work(_: int) -> None:
        nonlocal at_work, most
        with lease(path, is_done=never, poll_s=0.001) as is_ours:
            with guard:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.002)
            with guard:
                at_work -= 1
                results.append(is_ours)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert (results, most) == ([True] * 16, 1)


def test_of_many_one_does_the_work(path: Path) -> None:
    done = threading.Event()
    results = []

    def work(_: int) -> None:
        with lease(path, is_done=done.is_set, poll_s=0.001) as is_ours:
            results.append(is_ours)
            if is_ours:
                done.set()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert sorted(results) == [False] * 15 + [True]


def test_a_folder_that_is_gone_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), lease(tmp_path / "gone/x.lease", is_done=never):
        pass
