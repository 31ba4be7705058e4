"""What ComfyUI says went wrong, as our errors: a refused workflow (POST /prompt), a node that raised (the history).

The shapes were recorded from 0.18.1, 0.3.75 and 0.3.64: `invalid_prompts.json` and `err_*.json`.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

from worker.errors import (
    ComfyUICrashed,
    ComfyUIUnavailable,
    ExecutionFailed,
    GpuBroken,
    JobCancelled,
    OutOfGpuMemory,
    PromptRejected,
    RamDiskFull,
    WorkerError,
)
from worker.graph import Workflow, shown_node, title_of

MAX_SHOWN_CHARS = 500
MAX_SENTENCES = 20  # a workflow can have 100,000 nodes, and a failure has RunPod's size limit too
MAX_TRACEBACK_LINES = 8
MAX_MESSAGE_CHARS = 4000
MAX_CHOICES = 5
MIN_LIKENESS = 0.5
# ENOSPC in the words of libc, which Python, Rust (safetensors) and FFmpeg repeat; Python adds a path where it has one.
_NO_SPACE = re.compile(r"No space left on device(?:: '(?P<path>[^']*)')?")
_OUR_FOLDERS = re.compile(r"/(input|output|temp|user)(/|$)")
MIN_PRIVATE_CHARS = 8  # shorter values of a workflow ("euler", "a.png") are words of any traceback

ModelNote = Callable[[str], str | None]
"""What the worker knows of a model file by its name; None: nothing."""
Choices = Callable[[str, str], list[str] | None]
"""What an input of a class (class, input) lets one choose from; None: not known. May raise as a request does."""


# --- a refused workflow ----------------------------------------------------------------------------------------------


class Refusals:
    """ComfyUI's refusals as sentences, with what helps to mend the workflow."""

    def __init__(self, model_note: ModelNote, choices: Choices) -> None:
        self._model_note = model_note
        self._choices = choices

    def rejection(self, status: int, content: Any) -> PromptRejected:
        """A refused workflow; ``content`` is the parsed body of the answer, None where that was no JSON."""
        error = content.get("error") if isinstance(content, dict) else None
        if not isinstance(error, dict):
            reason = "it is larger than ComfyUI takes." if status == 413 else "is it in API format?"
            return PromptRejected(f"ComfyUI refused the workflow with status {status}; {reason}", status=status)
        node_errors = content.get("node_errors")
        # For a fault of an upstream node, error.details is empty and only node_errors tell what is wrong.
        sentences = self.node_sentences(node_errors) or [_whole_sentence(error)]
        return PromptRejected(
            "ComfyUI refused the workflow: " + " ".join(sentences),
            type=error.get("type"),
            node_errors=_trimmed(node_errors),
        )

    def node_sentences(self, node_errors: Any) -> list[str]:
        """A sentence for each fault of each node, at most MAX_SENTENCES and one that counts the rest."""
        if not isinstance(node_errors, dict):
            return []
        faults = [(node_id, node, error) for node_id, node in node_errors.items() for error in node.get("errors", [])]
        sentences = [
            f"Node {node_id} ({node.get('class_type')}): {self._fault_sentence(str(node.get('class_type')), error)}"
            for node_id, node, error in faults[:MAX_SENTENCES]
        ]
        if len(faults) > MAX_SENTENCES:
            sentences.append(f"{len(faults) - MAX_SENTENCES} more faults are not listed.")
        return sentences

    def _fault_sentence(self, class_type: str, error: dict[str, Any]) -> str:
        extra = error.get("extra_info")
        if error.get("type") != "value_not_in_list" or not isinstance(extra, dict):
            return joined(error.get("message"), error.get("details"))
        value, input_name = str(extra.get("received_value")), str(extra.get("input_name"))
        choices = None
        # Asked for: of more than 20 choices, the refusal itself has none (execution.py, 0.18.1 and 0.3.64).
        with contextlib.suppress(ComfyUIUnavailable, ComfyUICrashed):
            choices = self._choices(class_type, input_name)
        sentence = f"{input_name} is {value!r}, which ComfyUI does not have{_offer(value, choices)}."
        note = self._model_note(value)
        return sentence[:MAX_SHOWN_CHARS] + (f" {note}" if note else "")


def _offer(value: str, choices: list[str] | None) -> str:
    """The choices nearest to ``value``, by the file's name alone where it stands in a folder."""
    if choices is None:
        return ""
    if not choices:
        return "; it has nothing to choose from there"
    by_name = {choice.rpartition("/")[2].casefold(): choice for choice in reversed(choices)}
    wanted = value.rpartition("/")[2].casefold()
    near = difflib.get_close_matches(wanted, by_name, n=MAX_CHOICES, cutoff=MIN_LIKENESS)
    if near:
        return "; the nearest it has: " + ", ".join(repr(by_name[name]) for name in near)
    more = f" and {len(choices) - MAX_CHOICES} more" if len(choices) > MAX_CHOICES else ""
    return "; it has: " + ", ".join(map(repr, choices[:MAX_CHOICES])) + more


