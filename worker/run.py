"""One workflow, in as many prompts as it takes to get the files of *this* job, and all its pictures.

ComfyUI answers what it has computed before from its cache: "success", naming a file that the wipe removed, or, worse, a
name that another node has used again since. So every output node that nothing links from gets an input that no other
job has (the nonce), and runs; where that is not possible, or not enough, the prompt is sent once more.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Collection

from worker.comfyui import ComfyUI
from worker.control import JobControl
from worker.errors import ComfyUICrashed, ComfyUIUnavailable, ExecutionFailed, OutOfGpuMemory
from worker.follow import Progress, PromptRun, RunOutcome
from worker.payload import Workflow

log = logging.getLogger(__name__)

NONCE_INPUT = "__job_nonce"
MAX_PROMPTS = 6  # one that succeeds, and each of the reasons below once or twice


def run_workflow(
    comfyui: ComfyUI,
    workflow: Workflow,
    *,
    control: JobControl,
    on_progress: Callable[[Progress], None],
    interrupt_grace_s: float,
    discard_outputs: Callable[[], None],
    api_key: str | None = None,
) -> RunOutcome:
    """Run ``workflow`` to its end. Raises what `PromptRun.complete` does.

    ``discard_outputs`` removes what a prompt has saved, before the next one.
    """
    fresh = _free_output_nodes(comfyui, workflow)
    for prompts_left in reversed(range(MAX_PROMPTS)):
        run = PromptRun(
            comfyui,
            with_nonce(workflow, fresh),
            control=control,
            on_progress=on_progress,
            interrupt_grace_s=interrupt_grace_s,
            api_key=api_key,
        )
        try:
            outcome = run.complete()
        except ExecutionFailed as error:
            if NONCE_INPUT not in error.message or not prompts_left or not fresh:
                raise
            refusing = comfyui.note_nonce_refusal(str(error.details["node_type"]))
            fresh = {node_id for node_id in fresh if workflow[node_id]["class_type"] not in refusing}
            log.info("a node does not take the extra input; running again without it")
            discard_outputs()
            continue
        except OutOfGpuMemory:
            with contextlib.suppress(ComfyUIUnavailable, ComfyUICrashed):
                comfyui.free_memory()  # for the next job
            raise
        stale = _stale_nodes(outcome)
        if not prompts_left or not (stale or outcome.pictures_lost):
            if outcome.pictures_lost:
                outcome.warnings.append("The websocket to ComfyUI broke; pictures sent over it may be missing.")
            return outcome
        fresh = _refresh(comfyui, workflow, fresh, stale)
        discard_outputs()
    raise AssertionError  # the last round returns or raises


def with_nonce(workflow: Workflow, node_ids: Collection[str]) -> Workflow:
    """A copy in which these nodes have one input that no other prompt has.

    It must be a string (a list would be a link), and one value a prompt, so that equal output nodes stay one execution.
    """
    nonce = secrets.token_hex(4)
    return {
        node_id: {**node, "inputs": {**node["inputs"], NONCE_INPUT: nonce}} if node_id in node_ids else node
        for node_id, node in workflow.items()
    }


def _free_output_nodes(comfyui: ComfyUI, workflow: Workflow) -> set[str]:
    """The output nodes that nothing links from and that take the nonce.

    Not those with consumers: with a nonce, all that comes after them would run again in every job.
    """
    linked = {
        value[0]
        for node in workflow.values()
        for value in node["inputs"].values()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
    }
    return {
        node_id
        for node_id, node in workflow.items()
        if node_id not in linked
        and comfyui.is_output_class(node["class_type"])
        and comfyui.takes_nonce(node["class_type"])
    }


def _stale_nodes(outcome: RunOutcome) -> set[str]:
    """Nodes that did not run and yet name files: those of an earlier job."""
    return {
        node_id
        for node_id in outcome.cached & outcome.outputs.keys()
        for entries in outcome.outputs[node_id].values()
        if isinstance(entries, list)
        for entry in entries
        if isinstance(entry, dict) and "filename" in entry and entry.get("type") != "input"
    }


def _refresh(comfyui: ComfyUI, workflow: Workflow, fresh: set[str], stale: set[str]) -> set[str]:
    """Make sure that the stale nodes run in the next prompt: by the nonce, which costs what comes after them, else by
    an empty cache, which costs the whole workflow and unloads the models too. Returns the nodes for the nonce."""
    takers = {node_id for node_id in stale if comfyui.takes_nonce(workflow[node_id]["class_type"])}
    log.info("running again: %d nodes named files of an earlier job", len(stale))
    if takers != stale:
        comfyui.free_memory()
    return fresh | takers
