"""The handler as the SDK calls it: answers for every way out, one thread at a time, progress in order."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rp_handler
from worker.config import Config
from worker.control import JobControl
from worker.errors import GpuBroken, WorkerError

JOB = {"id": "job-1", "input": {}}
CALLERS_WORDS = "a lighthouse at dusk"
Step = Callable[[JobControl, Callable[[dict[str, Any]], None]], dict[str, Any]]


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would go to RunPod as progress, in the order of arrival."""
    arrived: list[dict[str, Any]] = []

    async def send(_session: object, body: dict[str, Any], _job: object) -> None:
        await asyncio.sleep(0.01)
        arrived.append(body)

    monkeypatch.setattr(rp_handler, "send_result", send)
    monkeypatch.setattr(rp_handler, "PROGRESS_INTERVAL_S", 0.02)
    return arrived


def endpoint_running(step: Step, tmp_path: Path) -> rp_handler.Endpoint:
    """An endpoint whose jobs are ``step`` instead of the seven."""
    worker = rp_handler.Worker(Config.from_env({"RAMDISK_DIR": str(tmp_path)}))
    worker.run_job = lambda _id, _input, control, on_progress: step(control, on_progress)  # type: ignore[method-assign]
    return rp_handler.Endpoint(worker)


def handle(step: Step, tmp_path: Path) -> dict[str, Any]:
    return asyncio.run(endpoint_running(step, tmp_path).handle(dict(JOB)))


def test_a_result_is_returned_as_it_is(tmp_path: Path, posted: list[dict[str, Any]]) -> None:
    assert handle(lambda *_: {"status": "success", "images": []}, tmp_path) == {"status": "success", "images": []}
    assert posted == []


def test_a_bug_is_reported_without_what_the_exception_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, posted: list[dict[str, Any]]
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise KeyError(CALLERS_WORDS)

    with caplog.at_level(logging.DEBUG):
        result = handle(broken, tmp_path)
    assert result["error_code"] == "INTERNAL"
    assert CALLERS_WORDS not in str(result) + caplog.text
    assert "KeyError" in caplog.text
    assert "in broken" in caplog.text  # the frames are there for whoever mends it


def test_what_the_sdk_could_not_post_is_replaced(tmp_path: Path, posted: list[dict[str, Any]]) -> None:
    result = handle(lambda *_: {"texts": ["\ud800"], "number": float("nan")}, tmp_path)
    assert result == {"texts": ["?"], "number": None}


def test_a_dead_gpu_replaces_the_worker_and_other_failures_do_not(tmp_path: Path, posted: list[dict[str, Any]]) -> None:
    def fails_with(error: WorkerError) -> Step:
        def step(*_: object) -> dict[str, Any]:
            raise error

        return step

    dead = endpoint_running(fails_with(GpuBroken("CUDA error")), tmp_path)
    assert asyncio.run(dead.handle(dict(JOB)))["refresh_worker"] is True
    assert dead.exit_code == 1
    alive = endpoint_running(fails_with(WorkerError("no")), tmp_path)
    assert "refresh_worker" not in asyncio.run(alive.handle(dict(JOB)))
    assert alive.exit_code == 0


def test_a_failure_over_the_limit_is_cut_until_it_can_be_posted(tmp_path: Path, posted: list[dict[str, Any]]) -> None:
    def fails(*_: object) -> dict[str, Any]:
        raise WorkerError("x" * 10**7, log="y" * 10**7)

    result = handle(fails, tmp_path)
    assert (len(result["error"]), result["error_code"], result["details"]) == (2000, "WORKER_ERROR", {})


def test_cancelling_twice_still_waits_for_the_thread(tmp_path: Path, posted: list[dict[str, Any]]) -> None:
    started, ended = threading.Event(), threading.Event()

    def slow(control: JobControl, _: object) -> dict[str, Any]:
        started.set()
        try:
            while True:
                control.check()
                time.sleep(0.01)
        finally:
            time.sleep(0.2)  # ComfyUI takes its time to let go
            ended.set()

    async def scenario() -> None:
        task = asyncio.create_task(endpoint_running(slow, tmp_path).handle(dict(JOB)))
        await asyncio.to_thread(started.wait, 5)
        task.cancel()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(scenario())


def test_progress_is_the_newest_in_order_and_none_follows_the_result(
    tmp_path: Path, posted: list[dict[str, Any]]
) -> None:
    steps = 300

    def busy(_: JobControl, on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        for value in range(steps):
            on_progress({"value": value})
            time.sleep(0.001)
        return {"status": "success"}

    async def scenario() -> int:
        await endpoint_running(busy, tmp_path).handle(dict(JOB))
        at_return = len(posted)
        await asyncio.sleep(0.1)
        return at_return

    at_return = asyncio.run(scenario())
    values = [body["output"]["value"] for body in posted]
    assert {body["status"] for body in posted} == {"IN_PROGRESS"}
    assert 2 <= len(values) < steps / 5
    assert values == sorted(values)
    assert len(posted) == at_return
