"""What the RunPod stand-in knows: the jobs and workers of one endpoint, and every change of state. It never waits."""

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

MAX_RETRIES = 1
LOST_ERROR = f"job timed out after {MAX_RETRIES} retries"
TIMEOUT_ERROR = "executionTimeout exceeded"
"""RunPod's own words, as clients have met them."""


class Status(StrEnum):
    """Where a job stands, in the words of the endpoint API."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


@dataclass(frozen=True)
class Terms:
    """How long an endpoint waits for what. The retentions are those of RunPod's documentation.

    RunPod does not say after how long without a ping a worker is lost: `lost_s` is ten pings of a stand-in's worker.
    A job that ran too long has been seen with both statuses that `timed_out` may have.
    """

    lost_s: float = 10.0
    retention_s: float = 30 * 60.0
    sync_retention_s: float = 60.0
    timed_out: Status = Status.TIMED_OUT


@dataclass(frozen=True)
class Policy:
    """What a client may say about one job; RunPod's defaults."""

    execution_timeout_s: float = 600.0
    ttl_s: float = 24 * 3600.0


@dataclass(eq=False)
class Job:
    """One job. Times are seconds of the platform's clock; `answer` is what its worker said: `output`, `error`, both.

    `chunks` are those of a generator handler that no client has read; `posted` is every result, progress update and
    chunk that arrived for the job, as it arrived, and `posted_bytes` their whole lengths.
    """

    id: str
    input: dict[str, Any]
    queued_at: float
    policy: Policy = field(default_factory=Policy)
    webhook: str | None = None
    status: Status = Status.IN_QUEUE
    retries: int = 0
    pod_id: str | None = None
    started_at: float = math.nan
    finished_at: float = math.nan
    answer: dict[str, Any] = field(default_factory=dict)
    chunks: list[Any] = field(default_factory=list)
    posted: list[bytes] = field(default_factory=list)
    posted_bytes: list[int] = field(default_factory=list)

    @property
    def is_final(self) -> bool:
        return self.status not in (Status.IN_QUEUE, Status.IN_PROGRESS)

    @property
    def has_ended(self) -> bool:
        """Whether its worker is done with it; a late progress update can make an ended job look as if it ran."""
        return not math.isnan(self.finished_at)

    @property
    def is_sync(self) -> bool:
        return self.id.startswith(SYNC_PREFIX)

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
        if self.retries:
            body["retries"] = self.retries
        return body | self.answer


@dataclass
class Worker:
    """One container, known from its requests. A lost one pings no more; a stopped one is given no more jobs."""

    seen_at: float
    pinged_at: float
    has_polled: bool = False
    is_healthy: bool = True
    is_stopped: bool = False
    stops: list[str] = field(default_factory=list)


