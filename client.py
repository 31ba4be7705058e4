#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["requests", "Pillow", "tqdm"]
# ///
"""Runs a ComfyUI workflow on a RunPod Serverless endpoint and saves what it makes.

One file that works on its own: `uv run client.py ...`, or any Python with requests, Pillow and tqdm.
It reads in order: workflow, injection, endpoint, saving, command line. Saved paths and texts of the result go to
stdout, everything else to stderr. The three packages are imported where they are used, so that --help is quick.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import itertools
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TextIO, TypeGuard
from urllib.parse import quote, urlsplit

if TYPE_CHECKING:
    import requests

DEFAULT_URL = "https://api.runpod.ai/v2"
RUN_LIMIT_BYTES = 10_000_000  # RunPod's limit for the body of /run (docs.runpod.io: 10 MB)
MIN_EXECUTION_TIMEOUT_MS = 5_000  # RunPod takes 5 s to 7 days
MAX_TIMEOUT_S = 86_400  # a job's time to live on RunPod, unless its request says otherwise

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
CANCEL_TIMEOUT_S = 10
DOWNLOAD_LIMIT_S = 600
SILENCE_LIMIT_S = 120  # without one usable answer for this long, following a job is given up
FIRST_POLL_S = 0.1
LAST_POLL_S = 5.0
POLL_GROWTH = 1.5


class ExitCode(IntEnum):
    """How the program ends; --help lists the same."""

    SAVED = 0
    JOB_FAILED = 1
    BAD_INPUT = 2
    PLATFORM = 3
    TIMED_OUT = 4
    INTERRUPTED = 130


class ClientError(Exception):
    """A failure that the user is told about in one sentence.

    ClientError
    ├── InputError      the command line, a workflow or a picture has to change
    ├── JobFailed       the job ended without a usable result, or an item of it could not be saved
    ├── JobTimedOut     the time for the job is over
    └── PlatformError   RunPod or the network
        ├── NotFound    the endpoint or the job is not there
        └── Unreachable no usable answer this time; asking again may help
    """

    exit_code = ExitCode.JOB_FAILED


class InputError(ClientError):
    exit_code = ExitCode.BAD_INPUT


class JobFailed(ClientError):
    exit_code = ExitCode.JOB_FAILED


class JobTimedOut(ClientError):
    exit_code = ExitCode.TIMED_OUT


class PlatformError(ClientError):
    exit_code = ExitCode.PLATFORM


class NotFound(PlatformError):
    """HTTP 404."""


class Unreachable(PlatformError):
    """`busy` is HTTP 429: the request was understood and not acted on. `retry_after_s` is 0 where none was named."""

    def __init__(self, message: str, *, busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.busy = busy
        self.retry_after_s = retry_after_s


def say(message: str) -> None:
    """Prints one line for a person, on stderr."""
    print(message, file=sys.stderr, flush=True)


def one_line(value: object, limit_chars: int = 600) -> str:
    """Text from elsewhere as one printable line: a server must not be able to steer the terminal."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit_chars else text[: limit_chars - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# Workflow: what a file holds, and how its nodes are named and linked
# ---------------------------------------------------------------------------------------------------------------------

Node = dict[str, Any]
Workflow = dict[str, Node]

EXPORT_HINT = "export it in ComfyUI with Workflow > Export (API)"


def read_workflow(path: Path) -> Workflow:
    """The workflow in a JSON file. Raises InputError, also for a file that is not JSON at all."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"the workflow {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the workflow {path} is not JSON: {one_line(error, 120)}") from error
    return parse_workflow(document)


def parse_workflow(document: object) -> Workflow:
    """The API-format workflow in a document, also wrapped as {"prompt"}, {"workflow"} or {"input": {"workflow"}}.

    Raises InputError; for the UI format (`nodes` and `links`) it says how to export.
    """
    while isinstance(document, dict):
        if isinstance(document.get("nodes"), list):
            raise InputError(f"this workflow is in ComfyUI's UI format; {EXPORT_HINT}")
        if document and all(is_node(node) for node in document.values()):
            return document
        inner = next((document[key] for key in ("input", "workflow", "prompt") if key in document), None)
        if inner is None:
            break
        document = inner
    raise InputError(f"this is not a workflow in API format (node ids, each with class_type and inputs); {EXPORT_HINT}")


def is_node(value: object) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs"), dict)
    )


def natural_key(node_id: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts node ids as a person reads them: "9" < "10" < "57:8" < "57:12"; words come after numbers."""
    return tuple(_part_key(part) for part in node_id.split(":"))