def _whole_sentence(error: dict[str, Any]) -> str:
    """For a refusal that names no node of its own."""
    if error.get("type") == "prompt_outputs_failed_validation":  # not a word more for a cycle (0.18.1, 0.3.64)
        return "None of its outputs is valid; do its links form a cycle?"
    message, details = str(error.get("message")), error.get("details")
    class_type = (error.get("extra_info") or {}).get("class_type")
    if class_type and class_type not in message:  # 0.18.1 names an unknown node by its title
        details = f"{details}, class {class_type}"
    return joined(message, details)


def joined(message: Any, details: Any) -> str:
    text = f"{str(message).rstrip('.')}: {details}" if details else str(message)
    return text[:MAX_SHOWN_CHARS].rstrip(".") + "."


def _trimmed(node_errors: Any) -> dict[str, Any]:
    """``node_errors`` without ``extra_info``, which repeats every choice of an input (hundreds of model names)."""
    if not isinstance(node_errors, dict):
        return {}
    return {
        node_id: {
            "class_type": node.get("class_type"),
            "errors": [
                {key: str(error.get(key))[:MAX_SHOWN_CHARS] for key in ("type", "message", "details")}
                for error in node.get("errors", [])[:MAX_SENTENCES]
            ],
        }
        for node_id, node in list(node_errors.items())[:MAX_SENTENCES]
    }


# --- a node that raised ----------------------------------------------------------------------------------------------


def failure_of(status: dict[str, Any], workflow: Workflow, secrets: Iterable[str]) -> WorkerError | None:
    """The failure that a history record's ``status`` tells of; None for a success.

    ``secrets`` are masked wherever they stand, the workflow's own texts in the traceback; but for the shortest of them.
    """
    messages = {kind: data for kind, data in status.get("messages", [])}
    # A cycle that comes up in the run is an error in a record whose status says success (0.18.1, execution.py).
    if "execution_error" not in messages:
        was_stopped = status.get("status_str") == "error"
        return JobCancelled("The workflow was interrupted in ComfyUI.") if was_stopped else None
    error, secrets = messages["execution_error"], [word for word in secrets if len(word) >= MIN_PRIVATE_CHARS]
    kind = str(error.get("exception_type"))
    message = _masked(str(error.get("exception_message")).strip(), secrets)[:MAX_MESSAGE_CHARS]
    title = title_of(workflow, error.get("node_id"))
    where = shown_node(error.get("node_id"), title, error.get("node_type"))
    details = {
        "node_id": error.get("node_id"),
        "node_type": error.get("node_type"),
        "node_title": title,
        "exception_type": kind,
        "exception_message": message,
        "traceback": _short_traceback(error.get("traceback"), [*secrets, *_texts(workflow)]),
    }
    if kind.endswith("OutOfMemoryError") or "CUDA error: out of memory" in message:
        return OutOfGpuMemory(
            f"{where} ran out of GPU memory; use a smaller picture or batch, or a larger GPU.", **details
        )
    if "CUDA error:" in message:  # sticky: every later CUDA call of the process fails too (CUDA runtime documentation)
        return GpuBroken(f"{where} met a GPU fault; this worker is being replaced, send the job again.", **details)
    if (full := _NO_SPACE.search(message)) and (full["path"] is None or _OUR_FOLDERS.search(full["path"])):
        # Without the node's title: this sentence goes into the log.
        told = "The RAM disk ran full during the run; use smaller or fewer pictures, or give the container a larger "
        return RamDiskFull(f"{told}/dev/shm (--shm-size).", **details)
    first_line = message.partition("\n")[0][:MAX_SHOWN_CHARS]
    return ExecutionFailed(f"{where} failed: {kind}: {first_line}", **details)


def _short_traceback(traceback: Any, private: list[str]) -> list[str]:
    lines = "".join(map(str, traceback or [])).splitlines()[-MAX_TRACEBACK_LINES:]
    return [_masked(line, private)[:MAX_SHOWN_CHARS] for line in lines]


def _texts(workflow: Workflow) -> list[str]:
    """The strings that the caller wrote into the workflow, but for the shortest."""
    return [
        value
        for node in workflow.values()
        for value in node["inputs"].values()
        if isinstance(value, str) and len(value) >= MIN_PRIVATE_CHARS
    ]


def _masked(text: str, private: Iterable[str]) -> str:
    for word in private:
        text = text.replace(word, "***")
    return text
