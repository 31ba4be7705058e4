"""Nodes that raised: which failure of ours it is. What the messages say was taken from ComfyUI 0.18.1."""

from typing import Any

import pytest

from worker.comfyui_errors import failure_of
from worker.errors import ExecutionFailed, RamDiskFull

WORKFLOW = {"3": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "a caller's title"}}}


def failed_status(kind: str, message: str) -> dict[str, Any]:
    error = {"node_id": "3", "node_type": "SaveImage", "exception_type": kind, "exception_message": message}
    return {"status_str": "error", "messages": [["execution_error", error]]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("OSError", "[Errno 28] No space left on device"),  # SaveImage, SaveAnimatedWEBP, SaveAnimatedPNG
        ("OSError", "[Errno 28] No space left on device: '/dev/shm/comfyui/output/deep'"),
        ("av.error.OSError", "[Errno 28] No space left on device: '/dev/shm/comfyui/output/x_00001_.mp4'"),  # SaveVideo
        (
            "safetensors._safetensors_rust.SafetensorError",  # SaveLatent
            "Error while serializing: I/O error: No space left on device (os error 28)",
        ),
    ],
)
def test_a_full_ram_disk_is_told_as_such_without_a_callers_word(kind: str, message: str) -> None:
    failure = failure_of(failed_status(kind, message), WORKFLOW, [])
    assert isinstance(failure, RamDiskFull)
    assert (failure.details["node_id"], failure.details["exception_message"]) == ("3", message)
    assert "title" not in failure.message  # it goes into the log
    assert "--shm-size" in failure.message


def test_a_full_disk_elsewhere_is_not_the_ram_disk() -> None:
    message = "[Errno 28] No space left on device: '/root/.cache/huggingface/model'"
    assert isinstance(failure_of(failed_status("OSError", message), WORKFLOW, []), ExecutionFailed)
