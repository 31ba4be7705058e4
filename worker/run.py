"""One workflow, in as many prompts as it takes to get the files of *this* job, and all its pictures.

ComfyUI answers what it has computed before from its cache: "success", naming a file that the wipe removed, or, worse, a
name that another node has used again since. So every output node that nothing links from gets an input that no other
job has (the nonce), and runs; where that is not possible, or not enough, the prompt is sent once more. What the nonce
does not reach comes from the cache again, so that costs little, and the models stay where they are.
"""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
from collections.abc import Callable, Collection, Iterable

from worker.comfyui import ComfyUI
from worker.control import JobControl
from worker.errors import ExecutionFailed, OutOfGpuMemory, WorkerError
from worker.follow import Progress, PromptRun, RunOutcome
from worker.graph import Workflow, sources_of, upstream_of
from worker.outputs import lost_models, named_files
from worker.ramdisk import RamDisk

log = logging.getLogger(__name__)

NONCE_INPUT = "__job_nonce"
MAX_STALE = 3  # prompts for want of this job's files; the wish for an empty cache may come a prompt late
MAX_LOST_PICTURES = 1
MAX_MISSING_FILES = 1
_OUR_FOLDERS = re.compile(r"[/\\](temp|output)[/\\]")


def run_workflow(
    comfyui: ComfyUI,
    workflow: Workflow,
    *,
    control: JobControl,
    on_progress: Callable[[Progress], None],
    interrupt_grace_s: float,
    ramdisk: RamDisk,
    api_key: str | None = None,
) -> RunOutcome:
    """Run ``workflow`` to its end. Raises what `PromptRun.complete` does.

    What a prompt has saved on the ``ramdisk`` is removed before the next one.
    """
    plan = _Plan(comfyui, workflow, ramdisk)
    while True:
        run = PromptRun(
            comfyui,
            with_nonce(workflow, plan.fresh),
            control=control,
            on_progress=on_progress,
            interrupt_grace_s=interrupt_grace_s,
            api_key=api_key,
        )
        try:
            outcome = run.complete()
        except ExecutionFailed as error:
            if not plan.mends(error, run.cached):
                raise
        except OutOfGpuMemory:
            with contextlib.suppress(WorkerError):
                comfyui.free_memory()  # for the next job
            raise
        else:
            if not plan.improves(outcome):
                return outcome
        ramdisk.wipe(("output", "temp"))


def with_nonce(workflow: Workflow, node_ids: Collection[str]) -> Workflow:
    """A copy in which these nodes have one input that no other prompt has.

    It must be a string (a list would be a link), and one value a prompt, so that equal output nodes stay one execution.
    """
    nonce = secrets.token_hex(4)
    return {
        node_id: {**node, "inputs": {**node["inputs"], NONCE_INPUT: nonce}} if node_id in node_ids else node
        for node_id, node in workflow.items()
    }


class _Plan:
    """Which nodes of a workflow have to run in its next prompt (``fresh``), and whether there is to be one."""

    def __init__(self, comfyui: ComfyUI, workflow: Workflow, ramdisk: RamDisk) -> None:
        self._comfyui = comfyui
        self._workflow = workflow
        self._ramdisk = ramdisk
        self._stale_left = MAX_STALE
        self._pictures_left = MAX_LOST_PICTURES
        self._files_left = MAX_MISSING_FILES
        linked = {source for node_id in workflow for source in sources_of(workflow, node_id)}
        # Not those that others link from: with a nonce, all that comes after them would run again in every job.
        self.fresh = {
            node_id
            for node_id, node in workflow.items()
            if node_id not in linked and comfyui.is_output_class(node["class_type"]) and self._takes_nonce(node_id)
        }

    def mends(self, error: ExecutionFailed, cached: frozenset[str]) -> bool:
        """Whether the failure is of our making and the next prompt is without it."""
        node_id, kind = str(error.details["node_id"]), str(error.details["exception_type"])
        message = str(error.details["exception_message"])
        if kind == "TypeError" and NONCE_INPUT in message and node_id in self.fresh:
            # A strict signature behind "takes any input".
            self._comfyui.note_nonce_refusal(self._workflow[node_id]["class_type"])
            self.fresh = {fresh for fresh in self.fresh if self._takes_nonce(fresh)}
            log.info("running again: a node does not take the extra input")
            return True
        if kind.endswith("FileNotFoundError") and _OUR_FOLDERS.search(message) and self._files_left:
            return self._makes_again([node_id], cached)
        return False

    def improves(self, outcome: RunOutcome) -> bool:
        """Whether the outcome is not what it should be and another prompt can help."""
        stale = {output.node_id for output in named_files(outcome, self._ramdisk)} & outcome.cached
        if stale and self._stale_left:
            self._stale_left -= 1
            for node_id in stale:
                self._refresh(node_id)
            log.info("running again: %d nodes named files of an earlier job", len(stale))
            return True
        lost = lost_models(outcome, self._ramdisk)
        if lost and self._files_left and self._makes_again(lost, outcome.cached):
            return True
        if outcome.pictures_lost and self._pictures_left:
            self._pictures_left -= 1
            log.info("running again: pictures may have been lost with the websocket")
            return True
        if outcome.pictures_lost:
            outcome.warnings.append("The websocket to ComfyUI broke; pictures sent over it may be missing.")
        return False

    def _makes_again(self, node_ids: Iterable[str], cached: Collection[str]) -> bool:
        """A cached node has handed on the path of a file that the wipe removed to these: have it run."""
        upstream = upstream_of(self._workflow, node_ids)
        makers = {maker for maker in upstream.intersection(cached) if self._takes_nonce(maker)}
        if makers:
            self._files_left -= 1
            self.fresh |= makers
            log.info("running again: %d cached nodes, one of which had made a file", len(makers))
        return bool(makers)

    def _refresh(self, node_id: str) -> None:
        """Have a node run in the next prompt: by its own nonce, by that of one that it links from, else by an empty
        cache, which costs the whole workflow and unloads the models too."""
        candidates = [node_id, *sources_of(self._workflow, node_id)]
        able = [candidate for candidate in candidates if self._takes_nonce(candidate)]
        if able:
            self.fresh.add(able[0])
        else:
            self._comfyui.free_memory()

    def _takes_nonce(self, node_id: str) -> bool:
        return self._comfyui.takes_nonce(self._workflow[node_id]["class_type"])