class Platform:
    """Jobs and workers of one endpoint. Each method is one look or one change of state; none of them waits."""

    def __init__(self, terms: Terms | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._terms = terms or Terms()
        self._clock = clock
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._workers: dict[str, Worker] = {}
        self._to_tell: list[Job] = []

    def submit(
        self, job_input: dict[str, Any], *, sync: bool, policy: Policy | None = None, webhook: str | None = None
    ) -> Job:
        """Queue a new job."""
        job_id = f"{SYNC_PREFIX if sync else ''}{uuid.uuid4()}-u1"
        job = Job(job_id, job_input, self._clock(), policy or Policy(), webhook)
        self._jobs[job.id] = job
        self._enqueue(job)
        return job

    def job(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def describe(self, job: Job) -> dict[str, Any]:
        """The /status body of a job as of now."""
        return job.body(self._clock())

    def take(self, pod_id: str) -> Job | None:
        """Give the oldest queued job to a worker; a job is given again only when its worker is lost, or by /retry."""
        worker = self._worker(pod_id)
        if not self._queue or worker.is_stopped:
            return None
        job = self._queue.popleft()
        job.status, job.pod_id, job.started_at = Status.IN_PROGRESS, pod_id, self._clock()
        worker.pinged_at = job.started_at
        return job

    def progress(self, job: Job, pod_id: str, output: Any) -> None:
        """Keep a progress update, unless the job is over: the SDK sends each from a thread of its own, in any order."""
        if self._is_running(job, pod_id):
            job.answer = {"output": output}

    def reopen(self, job: Job, output: Any) -> None:
        """Let a progress update overtake the result, for a fault: the finished job shows as running again, for good."""
        job.status, job.answer = Status.IN_PROGRESS, {"output": output}

    def chunk(self, job: Job, pod_id: str, output: Any) -> None:
        """Keep a chunk of a generator handler for /stream."""
        if self._is_running(job, pod_id):
            job.chunks.append(output)

    def read_stream(self, job: Job) -> dict[str, Any]:
        """The /stream body: the chunks that no call before has got."""
        chunks, job.chunks = job.chunks, []
        return {"status": job.status, "stream": [{"output": chunk} for chunk in chunks]}

    def finish(self, job: Job, pod_id: str, answer: dict[str, Any]) -> None:
        """End a job with what its worker posted: FAILED when that names an error. Ignored when the job is over."""
        if self._is_running(job, pod_id):
            self._end(job, Status.FAILED if answer.get("error") else Status.COMPLETED, answer)

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not over: at once for the client, by job-stop for the worker that runs it."""
        if job.is_final:
            return
        if job.status is Status.IN_QUEUE:
            self._queue.remove(job)
        else:
            self._stop_on_worker(job)
        self._end(job, Status.CANCELLED, {})

    def retry(self, job: Job) -> bool:
        """Queue a job again under its id; False where it has neither failed nor timed out."""
        if job.status not in (Status.FAILED, Status.TIMED_OUT):
            return False
        job.queued_at, job.retries = self._clock(), 0
        self._enqueue(job)
        return True

    def purge(self) -> int:
        """Remove every job that waits; returns how many. /status no longer knows them."""
        removed = len(self._queue)
        for job in self._queue:
            del self._jobs[job.id]
        self._queue.clear()
        return removed

    def expire(self) -> bool:
        """Do what is due by the clock: lost workers, timeouts, ttl, retention. Returns whether anything changed."""
        now = self._clock()
        return any([self._expire_job(job, now) for job in list(self._jobs.values())])

    def stops_for(self, pod_id: str) -> list[str]:
        """Ids of cancelled or timed out jobs that this worker has not been told of yet."""
        worker = self._worker(pod_id)
        stops, worker.stops = worker.stops, []
        return stops

    def stop_again(self, pod_id: str, job_ids: list[str]) -> None:
        """Tell a worker once more to stop jobs, for a fault."""
        self._worker(pod_id).stops += job_ids

    def jobs_to_tell(self) -> list[Job]:
        """Jobs with a webhook that have ended since the last call."""
        jobs, self._to_tell = self._to_tell, []
        return jobs

    def saw(self, pod_id: str, *, polled: bool = False) -> None:
        """Note a request of a worker."""
        worker = self._worker(pod_id)
        worker.seen_at = self._clock()
        worker.has_polled |= polled

    def pinged(self, pod_id: str, status: str | None = None) -> None:
        """Note a ping; `status` is what it says (rp_fitness.py: "unhealthy" before the worker exits)."""
        worker = self._worker(pod_id)
        worker.seen_at = worker.pinged_at = self._clock()
        worker.is_healthy = status != "unhealthy"

    def stop_pod(self, pod_id: str) -> None:
        """Take a worker out of service, as its result asked for; a restarted one comes back under another id."""
        self._worker(pod_id).is_stopped = True

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
                "retried": sum(job.retries for job in self._jobs.values()),
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

    def _enqueue(self, job: Job) -> None:
        """Put a job at the end of the queue. One with an empty input reaches no worker: RunPod ends it as lost."""
        job.status, job.pod_id, job.answer, job.chunks = Status.IN_QUEUE, None, {}, []
        job.finished_at = math.nan
        if job.input:
            self._queue.append(job)
        else:
            job.started_at, job.retries = self._clock(), MAX_RETRIES
            self._end(job, Status.FAILED, {"error": LOST_ERROR})

    def _expire_job(self, job: Job, now: float) -> bool:
        """Whether the clock has changed something about this job."""
        if job.has_ended:
            retention_s = self._terms.sync_retention_s if job.is_sync else self._terms.retention_s
            if now - job.finished_at > retention_s:
                del self._jobs[job.id]
                return True
            return False
        if now - job.queued_at > job.policy.ttl_s:
            self._forget(job)
        elif job.status is Status.IN_QUEUE:
            return False
        elif now - job.started_at > job.policy.execution_timeout_s:
            self._stop_on_worker(job)
            self._end(job, self._terms.timed_out, {"error": TIMEOUT_ERROR})
        elif job.pod_id is not None and now - self._worker(job.pod_id).pinged_at > self._terms.lost_s:
            self._lose(job)
        else:
            return False
        return True

    def _forget(self, job: Job) -> None:
        """The ttl is over: /status answers 404 from now on, even if a worker is at it."""
        if job.status is Status.IN_QUEUE:
            self._queue.remove(job)
        else:
            self._stop_on_worker(job)
        del self._jobs[job.id]

    def _lose(self, job: Job) -> None:
        """The job's worker pings no more: queue the job again, once."""
        if job.retries < MAX_RETRIES:
            job.retries += 1
            self._enqueue(job)
        else:
            self._end(job, Status.FAILED, {"error": LOST_ERROR})

    def _end(self, job: Job, status: Status, answer: dict[str, Any]) -> None:
        job.status, job.answer, job.finished_at = status, answer, self._clock()
        if job.webhook is not None:
            self._to_tell.append(job)

    def _stop_on_worker(self, job: Job) -> None:
        assert job.pod_id is not None
        self._worker(job.pod_id).stops.append(job.id)

    def _worker(self, pod_id: str) -> Worker:
        now = self._clock()
        return self._workers.setdefault(pod_id, Worker(seen_at=now, pinged_at=now))

    def _is_running(self, job: Job, pod_id: str) -> bool:
        return job.status is Status.IN_PROGRESS and job.pod_id == pod_id and not job.has_ended

    def _state(self, pod_id: str) -> str:
        worker = self._workers[pod_id]
        if worker.is_stopped:
            return "stopped"
        if self._clock() - worker.seen_at > self._terms.lost_s:
            return "lost"
        if not worker.is_healthy:
            return "unhealthy"
        if any(self._is_running(job, pod_id) for job in self._jobs.values()):
            return "running"
        return "idle" if worker.has_polled else "initializing"
