"""A worker for the tests of the platform stand-in: the real SDK loop around a handler that does what the job says.

    python sdk_worker.py [handler|blocking|generator]

`SDK_WORKER_DIR` names the folder through which a test and the handler talk: the handler notes there which jobs it ran
and which were cancelled under it, and a job that waits goes on when the test has put `release-{job id}` there.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import runpod

RELEASE_TIMEOUT_S = 30.0
POLL_S = 0.02
SURROGATE = "\ud800"


def folder_of(job: dict[str, Any]) -> Path:
    """The folder shared with the test; notes there that this worker has begun the job."""
    folder = Path(os.environ["SDK_WORKER_DIR"])
    with (folder / "ran").open("a") as ran:
        ran.write(f"{job['id']} {os.environ['RUNPOD_POD_ID']}\n")
    return folder


async def handler(job: dict[str, Any]) -> Any:
    """Do the job's `do`: echo, return (`value`), big (`size_bytes`), wait (`progress` is sent first) or misbehave."""
    folder, order = folder_of(job), job["input"]
    if order["do"] == "echo":
        return {"echo": order}
    if order["do"] == "return":
        return order["value"]
    if order["do"] == "big":
        return {"data": "x" * order["size_bytes"]}
    if order["do"] == "wait":
        return await wait(job, folder)
    return misbehave(order["do"])


def misbehave(what: str) -> Any:
    """What a JSON job cannot name as its value."""
    if what == "raise":
        raise ValueError("the handler broke")
    if what == "sys.exit":
        sys.exit(3)
    if what == "os._exit":
        os._exit(7)
    circle: dict[str, Any] = {}
    circle["circle"] = circle
    return {"bytes": {"a": b"x"}, "circular": circle, "surrogate": {"a": SURROGATE}, "nan": {"a": float("nan")}}[what]


async def wait(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Send the progress that the job names, then wait for the test; a cancellation is noted and goes on."""
    if "progress" in job["input"]:
        runpod.serverless.progress_update(job, job["input"]["progress"])
    try:
        for _ in until_released(job, folder):
            await asyncio.sleep(POLL_S)
    except asyncio.CancelledError:
        (folder / f"cancelled-{job['id']}").touch()
        raise
    return {"released": True}


def blocking(job: dict[str, Any]) -> dict[str, Any]:
    """Hold the SDK's event loop until the test releases the job."""
    folder = folder_of(job)
    for _ in until_released(job, folder):
        time.sleep(POLL_S)
    return {"released": True}


async def generator(job: dict[str, Any]) -> AsyncIterator[Any]:
    """Yield the job's `chunks`, one before the test's release and the rest after it; then fail if it has `error`."""
    folder = folder_of(job)
    first, *others = job["input"]["chunks"]
    yield first
    for _ in until_released(job, folder):
        await asyncio.sleep(POLL_S)
    for chunk in others:
        yield chunk
    if "error" in job["input"]:
        raise ValueError(job["input"]["error"])


def until_released(job: dict[str, Any], folder: Path) -> Iterator[None]:
    """Yields until the test has released the job. Raises TimeoutError when it does not."""
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while not (folder / f"release-{job['id']}").exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the test did not release this job")
        yield


if __name__ == "__main__":
    chosen = globals()[sys.argv[1]] if len(sys.argv) > 1 else handler
    runpod.serverless.start({"handler": chosen, "return_aggregate_stream": chosen is generator})