def _part_key(part: str) -> tuple[int, int, str]:
    if part.isascii() and part.isdigit():
        digits = part.lstrip("0")
        return (0, len(digits), digits)  # compares as the number does, without int()'s limit of 4300 digits
    return (1, 0, part)


def is_linked(value: object) -> bool:
    """ComfyUI takes every list for a link (execution.py `validate_inputs`, 0.3.64)."""
    return isinstance(value, list)


def source_of(workflow: Workflow, value: object) -> str | None:
    """The node that a link [node_id, output index] comes from; None for a plain value or a dangling link."""
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in workflow:
        return value[0]
    return None


def label(workflow: Workflow, node_id: str) -> str:
    """A node as a person finds it in ComfyUI: `3 "Load Image" (LoadImage)`."""
    node = workflow[node_id]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    quoted = f' "{one_line(title, 60)}"' if isinstance(title, str) and title else ""
    return f"{one_line(node_id, 40)}{quoted} ({one_line(node['class_type'], 60)})"


def labels(workflow: Workflow, node_ids: Iterable[str]) -> str:
    return ", ".join(label(workflow, node_id) for node_id in sorted(node_ids, key=natural_key))


# ---------------------------------------------------------------------------------------------------------------------
# Injection: pure functions that say what to change; apply_changes makes the changed copy
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One input that gets a new value."""

    node_id: str
    input_name: str
    value: str | int


def apply_changes(workflow: Workflow, changes: Iterable[Change]) -> Workflow:
    """A copy with the changes made; the workflow given stays as it is."""
    changed = dict(workflow)
    for change in changes:
        node = changed[change.node_id]
        changed[change.node_id] = {**node, "inputs": {**node["inputs"], change.input_name: change.value}}
    return changed


def plan_images(workflow: Workflow, names: Sequence[str]) -> list[Change]:
    """The names of the sent images, one for each LoadImage node, lowest node id first.

    A node whose image comes by link is left alone. Raises InputError unless there are as many images as nodes: the
    worker starts every job with an empty input folder, so a node that keeps its file would not find it.
    """
    free = [
        node_id
        for node_id, node in workflow.items()
        if node["class_type"] == "LoadImage" and not is_linked(node["inputs"].get("image"))
    ]
    free.sort(key=natural_key)
    if len(names) != len(free):
        where = (
            f"takes {_count(len(free), 'image')}: {labels(workflow, free)}" if free else "has no free LoadImage node"
        )
        raise InputError(f"--img gives {_count(len(names), 'image')}, but the workflow {where}")
    return [Change(node_id, "image", name) for node_id, name in zip(free, names, strict=True)]


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}" if number == 1 else f"{number or 'no'} {noun}s"


# Where each text encoder of ComfyUI keeps its words (nodes.py and comfy_extras/nodes_qwen.py, 0.3.64).
TEXT_INPUTS = {
    "CLIPTextEncode": "text",
    "TextEncodeQwenImageEdit": "prompt",
    "TextEncodeQwenImageEditPlus": "prompt",
}
STRING_PRIMITIVES = {"PrimitiveString": "value", "PrimitiveStringMultiline": "value"}
OPPOSITE = {"positive": "negative", "negative": "positive"}

Place = tuple[str, str]  # node id, input name


def plan_text(workflow: Workflow, text: str, role: str = "positive") -> list[Change]:
    """The one place where the text of `role` ("positive" or "negative") lives, found by tracing the graph.

    Raises InputError where no place, or more than one, feeds only this role: guessing could overwrite the other text.
    """
    encoders = encoders_reached(workflow, role)
    if role == "positive" and not _has_roles(workflow):
        encoders = {node_id for node_id, node in workflow.items() if node["class_type"] in TEXT_INPUTS}
    wanted = {_text_place(workflow, encoder) for encoder in encoders}
    untouchable = _text_nodes(workflow, encoders_reached(workflow, OPPOSITE[role]))
    candidates = {place for place in wanted if place[0] not in untouchable}
    if len(candidates) == 1:
        node_id, input_name = candidates.pop()
        if is_linked(workflow[node_id]["inputs"].get(input_name)):
            raise InputError(_linked_text_message(workflow, node_id, input_name))
        return [Change(node_id, input_name, text)]
    if candidates:
        found = labels(workflow, {node_id for node_id, _ in candidates})
        raise InputError(f"the {role} text could go into several nodes and nothing tells them apart: {found}")
    if wanted:
        found = labels(workflow, {node_id for node_id, _ in wanted})
        raise InputError(f"the {role} text is also the {OPPOSITE[role]} one, in {found}; give each its own node")
    raise InputError(f"no text encoder feeds a {role} input; the known ones are {', '.join(TEXT_INPUTS)}")


def encoders_reached(workflow: Workflow, role: str) -> set[str]:
    """The known text encoders upstream of every `role` input, through conditioning nodes."""
    pending = [
        source for node in workflow.values() if (source := source_of(workflow, node["inputs"].get(role))) is not None
    ]
    found: set[str] = set()
    seen: set[str] = set()
    while pending:
        node_id = pending.pop()
        if node_id in seen:
            continue
        seen.add(node_id)
        class_type = workflow[node_id]["class_type"]
        if class_type in TEXT_INPUTS:
            found.add(node_id)
        elif class_type != "ConditioningZeroOut":  # its output does not depend on the text (nodes.py, 0.3.64)
            pending += _conditioning_sources(workflow, node_id, role)
    return found


def _conditioning_sources(workflow: Workflow, node_id: str, role: str) -> list[str]:
    """Where a node's conditioning comes from. A node with both roles (ControlNetApplyAdvanced) keeps them apart."""
    sources = {
        name: source
        for name, value in workflow[node_id]["inputs"].items()
        if (source := source_of(workflow, value)) is not None
    }
    if role in sources:
        return [sources[role]]
    conditioning = [source for name, source in sources.items() if "cond" in name]
    return conditioning or [source for name, source in sources.items() if name != OPPOSITE[role]]


