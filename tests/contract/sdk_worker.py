"""A worker for the tests of the platform stand-in: the real SDK loop around a handler that does what the job says.

`SDK_WORKER_DIR` names the folder through which a test and the handler talk: the handler notes there which jobs it ran
and which were cancelled under it, and a job that waits goes on when the test has put `release-{job id}` there.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import runpod

RELEASE_TIMEOUT_S = 30.0


async def handler(job: dict[str, Any]) -> Any:
    """Do the job's `do`: echo, error, raise, nothing, big (`size_bytes`) or wait (`progress` is sent first)."""
    folder = Path(os.environ["SDK_WORKER_DIR"])
    with (folder / "ran").open("a") as ran:
        ran.write(f"{job['id']}\n")
    order = job["input"]
    if order["do"] == "echo":
        return {"echo": order}
    if order["do"] == "error":
        return {"error": "[SOME_CODE] a sentence", "error_code": "SOME_CODE", "details": {"node": "9"}}
    if order["do"] == "raise":
        raise ValueError("the handler broke")
    if order["do"] == "nothing":
        return {}
    if order["do"] == "big":
        return {"data": "x" * order["size_bytes"]}
    return await wait(job, folder)


async def wait(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Send the progress that the job names, then wait for the test; a cancellation is noted and goes on."""
    if "progress" in job["input"]:
        runpod.serverless.progress_update(job, job["input"]["progress"])
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    try:
        while not (folder / f"release-{job['id']}").exists():
            if time.monotonic() > deadline:
                return {"error": "the test did not release this job"}
            await asyncio.sleep(0.02)
    except asyncio.CancelledError:
        (folder / f"cancelled-{job['id']}").touch()
        raise
    return {"released": True}


if __name__ == "__main__":
    runpod.serverless.start({"handler": handler})
