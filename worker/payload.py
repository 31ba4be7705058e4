"""What goes in and what comes out: a job's input as typed values, a result as JSON that can be posted.

Nothing is touched before all of the input is understood.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any

from worker.errors import InputInvalid, WorkflowInvalid
from worker.graph import Workflow
from worker.input_files import InputFile, UrlInput, parse_files, refuse_duplicates
from worker.media import check_image
from worker.workflow_checks import check_chain, check_save_paths

KNOWN_KEYS = (
    *("workflow", "images", "files", "output_format", "output_quality"),
    *("debug", "timeout_s", "comfy_org_api_key"),
)
OUTPUT_FORMATS = ("png", "webp", "jpeg")
MAX_NAMED_KEYS = 20  # a result with a sentence for each of a million unknown keys could not be posted
MAX_NESTING = 100  # ComfyUI walks inputs by recursion, which Python ends at 1,000; real ones have some 10 levels
MAX_ID_CHARS = 200  # of a node's id and its class, which failures and progress repeat
MAX_CLASSES = 1000  # each is looked up in ComfyUI once
MAX_TIMEOUT_S = 604_800  # RunPod's own upper bound for executionTimeout: 7 days
_EXPORT = "send the graph that ComfyUI's Workflow > Export (API) gives"


@dataclass(frozen=True)
class OutputFormat:
    """The format that a job wants its pictures in: ``name`` is one of OUTPUT_FORMATS, ``quality`` 1 to 100 or None."""

    name: str
    quality: int | None = None


@dataclass(frozen=True)
class JobRequest:
    """A job input that has been checked. ``warnings`` are sentences for the result."""

    workflow: Workflow
    files: tuple[InputFile, ...]
    urls: tuple[UrlInput, ...]
    debug: bool
    timeout_s: float | None
    comfy_org_api_key: str | None
    output_format: OutputFormat | None
    warnings: tuple[str, ...]


def parse_job_input(job_input: object, *, allow_urls: bool = False) -> JobRequest:
    """Check ``job["input"]`` as a whole; of URLs their form.

    Raises InputInvalid, WorkflowInvalid or MediaInvalid with one sentence that says what to change.
    """
    if not isinstance(job_input, dict):
        raise InputInvalid('The input must be an object such as {"workflow": {...}}.')
    _refuse_deep_nesting(job_input)
    warnings = _unknown_key_warnings(job_input)
    workflow = _parse_workflow(job_input)
    images = parse_files(job_input.get("images"), "images", allow_urls)
    for image in images:
        if isinstance(image, InputFile):
            check_image(image.name, image.data)
    files = images + parse_files(job_input.get("files"), "files", allow_urls)
    refuse_duplicates(files)
    return JobRequest(
        workflow=workflow,
        files=tuple(file for file in files if isinstance(file, InputFile)),
        urls=tuple(file for file in files if isinstance(file, UrlInput)),
        debug=_parse_flag(job_input, "debug"),
        timeout_s=_parse_timeout(job_input.get("timeout_s")),
        comfy_org_api_key=_parse_key(job_input.get("comfy_org_api_key")),
        output_format=_parse_output_format(job_input.get("output_format"), job_input.get("output_quality")),
        warnings=tuple(warnings),
    )


def _refuse_deep_nesting(job_input: dict[Any, Any]) -> None:
    """Level by level: what walks it later may use recursion."""
    level: list[Any] = [job_input]
    for _ in range(MAX_NESTING):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    if level:
        raise InputInvalid(f"The input is nested too deeply; it may have {MAX_NESTING} levels.")


def _unknown_key_warnings(job_input: dict[Any, Any]) -> list[str]:
    unknown = [str(key)[:80] for key in job_input if key not in KNOWN_KEYS]
    warnings = []
    for key in unknown[:MAX_NAMED_KEYS]:
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        if near == ["workflow"] and "workflow" not in job_input:
            raise InputInvalid(f"The input has no 'workflow', but a key {key!r}{hint}")
        warnings.append(f"The input key {key!r} is unknown and was ignored{hint}")
    if len(unknown) > MAX_NAMED_KEYS:
        warnings.append(f"{len(unknown) - MAX_NAMED_KEYS} more unknown input keys were ignored.")
    return warnings


# --- the workflow ----------------------------------------------------------------------------------------------------


def _parse_workflow(job_input: dict[Any, Any]) -> Workflow:
    workflow = job_input.get("workflow")
    if workflow is None:
        raise WorkflowInvalid(_where_the_workflow_is(job_input))
    if isinstance(workflow, str):
        raise WorkflowInvalid("'workflow' is a string; send the JSON object itself, not its text.")
    if not isinstance(workflow, dict):
        kind = "a list" if isinstance(workflow, list) else "a single value"
        raise WorkflowInvalid(f"'workflow' must be a JSON object {{node_id: node}}, not {kind}; {_EXPORT}.")
    if isinstance(workflow.get("input"), dict) and "class_type" not in workflow["input"]:
        raise WorkflowInvalid("'workflow' holds a whole request; send what stands under its 'input' as the input.")
    for wrapper in ("prompt", "workflow"):
        inner = workflow.get(wrapper)
        if isinstance(inner, dict) and "class_type" not in inner:
            workflow = inner
            break
    if isinstance(workflow.get("nodes"), list):
        raise WorkflowInvalid(
            "This is a workflow in ComfyUI's UI format (it has 'nodes' and 'links'); "
            "export it with Workflow > Export (API) and send that file."
        )
    if not workflow:
        raise WorkflowInvalid(f"'workflow' is empty; it must hold at least one node: {_EXPORT}.")
    for node_id, node in workflow.items():
        _check_node(node_id, node)
    if (count := len({node["class_type"] for node in workflow.values()})) > MAX_CLASSES:
        raise WorkflowInvalid(f"The workflow has nodes of {count} classes; it may have {MAX_CLASSES}.")
    check_chain(workflow)
    check_save_paths(workflow)
    return workflow


def _where_the_workflow_is(job_input: dict[Any, Any]) -> str:
    """The sentence for an input without a workflow: people send it in other wrappings, or in none."""
    if isinstance(job_input.get("input"), dict):
        return "The input holds another 'input'; send what stands under it as the input."
    if isinstance(job_input.get("prompt"), dict):
        return "The input has a 'prompt' and no 'workflow'; send the graph under 'workflow'."
    if isinstance(job_input.get("nodes"), list):
        return f"The input is a workflow in ComfyUI's UI format; {_EXPORT}, and send it under 'workflow'."
    if any(isinstance(node, dict) and "class_type" in node for node in job_input.values()):
        return 'The input is the workflow itself; send it as {"workflow": {...}}.'
    return f"The input has no 'workflow'; {_EXPORT}."


def _check_node(node_id: object, node: object) -> None:
    shown = str(node_id)[:80]
    if not isinstance(node, dict) or not isinstance(node.get("class_type"), str) or not node["class_type"]:
        raise WorkflowInvalid(f"Node {shown!r} of the workflow has no 'class_type'; is this the API format?")
    if len(str(node_id)) > MAX_ID_CHARS or len(node["class_type"]) > MAX_ID_CHARS:
        raise WorkflowInvalid(f"Node {shown!r} has an id or a class of more than {MAX_ID_CHARS} characters.")
    if not isinstance(node.get("inputs"), dict):
        raise WorkflowInvalid(f"Node {shown!r} of the workflow has no 'inputs' object.")


# --- the rest --------------------------------------------------------------------------------------------------------


def _parse_flag(job_input: dict[Any, Any], key: str) -> bool:
    value = job_input.get(key)
    if value is not None and not isinstance(value, bool):
        raise InputInvalid(f"'{key}' must be true or false.")
    return bool(value)


def _parse_timeout(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputInvalid("'timeout_s' must be a number of seconds.")
    if not 0 < value <= MAX_TIMEOUT_S:  # also true for NaN
        raise InputInvalid(f"'timeout_s' must be above 0 and at most {MAX_TIMEOUT_S}.")
    return float(value)


def _parse_key(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputInvalid("'comfy_org_api_key' must be a string.")
    return value or None


def _parse_output_format(name: object, quality: object) -> OutputFormat | None:
    if name is not None and name not in OUTPUT_FORMATS:
        raise InputInvalid(f"'output_format' must be one of {', '.join(OUTPUT_FORMATS)}.")
    if quality is None:
        return None if name is None else OutputFormat(str(name))
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise InputInvalid("'output_quality' must be a whole number from 1 to 100.")
    if name not in ("webp", "jpeg"):
        raise InputInvalid("'output_quality' goes with the 'output_format' webp or jpeg only: PNG loses nothing.")
    return OutputFormat(str(name), quality)


# --- the result ------------------------------------------------------------------------------------------------------


def json_safe(value: Any) -> Any:
    """``value`` without what the SDK cannot post: a lone surrogate (nothing is posted at all) and NaN (invalid JSON).

    Measured with runpod 1.12.0, which serialises with ``json.dumps(..., ensure_ascii=False)``.
    """
    if isinstance(value, str):  # isascii is a flag of the string: megabytes of Base64 cost nothing here
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {json_safe(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value