def _text_place(workflow: Workflow, encoder: str) -> Place:
    """The input that holds an encoder's words: a string primitive's where one is linked, else the encoder's own."""
    input_name = TEXT_INPUTS[workflow[encoder]["class_type"]]
    source = source_of(workflow, workflow[encoder]["inputs"].get(input_name))
    if source is not None and workflow[source]["class_type"] in STRING_PRIMITIVES:
        return source, STRING_PRIMITIVES[workflow[source]["class_type"]]
    return encoder, input_name


def _text_nodes(workflow: Workflow, encoders: Iterable[str]) -> set[str]:
    """The encoders and every node that has a part in their words."""
    nodes = set(encoders)
    pending = [workflow[encoder]["inputs"].get(TEXT_INPUTS[workflow[encoder]["class_type"]]) for encoder in nodes]
    while pending:
        source = source_of(workflow, pending.pop())
        if source is not None and source not in nodes:
            nodes.add(source)
            pending += workflow[source]["inputs"].values()
    return nodes


def _has_roles(workflow: Workflow) -> bool:
    return any(is_linked(node["inputs"].get(role)) for node in workflow.values() for role in OPPOSITE)


def _linked_text_message(workflow: Workflow, node_id: str, input_name: str) -> str:
    source = source_of(workflow, workflow[node_id]["inputs"][input_name])
    origin = label(workflow, source) if source is not None else "a node that is not in the workflow"
    return f"the text of {label(workflow, node_id)} comes by link from {origin}, which is no plain string node"


