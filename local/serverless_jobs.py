"""What the RunPod stand-in knows: the jobs and workers of one endpoint, and every change of state. It never waits."""

import json
import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SYNC_PREFIX = "sync-"
"""Ids of /runsync jobs start with it; by this a worker knows which limit its result has."""

WORKER_LOST_S = 10.0
"""After so long without poll or ping, /health no longer counts a worker; the SDK is asked for one ping a second."""


class Status(StrEnum):
    """Where a job stands, in the words of the endpoint API."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


@dataclass(eq=False)
class Job:
    """One job. Times are seconds of the platform's clock; `answer` is what its worker said: `output`, `error`, both."""

    id: str
    input: dict[str, Any]
    queued_at: float
    status: Status = Status.IN_QUEUE
    pod_id: str | None = None
    started_at: float = math.nan
    finished_at: float = math.nan
    answer: dict[str, Any] = field(default_factory=dict)

    @property
    def is_final(self) -> bool:
        return self.status not in (Status.IN_QUEUE, Status.IN_PROGRESS)

    def body(self, now: float) -> dict[str, Any]:
        """What /status answers; delayTime and executionTime in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.status in (Status.IN_QUEUE, Status.CANCELLED):
            return body
        ended_at = self.finished_at if self.is_final else now
        body["delayTime"] = round((self.started_at - self.queued_at) * 1000)
        body["executionTime"] = round((ended_at - self.started_at) * 1000)
        if self.is_final and self.pod_id is not None:
            body["workerId"] = self.pod_id
        return body | self.answer


@dataclass
class Worker:
    """One container, known from its requests."""

    seen_at: float
    has_polled: bool = False
    is_healthy: bool = True
    stops: list[str] = field(default_factory=list)


class Platform:
    """Jobs and workers of one endpoint. Each method is one look or one change of state; none of them waits."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._workers: dict[str, Worker] = {}

    def submit(self, job_input: dict[str, Any], *, sync: bool) -> Job:
        """Queue a job. One with an empty input is never given to a worker: RunPod ends it with this error."""
        now = self._clock()
        job = Job(f"{SYNC_PREFIX if sync else ''}{uuid.uuid4()}-u1", job_input, queued_at=now)
        self._jobs[job.id] = job
        if job_input:
            self._queue.append(job)
        else:
            job.status = Status.FAILED
            job.started_at = job.finished_at = now
            job.answer = {"error": "job timed out after 1 retries", "retries": 1}
        return job

    def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def describe(self, job: Job) -> dict[str, Any]:
        """The /status body of a job as of now."""
        return job.body(self._clock())

    def take(self, pod_id: str) -> Job | None:
        """Give the oldest queued job to a worker; each job is given once."""
        if not self._queue:
            return None
        job = self._queue.popleft()
        job.status, job.pod_id, job.started_at = Status.IN_PROGRESS, pod_id, self._clock()
        return job

    def progress(self, job: Job, pod_id: str, output: Any) -> None:
        """Keep a progress update, unless the job is over: the SDK sends each from a thread of its own, in any order."""
        if self._is_running(job, pod_id):
            job.answer = {"output": output}

    def finish(self, job: Job, pod_id: str, answer: dict[str, Any]) -> None:
        """End a job with what its worker posted: FAILED when that names an error. Ignored when the job is over."""
        if self._is_running(job, pod_id):
            job.status = Status.FAILED if answer.get("error") else Status.COMPLETED
            job.finished_at, job.answer = self._clock(), answer

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not over: at once for the client, by job-stop for the worker that runs it."""
        if job.is_final:
            return
        if job.pod_id is None:
            self._queue.remove(job)
        else:
            self._worker(job.pod_id).stops.append(job.id)
        job.status = Status.CANCELLED

    def stops_for(self, pod_id: str) -> list[str]:
        """Ids of cancelled jobs that this worker has not been told of yet."""
        worker = self._worker(pod_id)
        stops, worker.stops = worker.stops, []
        return stops

    def saw(self, pod_id: str, *, polled: bool = False, status: str | None = None) -> None:
        """Note a sign of life; `status` is what a ping says (rp_fitness.py: "unhealthy" before the worker exits)."""
        worker = self._worker(pod_id)
        worker.seen_at = self._clock()
        worker.has_polled |= polled
        worker.is_healthy = status != "unhealthy"

    def health(self) -> dict[str, dict[str, int]]:
        """The /health body. A worker is `ready` when it is idle, as in the example of RunPod's documentation."""
        jobs = [job.status for job in self._jobs.values()]
        workers = [self._state(pod_id) for pod_id in self._workers]
        return {
            "jobs": {
                "completed": jobs.count(Status.COMPLETED),
                "failed": jobs.count(Status.FAILED),
                "inProgress": jobs.count(Status.IN_PROGRESS),
                "inQueue": jobs.count(Status.IN_QUEUE),
                "retried": 0,
            },
            "workers": {
                "idle": workers.count("idle"),
                "initializing": workers.count("initializing"),
                "ready": workers.count("idle"),
                "running": workers.count("running"),
                "throttled": 0,
                "unhealthy": workers.count("unhealthy"),
            },
        }

    def _worker(self, pod_id: str) -> Worker:
        return self._workers.setdefault(pod_id, Worker(seen_at=self._clock()))

    def _is_running(self, job: Job, pod_id: str) -> bool:
        return job.status is Status.IN_PROGRESS and job.pod_id == pod_id

    def _state(self, pod_id: str) -> str:
        worker = self._workers[pod_id]
        if self._clock() - worker.seen_at > WORKER_LOST_S:
            return "lost"
        if not worker.is_healthy:
            return "unhealthy"
        if any(self._is_running(job, pod_id) for job in self._jobs.values()):
            return "running"
        return "idle" if worker.has_polled else "initializing"


def parse_object(raw: bytes) -> dict[str, Any]:
    """Read a JSON object that can be sent on as JSON: NaN and infinite numbers are refused. Raises ValueError."""
    try:
        parsed = json.loads(raw, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(parsed, dict):
        raise ValueError("not a JSON object")
    return parsed


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is no JSON number")
    return value
