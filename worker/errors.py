"""Every way in which a job can fail, its code, and whether the worker must be replaced.

Only these reach a caller as they are; any other exception is a bug and is reported as ``INTERNAL``.

```
WorkerError
├── BadRequest
│   ├── InputInvalid          INPUT_INVALID         the job input is not of the agreed form
│   ├── WorkflowInvalid       WORKFLOW_INVALID      no workflow, not in API format, or with files that it cannot have
│   ├── MediaInvalid          MEDIA_INVALID         an input file is not what it says, or is cut short
│   ├── InputUnreachable      INPUT_UNREACHABLE     an input could not be fetched from its URL
│   └── PromptRejected        PROMPT_REJECTED       ComfyUI's own validation said no
├── RunFailed
│   ├── ExecutionFailed       EXECUTION_FAILED      a node raised
│   ├── OutOfGpuMemory        OUT_OF_GPU_MEMORY     a node ran out of GPU memory
│   ├── GpuBroken             GPU_BROKEN            the GPU context is dead; the worker is replaced
│   ├── JobTimeout            JOB_TIMEOUT           the job's own deadline passed
│   └── JobCancelled          JOB_CANCELLED         RunPod or another client stopped it
├── OutputFailed
│   ├── HistoryMissing        HISTORY_MISSING       ComfyUI has no record of a prompt that ran
│   ├── OutputMissing         OUTPUT_MISSING        the history names a file that is not there
│   ├── OutputDamaged         OUTPUT_DAMAGED        ComfyUI wrote a file that is empty or cut short
│   ├── NoOutput              NO_OUTPUT             the run succeeded and gave nothing
│   ├── ResultTooLarge        RESULT_TOO_LARGE      the answer would not pass RunPod's size limit
│   └── UploadFailed          UPLOAD_FAILED         the bucket did not take a file of the result
└── WorkerFault
    ├── RamDiskError          RAM_DISK_ERROR        the RAM disk is not usable; the worker is replaced
    ├── RamDiskFull           RAM_DISK_FULL         no room for the inputs, or for what a node saved
    ├── ComfyUIUnavailable    COMFYUI_UNAVAILABLE   it does not answer
    ├── ComfyUIStuck          COMFYUI_STUCK         its process cannot be ended; the worker is replaced
    └── ComfyUICrashed        COMFYUI_CRASHED       the process ended in the middle of the job
```
"""

from __future__ import annotations

from typing import Any


class WorkerError(Exception):
    """A failure that the caller is told about.

    ``message`` is one sentence that a person can act on, without secrets and without prompt text;
    ``details`` is JSON-serialisable. With ``replace_worker`` the process ends once the result is posted.
    """

    code = "WORKER_ERROR"
    replace_worker = False

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def as_result(self) -> dict[str, Any]:
        """The failed job's answer. ``error`` is a string, which makes RunPod mark the job FAILED and show it."""
        return {"error": f"[{self.code}] {self.message}", "error_code": self.code, "details": self.details}


class BadRequest(WorkerError):
    """The caller has to change the request."""


class InputInvalid(BadRequest):
    code = "INPUT_INVALID"


class WorkflowInvalid(BadRequest):
    code = "WORKFLOW_INVALID"


class MediaInvalid(BadRequest):
    code = "MEDIA_INVALID"


class InputUnreachable(BadRequest):
    code = "INPUT_UNREACHABLE"


class PromptRejected(BadRequest):
    code = "PROMPT_REJECTED"


class RunFailed(WorkerError):
    """ComfyUI started the workflow and did not finish it."""


class ExecutionFailed(RunFailed):
    code = "EXECUTION_FAILED"


class OutOfGpuMemory(RunFailed):
    code = "OUT_OF_GPU_MEMORY"


class GpuBroken(RunFailed):
    code = "GPU_BROKEN"
    replace_worker = True


class JobTimeout(RunFailed):
    code = "JOB_TIMEOUT"


class JobCancelled(RunFailed):
    code = "JOB_CANCELLED"


class OutputFailed(WorkerError):
    """The workflow ran; its results cannot be returned."""


class HistoryMissing(OutputFailed):
    code = "HISTORY_MISSING"


class OutputMissing(OutputFailed):
    code = "OUTPUT_MISSING"


class OutputDamaged(OutputFailed):
    code = "OUTPUT_DAMAGED"


class NoOutput(OutputFailed):
    code = "NO_OUTPUT"


class ResultTooLarge(OutputFailed):
    code = "RESULT_TOO_LARGE"


class UploadFailed(OutputFailed):
    code = "UPLOAD_FAILED"


class WorkerFault(WorkerError):
    """The worker is at fault, not the request."""


class RamDiskError(WorkerFault):
    code = "RAM_DISK_ERROR"
    replace_worker = True  # what cannot be wiped must not meet the next caller


class RamDiskFull(WorkerFault):
    code = "RAM_DISK_FULL"


class ComfyUIUnavailable(WorkerFault):
    code = "COMFYUI_UNAVAILABLE"


class ComfyUIStuck(WorkerFault):
    code = "COMFYUI_STUCK"
    replace_worker = True


class ComfyUICrashed(WorkerFault):
    code = "COMFYUI_CRASHED"


def internal_error() -> dict[str, Any]:
    """The answer for a bug: no message of the exception, which could hold what a caller sent."""
    sentence = "[INTERNAL] The worker has a defect; the container log has the details under this job's id."
    return {"error": sentence, "error_code": "INTERNAL", "details": {}}
