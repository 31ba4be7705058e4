"""The handler of rp_handler.py in this process, on the RAM disk and the ComfyUI of a running stack.

The SDK waits a second between two jobs; here hundreds of inputs take seconds. The stack's own handler has nothing to
do meanwhile.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterator
from typing import Any
from unittest import mock

import rp_handler
from tests.process.stack import Driver
from worker.config import Config


class InProcess:
    """The seven steps of `Worker.run_job`, by way of `Endpoint.handle`."""

    def __init__(self, driver: Driver) -> None:
        settings = {
            "RAMDISK_DIR": str(driver.ramdisk),
            "COMFYUI_PORT": driver.worker.settings["COMFYUI_PORT"],
            "INTERRUPT_GRACE_S": "1",
            "ALLOW_URL_INPUTS": "1",
        }
        self._endpoint = rp_handler.Endpoint(rp_handler.Worker(Config.from_env(settings)))

    def run(self, job_input: Any) -> dict[str, Any]:
        """The answer in the form of RunPod's status body."""
        own = dict(job_input) if isinstance(job_input, dict) else job_input  # the handler empties it
        result = asyncio.run(self._endpoint.handle({"id": str(uuid.uuid4()), "input": own}))
        if error := result.pop("error", None):
            return {"status": "FAILED", "error": error, "output": result}
        return {"status": "COMPLETED", "output": result}


@contextlib.contextmanager
def handler_of(driver: Driver) -> Iterator[InProcess]:
    """Its progress goes nowhere, its log only into the records of the test."""

    async def send_nothing(*_: object) -> None:
        pass

    with mock.patch.object(rp_handler, "send_result", send_nothing):
        logging.getLogger("urllib3").setLevel(logging.WARNING)
        yield InProcess(driver)