def plan_seeds(workflow: Workflow, draw: Callable[[], int]) -> list[Change]:
    """A new value for every `seed` and `noise_seed` that is a number and not linked; one draw for each."""
    return [
        Change(node_id, input_name, draw())
        for node_id in sorted(workflow, key=natural_key)
        for input_name in ("seed", "noise_seed")
        if type(workflow[node_id]["inputs"].get(input_name)) is int
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Endpoint: one job on RunPod's HTTP API
# ---------------------------------------------------------------------------------------------------------------------

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
TIMEOUT_REASON = re.compile(r"executionTimeout exceeded|\[JOB_TIMEOUT\]")  # by RunPod and by the worker, both FAILED


class Endpoint:
    """A RunPod Serverless endpoint, as docs.runpod.io describes its /run, /status and /cancel.

    `deadline` arguments are readings of `clock`. Every method raises PlatformError.
    """

    def __init__(
        self,
        url: str,
        endpoint_id: str,
        key: str,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import requests

        def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
            request.headers["Authorization"] = f"Bearer {key}"
            return request

        self._session = requests.Session()
        self._session.auth = bearer  # a plain header would lose against an entry in ~/.netrc
        self._base = f"{url.rstrip('/')}/{quote(endpoint_id, safe='')}"
        self._sleep = sleep
        self.clock = clock

    def submit(self, body: bytes, deadline: float) -> str:
        """Starts the job and returns its id. Sent again only after HTTP 429: otherwise a second job could be billed."""
        delay_s = FIRST_POLL_S
        while True:
            try:
                answer = self._call("POST", "/run", body=body)
                break
            except NotFound as error:
                raise PlatformError(f"there is no endpoint at {self._base}") from error
            except Unreachable as error:
                if not error.busy:
                    raise PlatformError(f"the job could not be handed over: {error}") from error
                self._wait(max(delay_s, error.retry_after_s), deadline)
                delay_s = min(delay_s * POLL_GROWTH, LAST_POLL_S)
        job_id = answer.get("id")
        if not isinstance(job_id, str) or not re.fullmatch(r"[\w.-]{1,200}", job_id):
            raise PlatformError("the endpoint took the job and named no id for it that could be asked for")
        return job_id

    def follow(self, job_id: str, deadline: float, on_status: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
        """Asks until the job is in a final state and returns that answer; gives every other one to `on_status`.

        Raises JobTimedOut at the deadline, and PlatformError once nothing usable was heard for SILENCE_LIMIT_S.
        """
        delay_s = FIRST_POLL_S
        heard_at = self.clock()
        state = None
        while True:
            pause_s = 0.0
            try:
                status = self._status(job_id)
            except Unreachable as error:
                if error.busy:
                    heard_at = self.clock()
                elif self.clock() - heard_at > SILENCE_LIMIT_S:
                    raise PlatformError(f"job {job_id} is out of sight and may still run: {error}") from error
                pause_s = error.retry_after_s
            else:
                heard_at = self.clock()
                if status["status"] in FINAL_STATES:
                    return status
                on_status(status)
                if status["status"] != state:
                    state, delay_s = status["status"], FIRST_POLL_S
            self._wait(max(delay_s, pause_s), deadline)
            delay_s = min(delay_s * POLL_GROWTH, LAST_POLL_S)

    def cancel(self, job_id: str) -> None:
        """Takes the job out of the queue, or stops it."""
        self._call("POST", f"/cancel/{job_id}", read_timeout_s=CANCEL_TIMEOUT_S)

    def _status(self, job_id: str) -> dict[str, Any]:
        try:
            status = self._call("GET", f"/status/{job_id}")
        except NotFound as error:
            raise PlatformError(f"RunPod no longer knows job {job_id}: its time to live is over") from error
        if not isinstance(status.get("status"), str):
            raise Unreachable("an answer without a status")
        return status

    def _wait(self, pause_s: float, deadline: float) -> None:
        remaining_s = deadline - self.clock()
        if remaining_s <= 0:
            raise JobTimedOut("the job was not done within --timeout")
        self._sleep(min(pause_s, remaining_s))

    def _call(
        self, method: str, path: str, *, body: bytes | None = None, read_timeout_s: float = READ_TIMEOUT_S
    ) -> dict[str, Any]:
        """One request; the JSON object that was answered. Redirects are not followed: the API has none."""
        import requests

        try:
            response = self._session.request(
                method,
                self._base + path,
                # http.client sends a file in blocks, each with its own timeout; bytes would have to be out within one.
                data=io.BytesIO(body) if body is not None else None,
                headers={"Content-Type": "application/json"} if body is not None else {},
                timeout=(CONNECT_TIMEOUT_S, read_timeout_s),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise Unreachable(f"{method} {self._base}{path}: {network_reason(error)}") from error
        return _read_answer(response, f"{method} {self._base}{path}")


def _read_answer(response: requests.Response, request: str) -> dict[str, Any]:
    code = response.status_code
    if code in (401, 403):
        raise PlatformError(f"the endpoint refused the key in RUNPOD_API_KEY (HTTP {code})")
    if code == 404:
        raise NotFound(f"{request}: HTTP 404")
    if code == 429 or code >= 500:
        pause_s = _retry_after_s(response.headers.get("Retry-After", ""))
        raise Unreachable(f"{request}: HTTP {code}", busy=code == 429, retry_after_s=pause_s)
    if code >= 400:
        raise PlatformError(f"{request}: HTTP {code}, {one_line(response.text, 300) or 'no reason given'}")
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError) as error:
        raise Unreachable(f"{request}: HTTP {code} with something that is not JSON") from error
    if not isinstance(answer, dict):
        raise Unreachable(f"{request}: HTTP {code} with JSON that is not an object")
    return answer


def _retry_after_s(header: str) -> float:
    """Retry-After in seconds; 0 for its rarer form, a date, which would need both clocks to agree."""
    return float(header) if re.fullmatch(r"[0-9]{1,5}", header.strip()) else 0.0


def network_reason(error: BaseException) -> str:
    """The first cause in a chain of exceptions: "Connection refused" instead of requests' five layers around it."""
    while isinstance(earlier := error.__cause__ or error.__context__, Exception) and not isinstance(
        earlier, ClientError
    ):
        error = earlier
    strerror = error.strerror if isinstance(error, OSError) else None
    return one_line(strerror or error, 200) or type(error).__name__


def run_job(endpoint: Endpoint, body: bytes, timeout_s: float) -> dict[str, Any]:
    """One job from start to final state; on Ctrl-C or at the deadline it is cancelled, because RunPod bills by time."""
    deadline = endpoint.clock() + timeout_s
    try:
        job_id = endpoint.submit(body, deadline)
    except KeyboardInterrupt:
        say("if RunPod took the job before this, it runs to its end: its id did not arrive here")
        raise
    say(f"job {job_id}")
    try:
        with ProgressDisplay(sys.stderr) as display:
            return endpoint.follow(job_id, deadline, display.update)
    except (KeyboardInterrupt, JobTimedOut):
        _cancel_aloud(endpoint, job_id)
        raise


def _cancel_aloud(endpoint: Endpoint, job_id: str) -> None:
    try:
        endpoint.cancel(job_id)
    except PlatformError as error:
        say(f"job {job_id} could not be cancelled and may still run: {error}")
    else:
        say(f"job {job_id} is cancelled on RunPod")


def outcome(status: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a job in a final state. Raises JobFailed or JobTimedOut with the reason that RunPod shows."""
    state, output = status.get("status"), status.get("output")
    if state == "COMPLETED":
        if not isinstance(output, dict) or not output:
            # The platform shows a result that it did not accept as COMPLETED without output (runpod-python #309).
            raise JobFailed("the job completed without a result; most often it was larger than RunPod accepts")
        if not isinstance(output.get("error"), str):
            return output
        status = {**status, "error": output["error"]}
    reason = failure_reason(status)
    if state == "TIMED_OUT" or TIMEOUT_REASON.search(reason):
        raise JobTimedOut(f"the job ran out of time on RunPod{': ' + reason if reason else ''}")
    raise JobFailed(f"the job {'was cancelled' if state == 'CANCELLED' else 'failed'}{': ' + reason if reason else ''}")


def failure_reason(status: Mapping[str, Any]) -> str:
    """`error` as one line. The SDK encodes a raised exception as JSON (runpod 1.12.0, serverless/modules/rp_job.py)."""
    error, output = status.get("error"), status.get("output")
    if isinstance(error, str) and error.lstrip().startswith("{"):
        with suppress(ValueError, RecursionError):
            error = json.loads(error)
    if isinstance(error, dict):
        error = error.get("error_message") or error.get("message") or error
    reason = one_line(error) if error else ""
    code = output.get("error_code") if isinstance(output, dict) else None
    return reason if not code or str(code) in reason else f"[{one_line(code, 40)}] {reason}".rstrip()


def describe_progress(status: Mapping[str, Any]) -> tuple[str, float | None]:
    """A running job's state in words, and percent where known. Every key of a progress update is optional."""
    state, update = one_line(status.get("status"), 40), status.get("output")
    if state == "IN_QUEUE":
        return "waiting in the queue", None
    if not isinstance(update, dict):
        return one_line(update, 80) if isinstance(update, str) else state.lower().replace("_", " "), None
    words = [one_line(update[key], 40) for key in ("stage", "node_class") if isinstance(update.get(key), str)]
    if isinstance(update.get("node"), str):
        words.append(f"(node {one_line(update['node'], 40)})")
    if _is_number(update.get("value")) and _is_number(update.get("max")):
        words.append(f"{update['value']}/{update['max']}")
    percent = update.get("percent")
    shown = float(percent) if _is_number(percent) and 0 <= percent <= 100 else None
    return " ".join(words) or "running", shown


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class ProgressDisplay:
    """Shows progress on a stream: a bar on a terminal, elsewhere one line for each change."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            shape = "{desc} |{bar}| {percentage:3.0f}% {elapsed}"
            self._bar = tqdm(total=100, file=stream, bar_format=shape, leave=False, dynamic_ncols=True)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, status: Mapping[str, Any]) -> None:
        text, percent = describe_progress(status)
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = percent if percent is not None else self._bar.n
            self._bar.refresh()
        elif text != self._last:
            print(text, file=self._stream, flush=True)
        self._last = text


# ---------------------------------------------------------------------------------------------------------------------
# Saving: every item of a result becomes a new file
# ---------------------------------------------------------------------------------------------------------------------

FILE_LISTS = ("images", "videos", "audio", "files")
MAX_STEM_BYTES = 180  # with a number and a suffix still below the 255 bytes that file systems take
RESERVED_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # on Windows


def safe_basename(name: object, fallback: str) -> str:
    """A name from elsewhere as a plain file name: no folder, not hidden, no character that a file system refuses."""
    base = re.split(r"[/\\]", name)[-1] if isinstance(name, str) else ""
    base = "".join("_" if char in '<>:"|?*' or not char.isprintable() else char for char in base).strip(". ")
    stem, suffix = PurePath(base).stem, PurePath(base).suffix
    if len(suffix.encode()) > 20:
        stem, suffix = base, ""
    stem = stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore").strip(". ")
    base = stem + suffix if stem else fallback
    return f"_{base}" if RESERVED_NAME.match(base) else base


def numbered(name: str) -> Iterator[str]:
    """The name, then name_1, name_2 and so on, before the suffix."""
    stem, suffix = PurePath(name).stem, PurePath(name).suffix
    return itertools.chain([name], (f"{stem}_{number}{suffix}" for number in itertools.count(1)))


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, numbered where two are the same; upper and lower case count as the same."""
    taken: set[str] = set()
    unique = []
    for name in names:
        free = next(candidate for candidate in numbered(name) if candidate.casefold() not in taken)
        taken.add(free.casefold())
        unique.append(free)
    return unique


def save_new(directory: Path, name: str, chunks: Iterable[bytes]) -> Path:
    """Writes a new file and returns its path; it appears whole, or not at all, and never replaces another.

    Raises OSError, and whatever `chunks` raises.
    """
    partial = directory / f".partial-{random.SystemRandom().getrandbits(64):016x}"
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
        return partial.replace(_reserve(directory, name))
    finally:
        partial.unlink(missing_ok=True)


def _reserve(directory: Path, name: str) -> Path:
    """Makes an empty file under the first free name: with O_EXCL, which also refuses a link that leads nowhere."""
    candidates = numbered(name)
    while True:
        path = directory / next(candidates)
        try:
            path.open("xb").close()
        except FileExistsError:
            continue
        return path


def item_chunks(item: Mapping[str, Any]) -> Iterator[bytes]:
    """The bytes of one item of a result: plain Base64, a data URI, or a URL. Raises JobFailed or PlatformError."""
    data = item.get("data")
    if not isinstance(data, str) or not data:
        raise JobFailed("it has no data")
    if item.get("type") == "s3_url" or data.startswith(("https://", "http://")):
        yield from _download(data)
    else:
        yield _decode(data)


def _decode(data: str) -> bytes:
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        content = base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise JobFailed(f"its data is not Base64: {one_line(error, 100)}") from error
    return content


def _download(url: str) -> Iterator[bytes]:
    """The body behind a presigned URL, streamed. It goes without the endpoint's key."""
    import requests

    deadline = time.monotonic() + DOWNLOAD_LIMIT_S
    try:
        with requests.get(url, stream=True, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S)) as response:
            if response.status_code != 200:
                hint = "; the link is not valid, or not any more" if response.status_code == 403 else ""
                raise PlatformError(f"its download gave HTTP {response.status_code}{hint}")
            for chunk in response.iter_content(1 << 20):
                if time.monotonic() > deadline:
                    raise PlatformError(f"its download took more than {DOWNLOAD_LIMIT_S} s")
                yield chunk
    except (requests.RequestException, ValueError) as error:  # ValueError: a URL that cannot be taken apart
        raise PlatformError(f"its download failed: {network_reason(error)}") from error


def _checked(chunks: Iterable[bytes], size_bytes: object) -> Iterator[bytes]:
    """Passes the chunks on. Raises JobFailed at the end where nothing came, or not the size that was announced."""
    total = 0
    for chunk in chunks:
        total += len(chunk)
        yield chunk
    if total == 0 or (_is_number(size_bytes) and total != size_bytes):
        raise JobFailed(f"it has {total} bytes{f' instead of {size_bytes}' if _is_number(size_bytes) else ''}")


def save_result(output: Mapping[str, Any], directory: Path) -> list[ClientError]:
    """Saves every item of a result and prints each path; returns what went wrong. A broken item stops no other."""
    failures: list[ClientError] = []
    count = 0
    for kind in FILE_LISTS:
        items = output.get(kind, [])
        if not isinstance(items, list):
            failures.append(JobFailed(f"the result's {kind} are not a list"))
            continue
        for item in items:
            count += 1
            try:
                print(_save_item(item, kind.removesuffix("s"), directory), flush=True)
            except ClientError as error:
                failures.append(error)
    if count == 0 and not failures and not output.get("texts"):
        failures.append(JobFailed("the job succeeded and made nothing to save"))
    return failures


def _save_item(item: object, kind: str, directory: Path) -> Path:
    if not isinstance(item, dict):
        raise JobFailed(f"an item of the result is no object but {type(item).__name__}")
    name = safe_basename(item.get("filename"), fallback=kind)
    try:
        return save_new(directory, name, _checked(item_chunks(item), item.get("size_bytes")))
    except OSError as error:
        raise JobFailed(f"{name} cannot be written into {directory}: {error.strerror or one_line(error)}") from error
    except ClientError as error:
        raise type(error)(f"{name} is not saved: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

EPILOG = """\
examples:
  client.py --workflow one_image.json --img photo.jpg
  client.py --workflow qwen_image_edit.json --img room.png chair.png --prompt "put the chair into the room"
  client.py --workflow t2i.json --prompt "a lighthouse at dusk" --seed 7 --out lighthouse --timeout 600

The key comes from RUNPOD_API_KEY and is never an argument. Ctrl-C cancels the job on RunPod.
exit codes: 0 all saved; 1 the job failed or an item could not be saved; 2 usage or bad input;
            3 platform or network; 4 timed out; 130 interrupted
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="client.py",
        description="Run a ComfyUI workflow on a RunPod Serverless endpoint and save what it makes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="client.py --workflow FILE [--img FILE ...] [--prompt TEXT] [options]",
        allow_abbrev=False,
    )
    job = parser.add_argument_group("the job")
    job.add_argument("--workflow", metavar="FILE", type=Path, required=True, help="workflow in API format")
    order = "images for the LoadImage nodes, lowest node id first; or https URLs, where the worker takes them"
    job.add_argument("--img", metavar="FILE", type=_image, nargs="+", action="extend", default=[], help=order)
    job.add_argument("--prompt", metavar="TEXT", help="positive text; the negative one is never touched by it")
    job.add_argument("--negative", metavar="TEXT", help="negative text")
    seeds = job.add_mutually_exclusive_group()
    seeds.add_argument("--seed", metavar="N", type=_seed, help="for every seed (default: random, and printed)")
    seeds.add_argument("--keep-seeds", action="store_true", help="leave the workflow's seeds as they are")
    formats = ("png", "webp", "jpeg")
    job.add_argument(
        "--format", choices=formats, help="of the pictures that come back (default: as the workflow has it)"
    )
    job.add_argument("--quality", metavar="N", type=_quality, help="of webp and jpeg, 1 to 100 (default: 90)")
    job.add_argument("--debug", action="store_true", help="keep the worker's files; print timings and where to look")
    where = parser.add_argument_group("where")
    where.add_argument("--out", metavar="DIR", type=Path, default=Path("output"), help="default: output")
    where.add_argument("--endpoint", metavar="ID", help="default: RUNPOD_ENDPOINT_ID")
    where.add_argument("--url", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    where.add_argument("--timeout", metavar="S", type=_timeout_s, default=1800.0, help="seconds (default: 1800)")
    return parser


def _image(text: str) -> Path | str:
    """A file; or a URL, which is sent as it is: the worker fetches it."""
    return text if text.lower().startswith("https://") else Path(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) >= 2**64:
        raise argparse.ArgumentTypeError("a seed is a whole number from 0 to 2**64 - 1")
    return int(text)


def _quality(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError("a quality is a whole number from 1 to 100")
    return int(text)


def _timeout_s(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) or not 1 <= float(text) <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"the timeout is a number of seconds from 1 to {MAX_TIMEOUT_S}")
    return float(text)


def read_image(path: Path) -> bytes:
    """The bytes of an image file that Pillow can decode to the end. Raises InputError."""
    from PIL import Image

    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except FileNotFoundError as error:
        raise InputError(f"there is no image {path}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not an image that can be read: {network_reason(error)}") from error
    return content


def plan_changes(workflow: Workflow, options: argparse.Namespace, image_names: Sequence[str]) -> list[Change]:
    """Everything that the command line changes in the workflow."""
    changes = plan_images(workflow, image_names)
    if options.prompt is not None:
        changes += plan_text(workflow, options.prompt, "positive")
    if options.negative is not None:
        changes += plan_text(workflow, options.negative, "negative")
    if not options.keep_seeds:
        fixed = options.seed
        seeds = plan_seeds(workflow, lambda: random.SystemRandom().randrange(2**32) if fixed is None else int(fixed))
        if fixed is not None and not seeds:
            raise InputError("--seed: the workflow has no seed of its own")
        changes += seeds
    return changes


def build_body(options: argparse.Namespace) -> bytes:
    """The body of /run. Reads the files, prints what it changes, and what is large."""
    workflow = read_workflow(options.workflow)
    paths = [urlsplit(image).path if isinstance(image, str) else image.name for image in options.img]
    names = unique_names(safe_basename(path, fallback="image") for path in paths)
    changes = plan_changes(workflow, options, names)
    images = {
        name: image if isinstance(image, str) else base64.b64encode(read_image(image)).decode()
        for name, image in zip(names, options.img, strict=True)
    }
    for change in changes:
        say(f"{label(workflow, change.node_id)}.{change.input_name} = {one_line(json.dumps(change.value), 100)}")
    job: dict[str, Any] = {"workflow": apply_changes(workflow, changes)}
    if images:
        job["images"] = images
    if options.quality is not None and options.format not in ("webp", "jpeg"):
        raise InputError("--quality goes with --format webp or --format jpeg")
    wishes = {"output_format": options.format, "output_quality": options.quality, "debug": options.debug or None}
    job |= {key: value for key, value in wishes.items() if value is not None}
    timeout_ms = max(MIN_EXECUTION_TIMEOUT_MS, round(options.timeout * 1000))
    try:
        body = json.dumps({"input": job, "policy": {"executionTimeout": timeout_ms}}, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{options.workflow} cannot be sent as JSON: {one_line(error, 120)}") from error
    if len(body) > RUN_LIMIT_BYTES:
        sizes = ", ".join(f"{name} {len(data) / 1e6:.1f} MB" for name, data in images.items())
        say(f"warning: the request has {len(body) / 1e6:.1f} MB ({sizes or 'no images'}) and RunPod takes 10 MB")
    return body


def connect(options: argparse.Namespace, environ: Mapping[str, str]) -> Endpoint:
    endpoint_id = options.endpoint or environ.get("RUNPOD_ENDPOINT_ID")
    key = environ.get("RUNPOD_API_KEY", "").strip()
    if not re.match(r"https?://[\w.\[-]", options.url):
        raise InputError("--url has the form https://host/path")
    if not endpoint_id:
        raise InputError("name the endpoint with --endpoint or RUNPOD_ENDPOINT_ID")
    if not key or not key.isascii() or not key.isprintable():
        raise InputError("put the endpoint's API key into the environment variable RUNPOD_API_KEY")
    return Endpoint(options.url, endpoint_id, key)


def make_output_directory(directory: Path) -> None:
    """Made before the job is sent, so that a result is not lost for want of a place."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {directory} cannot be made: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"--out {directory} cannot be written to")


def print_debug(status: Mapping[str, Any]) -> None:
    """Times, and what the worker says about itself and about a failure; a line each."""
    output = status.get("output")
    facts = {key: status[key] for key in ("delayTime", "executionTime", "workerId") if key in status}
    for key in ("timings_ms", "debug", "details"):
        value = output.get(key) if isinstance(output, dict) else None
        facts |= {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
    for key, value in facts.items():
        say(f"{one_line(key, 60)}: {one_line(value if isinstance(value, str) else json.dumps(value), 2000)}")


def print_remarks(output: Mapping[str, Any]) -> None:
    """The result's warnings on stderr, its texts on stdout."""
    for key in ("warnings", "errors"):  # the official worker puts what it could not return under `errors`
        remarks = output.get(key)
        for remark in remarks if isinstance(remarks, list) else []:
            say(f"warning: {one_line(remark)}")
    texts = output.get("texts")
    for entry in texts if isinstance(texts, list) else []:
        text = entry.get("text") if isinstance(entry, dict) else entry
        print(text if isinstance(text, str) else json.dumps(entry), flush=True)


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> ExitCode:
    """The program without its error handling."""
    endpoint = connect(options, environ)
    body = build_body(options)
    make_output_directory(options.out)
    status = run_job(endpoint, body, options.timeout)
    if options.debug:
        print_debug(status)
    output = outcome(status)
    print_remarks(output)
    failures = save_result(output, options.out)
    for failure in failures:
        say(f"error: {failure}")
    return failures[0].exit_code if failures else ExitCode.SAVED


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a result's text must not end the program
    options = build_parser().parse_args(arguments)
    try:
        return run(options, os.environ)
    except ClientError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the outermost function: a sentence instead of a traceback
        say(f"error: the client has a defect: {type(error).__name__}: {one_line(error, 300)}")
        return ExitCode.PLATFORM


if __name__ == "__main__":
    sys.exit(main())
