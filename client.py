#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["requests", "Pillow", "tqdm"]
# ///
"""Runs ComfyUI workflows on a RunPod Serverless endpoint, or on a ComfyUI behind a tunnel, and saves what they make.

One file that works on its own: `uv run client.py ...`, or any Python with requests, Pillow and tqdm. It reads in order:
workflow, injection, files, servers (RunPod, ComfyUI), saving, jobs (one, many), command line. Saved paths and texts go
to stdout, everything else to stderr. Packages are imported where they are used, so that --help is quick.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TextIO, TypeGuard
from urllib.parse import quote, urlencode, urlsplit

if TYPE_CHECKING:
    from concurrent.futures import Future

    import requests
    from PIL import Image


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
    ├── Interrupted     Ctrl-C
    └── PlatformError   RunPod, ComfyUI or the network
        ├── Refused     HTTP 4xx, with the body's text in `text`
        │   └── NotFound  404: the endpoint, the job or the call is not there
        └── Unreachable no usable answer this time; asking again may help
    """

    exit_code = ExitCode.JOB_FAILED


class InputError(ClientError):
    exit_code = ExitCode.BAD_INPUT


class JobFailed(ClientError):
    pass


class JobTimedOut(ClientError):
    exit_code = ExitCode.TIMED_OUT


class Interrupted(ClientError):
    exit_code = ExitCode.INTERRUPTED


class PlatformError(ClientError):
    exit_code = ExitCode.PLATFORM


class Refused(PlatformError):
    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


class NotFound(Refused):
    pass


class Unreachable(PlatformError):
    """`busy` is HTTP 429: the request was understood and not acted on. `retry_after_s` is 0 where none was named."""

    def __init__(self, message: str, *, busy: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.busy = busy
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Console:
    """Lines for a person on stderr, with `quiet` only warnings and errors; `prefix` tells one job of many. Results on
    stdout, which --json keeps for its object."""

    quiet: bool = False
    json: bool = False
    prefix: str = ""

    def say(self, message: object) -> None:
        if not self.quiet:
            write_line(sys.stderr, f"{self.prefix}{message}")

    def warn(self, message: str) -> None:
        write_line(sys.stderr, f"{self.prefix}warning: {message}")

    def fail(self, error: object) -> None:
        write_line(sys.stderr, f"{self.prefix}error: {error}")

    def result(self, text: str) -> None:
        if not self.json:
            write_line(sys.stdout, text)


def write_line(stream: TextIO | None, text: str) -> None:
    """In one piece, since several jobs may write. A stream that is closed, full, or without a reader (`head`) must not
    cost a result."""
    if stream is None:
        return
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(value: object, limit_chars: int = 600) -> str:
    """Text from elsewhere as one printable line: a server must not be able to steer the terminal."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit_chars else text[: limit_chars - 1] + "…"


def counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def reason_of(error: BaseException) -> str:
    """The first cause in a chain of exceptions: "Connection refused" instead of requests' five layers around it."""
    while isinstance(earlier := error.__cause__ or error.__context__, Exception):
        if isinstance(earlier, ClientError):
            break
        error = earlier
    strerror = error.strerror if isinstance(error, OSError) else None
    return one_line(strerror or error, 200) or type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError, also for what Python's parser finds too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


# ---------------------------------------------------------------------------------------------------------------------
# Workflow: what a file holds, and how its nodes are named and linked
# ---------------------------------------------------------------------------------------------------------------------

Node = dict[str, Any]
Workflow = dict[str, Node]

EXPORT_HINT = "export it in ComfyUI with Workflow > Export (API)"


def read_file(path: Path, noun: str = "file") -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no {noun} {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a path that none can be
        raise InputError(f"the {noun} {one_line(path)} cannot be read: {reason_of(error)}") from error


def read_document(path: Path) -> object:
    """The JSON in a file. Raises InputError."""
    content = read_file(path, "workflow")
    try:
        return parse_json(content.decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"the workflow {path} is not JSON: {one_line(error, 120)}") from error


def parse_workflow(document: object) -> Workflow:
    """The API-format workflow in a document, also wrapped as {"prompt"}, {"workflow"} or {"input": {"workflow"}}.

    Raises InputError; for the UI format (`nodes` and `links`) it says how to export.
    """
    while isinstance(document, dict):
        if isinstance(document.get("nodes"), list):
            raise InputError(f"this workflow is in ComfyUI's UI format; {EXPORT_HINT}")
        nodes = {key: node for key, node in document.items() if not key.startswith("_")}  # people write "_comment"
        if nodes and all(map(is_node, nodes.values())):
            return nodes
        document = next((document[key] for key in ("input", "workflow", "prompt") if key in document), None)
    raise InputError(f"this is not a workflow in API format (node ids, each with class_type and inputs); {EXPORT_HINT}")


def is_node(value: object) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("class_type"), str) and isinstance(value.get("inputs"), dict)
    )


def natural_key(node_id: str) -> list[tuple[int, int, str]]:
    """Sorts node ids as a person reads them: "9" < "10" < "57:8" < "57:12"; words come after numbers."""
    parts = [(part, part.lstrip("0")) for part in node_id.split(":")]
    # Digits by their number first, which compares as int() does, and knows no limit of 4300 digits.
    return [(0, len(bare), bare) if part.isascii() and part.isdigit() else (1, 0, part) for part, bare in parts]


def in_order(workflow: Workflow) -> list[str]:
    return sorted(workflow, key=natural_key)


def is_linked(value: object) -> TypeGuard[list[Any]]:
    """ComfyUI takes every list for a link (execution.py `validate_inputs`, 0.3.64)."""
    return isinstance(value, list)


def source_of(workflow: Workflow, value: object) -> str | None:
    """The node that a link [node_id, output index] comes from; None for a plain value or a dangling link."""
    if is_linked(value) and len(value) == 2 and isinstance(value[0], str) and value[0] in workflow:
        return value[0]
    return None


def links_of(workflow: Workflow, node_id: str) -> dict[str, str]:
    """{input name: source node} of a node."""
    inputs = workflow[node_id]["inputs"].items()
    return {name: source for name, value in inputs if (source := source_of(workflow, value)) is not None}


def linked_from(workflow: Workflow) -> set[str]:
    """The nodes that others link from."""
    return {source for node_id in workflow for source in links_of(workflow, node_id).values()}


def label(workflow: Workflow, node_id: str) -> str:
    """A node as a person finds it in ComfyUI: `3 "Load Image" (LoadImage)`."""
    node = workflow[node_id]
    meta = node.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    quoted = f' "{one_line(title, 60)}"' if isinstance(title, str) and title else ""
    return f"{one_line(node_id, 40)}{quoted} ({one_line(node['class_type'], 60)})"


def labels(workflow: Workflow, node_ids: Collection[str]) -> str:
    return ", ".join(label(workflow, node_id) for node_id in in_order(workflow) if node_id in node_ids)


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant, for the end of a sentence."""
    import difflib

    names = list(known)
    near = difflib.get_close_matches(word, names, 1, 0.5)
    if near:
        return f"; did you mean {one_line(near[0], 60)}?"
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"; there are {', '.join(one_line(name, 40) for name in names[:12])}{more}" if names else ""


# ---------------------------------------------------------------------------------------------------------------------
# Injection: pure functions that say what to change; apply_changes makes the changed copy
# ---------------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """One input of one node."""

    node_id: str
    input_name: str

    def __str__(self) -> str:
        return f"{one_line(self.node_id, 40)}.{one_line(self.input_name, 60)}"


class Change(NamedTuple):
    """One input that gets a new value."""

    place: Place
    value: Any


def apply_changes(workflow: Workflow, changes: Iterable[Change]) -> Workflow:
    """A copy with the changes made; the workflow given stays as it is."""
    changed = dict(workflow)
    for (node_id, input_name), value in changes:
        node = changed[node_id]
        changed[node_id] = {**node, "inputs": {**node["inputs"], input_name: value}}
    return changed


def value_at(workflow: Workflow, place: Place) -> Any:
    return workflow[place.node_id]["inputs"].get(place.input_name)


def by_place(places: Iterable[Place]) -> list[Place]:
    return sorted(set(places), key=lambda place: (natural_key(place.node_id), place.input_name))


def change_shown(workflow: Workflow, change: Change, limit_chars: int = 60) -> str:
    """`3 "Load Image" (LoadImage).image = "a.png"`, with the value as JSON."""
    (node_id, name), value = change
    value_shown = one_line(json.dumps(value, ensure_ascii=False, default=str), limit_chars)
    return f"{label(workflow, node_id)}.{one_line(name, 60)} = {value_shown}"


def places_shown(workflow: Workflow, places: Sequence[Place]) -> str:
    """Places with the node's label and what they hold."""
    listed = [change_shown(workflow, Change(place, value_at(workflow, place))) for place in places[:12]]
    return ", ".join(listed) + (f" and {len(places) - 12} more" if len(places) > 12 else "")


def split_named(workflow: Workflow, text: str) -> tuple[str | None, str]:
    """("6", "a cat") of "6=a cat" where there is a node 6, else (None, text). Raises InputError for a number that is
    no node: a mistyped id must not end up in the text."""
    name, equals, rest = text.partition("=")
    if equals and name in workflow:
        return name, rest
    if equals and re.fullmatch(r"\d+(:\d+)*", name):
        raise InputError(f"there is no node {one_line(name, 40)}{nearest(name, in_order(workflow))}")
    return None, text


# --- files: which inputs of a workflow take one ----------------------------------------------------------------------

# What the loaders of ComfyUI and of the common packages call their file, and of which kind it is.
FILE_INPUTS = {"image": "image", "mask": "image", "video": "video", "audio": "audio"}
FILE_INPUTS |= {"file": "video", "model_file": "file"}  # LoadVideo, Load3D (nodes_video.py, nodes_load_3d.py, 0.18.1)
CORE_LOADERS = ("LoadImage", "LoadImageMask", "LoadImageOutput")
LOADER = re.compile(r"(?<!up)(?<!down)load", re.I)
# Their string is no file of the input folder: a path or folder of the machine, an address, the picture itself.
NO_LOADER = re.compile(r"path|url|base64|dir\b|folder|from(server|cache|http)|dataset", re.I)


class Slot(NamedTuple):
    """An input that names a file; `kind` is "image", "video", "audio" or "file" (the rest)."""

    place: Place
    kind: str

    @property
    def option(self) -> str:
        return "--img" if self.kind == "image" else "--file"


def all_slots(workflow: Workflow) -> list[Slot]:
    """Every input that names a file: LoadImage's, then those of other loaders, in node-id order."""
    found = []
    for node_id in in_order(workflow):
        class_type, inputs = workflow[node_id]["class_type"], workflow[node_id]["inputs"]
        names = [name for name in FILE_INPUTS if isinstance(inputs.get(name), str)]
        if class_type in CORE_LOADERS:
            names = ["image"] if not is_linked(inputs.get("image")) else []
        elif not LOADER.search(class_type) or NO_LOADER.search(class_type):
            names = []
        found += [Slot(Place(node_id, name), FILE_INPUTS[name]) for name in names[:1]]
    return sorted(found, key=lambda slot: workflow[slot.place.node_id]["class_type"] != "LoadImage")


def slots_of(workflow: Workflow) -> list[Slot]:
    """Those whose file has to be sent: ComfyUI runs no loader without use."""
    found, linked = all_slots(workflow), linked_from(workflow)
    return [slot for slot in found if slot.place.node_id in linked] or found


class GivenFile(NamedTuple):
    """A file of the command line under the name that it is sent by; `node_id` is None where none was named."""

    name: str
    kind: str
    node_id: str | None = None

    def fits(self, slot: Slot) -> bool:
        if self.node_id is not None:
            return slot.place.node_id == self.node_id
        kinds = (self.kind, slot.kind)
        return self.kind == slot.kind or ("file" in kinds and "image" not in kinds)


def plan_files(workflow: Workflow, given: Sequence[GivenFile], taken: Collection[Place] = ()) -> list[Change]:
    """Where each file goes: to the node that it names, else to the first free input of its kind.

    Raises InputError where there is none.
    """
    changes: list[Change] = []
    for file in sorted(given, key=lambda file: file.node_id is None):
        slots = slots_of(workflow) if file.node_id is None else all_slots(workflow)
        used = {*taken, *(change.place for change in changes)}
        place = next((slot.place for slot in slots if file.fits(slot) and slot.place not in used), None)
        if place is None:
            raise InputError(_no_slot_message(workflow, file, given))
        changes.append(Change(place, file.name))
    return changes


def _no_slot_message(workflow: Workflow, file: GivenFile, given: Sequence[GivenFile]) -> str:
    is_image = file.kind == "image"
    option, noun = ("--img", "image") if is_image else ("--file", "file")
    nodes = [slot.place.node_id for slot in slots_of(workflow) if slot.option == option]
    loaders = labels(workflow, nodes)
    if file.node_id is not None:
        takes = f"the nodes that take one file: {loaders}" if nodes else "no node of the workflow takes one"
        return f"{option}: {label(workflow, file.node_id)} takes no further file; {takes}"
    number = sum((other.kind == "image") == is_image for other in given)
    where = f"takes {counted(len(nodes), noun)}: {loaders}" if nodes else f"has no node that loads a free {noun}"
    return f"{option} gives {counted(number, noun)}, but the workflow {where}"


def unfilled(workflow: Workflow, changes: Iterable[Change], names: Collection[str]) -> list[Slot]:
    """The inputs that keep a file which is not sent: `names` are those that are."""
    changed, sent = {change.place for change in changes}, list(names)  # a list, as a value may be unhashable
    return [
        slot for slot in slots_of(workflow) if slot.place not in changed and value_at(workflow, slot.place) not in sent
    ]


def unfilled_message(workflow: Workflow, slots: Sequence[Slot]) -> str:
    options = " or ".join(sorted({slot.option for slot in slots}, reverse=True))
    places = places_shown(workflow, [slot.place for slot in slots])
    number = counted(len(slots), "file")
    return f"the workflow loads {number} that {options} does not give: {places}; --keep-images leaves that so"


# --- prompt text: traced from the samplers to where the words really live --------------------------------------------
# The names below are those of ComfyUI 0.18.1 and of the nodes met in some 550 published workflows.

TEXT_OPTIONS = {"positive": "--prompt", "negative": "--negative"}  # of the two roles that a text can have
OPPOSITE = {"positive": "negative", "negative": "positive"}
ROLE_NAMES = {  # inputs that belong to one role by their name
    role: re.compile(
        rf"((text|prompt|cond|optional|opt|base|refiner)_)?({role}|{role[:3]})(_?(prompt|text|cond\w*|new|\d+)){{0,3}}",
        re.I,
    )
    for role in OPPOSITE
}
SAMPLER = re.compile(r"sampler|guider", re.I)
CONDITIONING = re.compile(r"conditioning.*|.*_conditioning|cond\d+|(text|prompt|hyvid)_embeds", re.I)
TEXT_ENCODER = re.compile(r"text_?encode|wildcard", re.I)
ENCODER_MODEL = re.compile(r"clip|t5|text_?encoder", re.I)  # what a text encoder gets by link
# A prompt's words: text, prompt, text_g and text_l (SDXL), clip_l and t5xxl (Flux, SD3), bert and mt5xl (HunyuanDiT),
# user_prompt (Lumina2), tags (ACE-Step), wildcard_text and populated_text (Impact), text_a ... of concatenations.
WORDS = re.compile(
    r"((user|global|main|edit|basic|wildcard|populated)_)?(text_?|prompt_?|caption)+(_?([a-l]|\d+|input))?|clip_[gl]|t5xxl"
    r"|bert|mt5xl|llama|qwen25_7b|tags|body",
    re.I,
)
# Of nodes for strings also these.
STRINGS = re.compile(r"|((input|source)_)?(string|str|value|any|anything|source|input)(_?([a-h]|\d+))?", re.I)
STRING_NODE = re.compile(r"str|text|prompt|primitive|any|concat|join|literal", re.I)
SHOWS = re.compile(r"show|display|preview|save", re.I)  # nodes with texts that are shown or saved, not used
NO_WORDS = re.compile(rf"{SHOWS.pattern}|{LOADER.pattern}|math", re.I)  # nodes whose own strings are no words
MEDIA = re.compile(r"images?|pixels|video|audio|frames", re.I)
MAKES_UP_WORDS = re.compile(
    r"llm|ollama|gpt|gemini|claude|florence|llava|joycap|blip|tagger|interrogat|captioner|vlm|qwen.*vl|textgenerate",
    re.I,
)
# Links that no words of a picture come through: instructions for such a node, numbers, choices.
NO_WAY = re.compile(r"system|instruct|select|index|switch|bool|strength|width|height|length|seed|steps|frame", re.I)
ENHANCES_WORDS = re.compile(r"enhance", re.I)  # takes a person's words and adds to them
NO_PROMPT = re.compile(r"segment|dino|sam\d?|detect|mask|clipseg|show|save", re.I)  # `prompt` is not for a picture
ENDS_TEXT = frozenset({"ConditioningZeroOut"})  # its output does not depend on the text (nodes.py, 0.18.1)
MAX_DEPTH = 150

Text = frozenset[Place]  # an encoder can have several fields (clip_l and t5xxl), and all of them get the words


@dataclass
class TextTrace:
    """Follows links upstream to the places that hold the text of one role ("positive" or "negative")."""

    workflow: Workflow
    role: str
    parts: set[Place] = field(default_factory=set)  # all places met that belong to the role by a name
    joined: set[Place] = field(default_factory=set)  # those of which one node makes one text
    computed: set[str] = field(default_factory=set)  # the nodes that make their words up
    known: dict[tuple[str, bool], list[Text]] = field(default_factory=dict)

    def from_samplers(self) -> list[Text]:
        """The texts of the samplers, else of every node that has inputs for both roles. Where nothing takes a positive
        text: of the text encoders, else of inputs named `prompt` (API nodes)."""
        samplers, others = self._sinks()
        for chosen in (samplers, samplers + others):
            texts = [text for node_id in chosen for text in self._of_sink(node_id)]
            if texts or self.computed:
                return texts
        if self.role == "negative" or samplers or others:
            return []
        nodes = in_order(self.workflow)
        texts = [text for node_id in nodes if is_text_encoder(self.workflow, node_id) for text in self.of(node_id)]
        prompts = [node_id for node_id in nodes if not NO_PROMPT.search(self._class(node_id))]
        return texts or [text for node_id in prompts for text in self._at(node_id, "prompt")]

    def all_parts(self) -> set[Place]:
        """Every place that has a part in the role's text."""
        samplers, others = self._sinks()
        for node_id in samplers or others:
            self._of_sink(node_id)
        return self.parts

    def _sinks(self) -> tuple[list[str], list[str]]:
        """The nodes that take the role by an input's name, or are samplers that take one conditioning for it: samplers
        and guiders, and the rest."""
        samplers, others = [], []
        for node_id in in_order(self.workflow):
            (names, by_role), class_type = self._for_role(node_id), self._class(node_id)
            if names and SAMPLER.search(class_type) and not (by_role and SHOWS.search(class_type)):
                samplers.append(node_id)
            elif by_role and not SHOWS.search(class_type):
                others.append(node_id)
        return samplers, others

    def _of_sink(self, node_id: str) -> list[Text]:
        names, named = self._for_role(node_id)
        return [text for name in names for text in self._at(node_id, name, named)]

    def of(self, node_id: str, named: bool = False, depth: int = 0) -> list[Text]:
        """The texts that a node's output comes from, one or alternatives.

        `named`: an input on the way was the role's by its name. Without one, no text counts as negative.
        """
        key = (node_id, named)
        if key not in self.known:
            self.known[key] = []  # for cycles
            if self._class(node_id) not in ENDS_TEXT and depth < MAX_DEPTH:
                self.known[key] = self._find(node_id, named, depth)
        return self.known[key]

    def _find(self, node_id: str, named: bool, depth: int) -> list[Text]:
        class_type, links = self._class(node_id), links_of(self.workflow, node_id)
        is_encoder = is_text_encoder(self.workflow, node_id)
        names, by_role = self._for_role(node_id)
        if not names:
            names = self._words(node_id)
            reads_media = bool(names) and not is_encoder and any(map(MEDIA.fullmatch, links))
            if (reads_media or MAKES_UP_WORDS.search(class_type)) and not ENHANCES_WORDS.search(class_type):
                self.computed.add(node_id)
                return []
        names = names or [name for name in self._texty(node_id) if name in links and not NO_WAY.search(name)]
        found = {name: self._at(node_id, name, named or by_role, depth) for name in names}
        texts = [texts for texts in found.values() if texts]
        if is_encoder and all(len(alternatives) == 1 for alternatives in texts):  # every field of it gets the words
            return [frozenset().union(*(alternatives[0] for alternatives in texts))] if texts else []
        if not is_encoder and not by_role:  # a node of its own for a text wins over what a concatenation adds to it
            texts = [alternatives for name, alternatives in found.items() if name in links and alternatives] or texts
        together = list(dict.fromkeys(text for alternatives in texts for text in alternatives))
        if len(texts) > 1:
            self.joined.update(*together)
        return together

    def _at(self, node_id: str, name: str, named: bool = False, depth: int = 0) -> list[Text]:
        """The texts that one input comes from."""
        place = Place(node_id, name)
        value = value_at(self.workflow, place)
        if (source := source_of(self.workflow, value)) is not None:
            return self.of(source, named, depth + 1)
        if not isinstance(value, str) or (self.role == "negative" and not named):
            return []
        if named:
            self.parts.add(place)
        return [frozenset({place})]

    def _class(self, node_id: str) -> str:
        return str(self.workflow[node_id]["class_type"])

    def _for_role(self, node_id: str) -> tuple[list[str], bool]:
        """The inputs that are the role's by their name, and True; else those for conditioning, and False."""
        names, links = self._texty(node_id), links_of(self.workflow, node_id)
        by_role = [name for name in names if ROLE_NAMES[self.role].fullmatch(name)]
        return by_role or [name for name in names if name in links and CONDITIONING.fullmatch(name)], bool(by_role)

    def _words(self, node_id: str) -> list[str]:
        """The inputs that hold words, or are linked to them, by their name and the node's class."""
        names, links = self._texty(node_id), links_of(self.workflow, node_id)
        if NO_WORDS.search(self._class(node_id)):
            names = [name for name in names if name in links]
        words = [name for name in names if WORDS.fullmatch(name)]
        return words or [name for name in names if STRINGS.fullmatch(name) and STRING_NODE.search(self._class(node_id))]

    def _texty(self, node_id: str) -> list[str]:
        """The inputs that hold a string or a link, without those that the other role has by their name."""
        links, other = links_of(self.workflow, node_id), ROLE_NAMES[OPPOSITE[self.role]]
        inputs = self.workflow[node_id]["inputs"].items()
        return [
            name for name, value in inputs if (isinstance(value, str) or name in links) and not other.fullmatch(name)
        ]


def is_text_encoder(workflow: Workflow, node_id: str) -> bool:
    is_called_so = TEXT_ENCODER.search(workflow[node_id]["class_type"])
    return bool(is_called_so) or any(map(ENCODER_MODEL.search, linked_inputs(workflow, node_id)))


def linked_inputs(workflow: Workflow, node_id: str) -> list[str]:
    """The names of a node's inputs that come by link, also by one that leads nowhere."""
    return [name for name, value in workflow[node_id]["inputs"].items() if is_linked(value)]


def plan_text(workflow: Workflow, text: str, role: str = "positive", node_id: str | None = None) -> list[Change]:
    """The places where the text of `role` ("positive" or "negative") lives, found by tracing the graph from the
    samplers, or from the node that was named.

    Raises InputError where no text, or more than one, feeds only this role: guessing could overwrite the other one.
    """
    trace = TextTrace(workflow, role)
    texts = trace.of(node_id, named=True) if node_id is not None else trace.from_samplers()
    others = TextTrace(workflow, OPPOSITE[role]).all_parts() if node_id is None else set()
    own = list(dict.fromkeys(text for text in texts if not text & others))
    own = [text for text in own if not _adds_nothing(workflow, text, own)] or own
    places = by_place(place for text in own for place in text)
    literals = {value_at(workflow, place) for place in places}
    if len(own) == 1 or (len(literals) == 1 and (literals != {""} or not trace.joined)):
        return [Change(place, text) for place in places]
    found = by_place(place for text in texts for place in text)
    raise InputError(_no_text_message(workflow, trace, places, found, node_id))


def _adds_nothing(workflow: Workflow, text: Text, others: Sequence[Text]) -> bool:
    """Whether a text is empty. But a node of its own for a string waits for words, unless another one has them."""
    if any(value_at(workflow, place) for place in text):
        return False
    if any(linked_inputs(workflow, place.node_id) for place in text):
        return True
    places = [place for other in others for place in other if value_at(workflow, place)]
    return not all(linked_inputs(workflow, place.node_id) for place in places)


def _no_text_message(
    workflow: Workflow, trace: TextTrace, own: Sequence[Place], found: Sequence[Place], node_id: str | None
) -> str:
    """`own`: the places to choose from; `found`: also those of the other role; `node_id`: the node that was named."""
    role, option = trace.role, TEXT_OPTIONS[trace.role]
    if own:
        hint = f"name a node as in {option} {one_line(own[0].node_id, 40)}=TEXT, or use --set {own[0]}=TEXT"
        return f"the {role} text could go into several places: {places_shown(workflow, own)}; {hint}"
    if found:
        hint = f"give each a node of its own, or change both with --set {found[0]}=TEXT"
        return f"the {role} text is also the {OPPOSITE[role]} one: {places_shown(workflow, found)}; {hint}"
    words = [
        Place(node_id, name)
        for node_id in in_order(workflow)
        for name, value in workflow[node_id]["inputs"].items()
        if isinstance(value, str) and (WORDS.fullmatch(name) or name in ("value", "string"))
    ]
    hint = f"texts that --set can change: {places_shown(workflow, words)}" if words else "the workflow holds no text"
    if trace.computed:
        return f"the {role} text is made up by {labels(workflow, trace.computed)}; {hint}"
    if node_id is not None:
        return f"{option}: {label(workflow, node_id)} gets no {role} text; {hint}"
    return f"no text encoder feeds a {role} input; {hint}"


# --- seeds, and any input by name ------------------------------------------------------------------------------------

SEED_INPUTS = ("seed", "noise_seed", "rand_seed")
MAX_SEED = 2**64 - 1
SEED_LIMIT = 2**31  # nodes of paid APIs take no more (comfy_api_nodes/nodes_openai.py, 0.18.1); others 2**32 and up


def seed_places(workflow: Workflow) -> list[Place]:
    """Where every seed lives, in node-id order: in the node's own input, or in the primitive that it is linked to.

    A primitive whose number also feeds something that is no seed (a width, say) is not among them.
    """
    places: list[Place] = []
    carriers: dict[str, Place] = {}  # nodes that a linked seed comes through, and the place at the end
    for node_id, name in _seed_inputs(workflow):
        value = workflow[node_id]["inputs"][name]
        if isinstance(value, int | float | str) and not isinstance(value, bool):  # str: "{{seed}}" of a template
            places.append(Place(node_id, name))
        elif (holder := _number_behind(workflow, value)) is not None:
            place, way = holder
            carriers |= dict.fromkeys(way, place)
            places.append(place)
    shared = {
        carriers[source]
        for node_id in workflow.keys() - carriers.keys()
        for name, source in links_of(workflow, node_id).items()
        if source in carriers and "seed" not in name.lower()
    }
    return by_place(place for place in places if place.input_name in SEED_INPUTS or place not in shared)


def seeds_left(workflow: Workflow, changes: Iterable[Change]) -> list[Place]:
    """The seeds that are linked to something which the changes do not reach."""
    changed = {change.place for change in changes}
    linked = {place: value_at(workflow, place) for place in _seed_inputs(workflow)}
    return [
        place
        for place, value in linked.items()
        if source_of(workflow, value) is not None
        and ((holder := _number_behind(workflow, value)) is None or holder[0] not in changed)
    ]


def _seed_inputs(workflow: Workflow) -> list[Place]:
    names = itertools.product(in_order(workflow), SEED_INPUTS)
    return [Place(node_id, name) for node_id, name in names if name in workflow[node_id]["inputs"]]


def _number_behind(workflow: Workflow, value: object) -> tuple[Place, list[str]] | None:
    """The one number that a link comes from, and the nodes on the way: through primitives and sums with one link."""
    way: list[str] = []
    while (node_id := source_of(workflow, value)) is not None and node_id not in way and len(way) < MAX_DEPTH:
        way.append(node_id)
        inputs, links = workflow[node_id]["inputs"], links_of(workflow, node_id)
        names = [name for name in SEED_INPUTS if name in inputs] or list(links)
        names = names or [name for name, number in inputs.items() if is_whole_number(number)]
        if len(names) != 1:
            return None
        value = inputs[names[0]]
        if is_whole_number(value) or (names[0] in SEED_INPUTS and not is_linked(value)):
            return Place(node_id, names[0]), way
    return None


def is_whole_number(value: object) -> TypeGuard[int]:
    return type(value) is int


def plan_seeds(workflow: Workflow, draw: Callable[[], int]) -> list[Change]:
    """A new value for every seed; one draw for each node."""
    places = seed_places(workflow)
    draws = {node_id: draw() for node_id in dict.fromkeys(place.node_id for place in places)}
    return [Change(place, draws[place.node_id]) for place in places]


def plan_set(workflow: Workflow, assignment: str) -> Change:
    """The change that `NODE.INPUT=VALUE` asks for. VALUE is JSON or a string; a string where the input holds one now.

    Raises InputError for what is not there, and for links, which are never cut or made.
    """
    target, equals, text = assignment.partition("=")
    dots = [match.start() for match in re.finditer(r"\.", target)]
    if not equals or not dots:
        raise InputError(f"--set {one_line(assignment, 60)} has not the form NODE.INPUT=VALUE")
    # Both can have dots: the longest node id that there is.
    dot = next((dot for dot in reversed(dots) if target[:dot] in workflow), dots[0])
    place = Place(target[:dot], target[dot + 1 :])
    node_id, name = place
    if node_id not in workflow:
        raise InputError(f"--set: there is no node {one_line(node_id, 40)}{nearest(node_id, in_order(workflow))}")
    inputs = workflow[node_id]["inputs"]
    if name not in inputs:
        raise InputError(f"--set: {label(workflow, node_id)} has no input {one_line(name, 60)}{nearest(name, inputs)}")
    if is_linked(inputs[name]):
        source = source_of(workflow, inputs[name])
        origin = label(workflow, source) if source is not None else "a node that is not there"
        raise InputError(f"--set: {place} comes by link from {origin}; set an input of that one")
    value = parse_value(text)
    if is_linked(value):
        raise InputError(f"--set {place}: ComfyUI would take a list for a link")
    if isinstance(inputs[name], str) and not isinstance(value, str):
        value = text
    if isinstance(inputs[name], bool) and not isinstance(value, bool):  # ComfyUI takes any other text for true
        if text.lower() not in ("true", "false"):
            raise InputError(f"--set {place} takes true or false")
        value = text.lower() == "true"
    return Change(place, value)


def parse_value(text: str) -> Any:
    """JSON, else the text itself; also for NaN and Infinity, which are no JSON."""

    def refuse(_: str) -> NoReturn:
        raise ValueError

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Files: pictures as ComfyUI reads them
# ---------------------------------------------------------------------------------------------------------------------

AS_THEY_ARE = frozenset({"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"})  # formats that ComfyUI's Pillow always reads
LOSSY = frozenset({"JPEG", "MPO", "HEIF", "AVIF"})
EIGHT_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La"})
ORIENTATION = 0x0112  # Exif 2.3: 1 is upright


@dataclass(frozen=True)
class Picture:
    """An image file as it is sent. `remark` says what was done to it; `suffix` is what its name has to end in."""

    content: bytes
    remark: str = ""
    suffix: str = ""


def read_picture(path: Path, max_side: int | None = None) -> Picture:
    """An image that Pillow can decode to the end: as it is in the file, or written anew where that needs it.

    That is: upright by its Exif orientation, in a format and with colours that ComfyUI reads, not larger than
    `max_side` pixels. A moving picture is never changed. Raises InputError.
    """
    import struct
    import warnings
    import zlib

    from PIL import Image, UnidentifiedImageError

    content = read_file(path, "image")
    with suppress(ImportError):
        import pillow_heif  # type: ignore[import-not-found,unused-ignore]

        pillow_heif.register_heif_opener()
    warnings.filterwarnings("ignore", module="PIL")  # its remarks on odd files; what matters is raised
    damage = (OSError, SyntaxError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError)
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return _prepared(image, content, max_side)
    except (*damage, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        known = "" if isinstance(error, UnidentifiedImageError) else f": {reason_of(error)}"
        reason = known if content else ": it is empty"
        hint = "; `pip install pillow-heif` reads it" if path.suffix.lower() in (".heic", ".heif") else ""
        raise InputError(f"{path} is not an image that can be read{reason}{hint}") from error


def _prepared(image: Image.Image, content: bytes, max_side: int | None) -> Picture:
    from PIL import ImageOps

    kind, done, changed = str(image.format), [], image
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and (kind in ("GIF", "WEBP", "PNG") or (kind == "TIFF" and image.mode in EIGHT_BIT)):
        shrunk = max_side is not None and max(image.size) > max_side
        return Picture(content, "it moves, so it is sent as it is" if shrunk else "")
    if kind not in AS_THEY_ARE:
        done.append(f"from {kind}")
    if frames > 1 and kind != "MPO":  # whose second picture is a preview, or the other eye's
        done.append(f"the first of {frames} pictures")
    if image.getexif().get(ORIENTATION) in range(2, 9):
        changed = ImageOps.exif_transpose(changed)
        done.append("upright")
    if changed.mode not in EIGHT_BIT:
        done.append(f"{'8 bits' if changed.mode[0] in 'IF' else 'RGB'} instead of {changed.mode}")
        changed = _eight_bit(changed)
    if max_side is not None and max(changed.size) > max_side:
        before = changed.size
        changed = changed.convert({"P": "RGBA", "PA": "RGBA", "1": "L"}.get(changed.mode, changed.mode))
        changed.thumbnail((max_side, max_side))
        done.append(f"{changed.width} x {changed.height} instead of {before[0]} x {before[1]}")
    if not done:
        return Picture(content)
    stream = io.BytesIO()
    # Without the colour profile where it belonged to colours that the picture has no more.
    profile = image.info.get("icc_profile") if changed.getbands()[:3] == image.getbands()[:3] else None
    as_jpeg = kind in LOSSY and changed.mode in ("L", "RGB")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if as_jpeg else {"compress_level": 4}
    options["icc_profile"] = profile if isinstance(profile, bytes) else None
    changed.save(stream, "JPEG" if as_jpeg else "PNG", **options)
    remark = f"{', '.join(done)}; {len(content) / 1e6:.2f} -> {stream.tell() / 1e6:.2f} MB"
    return Picture(stream.getvalue(), remark, ".jpg" if as_jpeg else ".png")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Integers of 16 bits and floats from 0 to 1 scaled to a byte, larger ones by their maximum; other modes as RGB."""
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    wide = image.convert("F")
    top = float(wide.getextrema()[1])  # type: ignore[arg-type]
    usual = 1.0 if image.mode == "F" else 65535.0
    return wide.point(lambda value: value * (255.0 / max(usual, top))).convert("L")


@dataclass
class Job:
    """What is sent. `images` and `files` map names to contents, or to https URLs that the worker fetches."""

    workflow: Workflow
    images: dict[str, bytes | str] = field(default_factory=dict)
    files: dict[str, bytes | str] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the files by their names, for run.json
    recorded: Mapping[str, Any] = field(default_factory=dict)  # the same of the run.json that the workflow comes from
    wishes: dict[str, Any] = field(default_factory=dict)  # debug, output_format, output_quality
    timeout_s: float = 1800.0

    def sent(self) -> dict[str, bytes | str]:
        return {**self.images, **self.files}


MIN_EXECUTION_TIMEOUT_MS = 5_000  # RunPod takes 5 s to 7 days
RUN_LIMIT_BYTES, RUNSYNC_LIMIT_BYTES = 10_000_000, 20_000_000  # of a request's body (docs.runpod.io: 10 and 20 MB)


def request_body(job: Job) -> bytes:
    """The body of /run and /runsync. Raises InputError for what JSON cannot hold."""

    def encoded(files: Mapping[str, bytes | str]) -> dict[str, str]:
        return {
            name: data if isinstance(data, str) else base64.b64encode(data).decode() for name, data in files.items()
        }

    request: dict[str, Any] = {"workflow": job.workflow, "images": encoded(job.images), "files": encoded(job.files)}
    request = {key: value for key, value in request.items() if value} | job.wishes
    timeout_ms = max(MIN_EXECUTION_TIMEOUT_MS, round(job.timeout_s * 1000))
    return workflow_json({"input": request, "policy": {"executionTimeout": timeout_ms}})


def workflow_json(request: Mapping[str, Any]) -> bytes:
    """Raises InputError."""
    try:
        return json.dumps(request, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"the workflow cannot be sent as JSON: {one_line(error, 120)}") from error


def size_warning(job: Job, size_bytes: int, sync: bool) -> str | None:
    """What to say of a request that RunPod will not take."""
    limit_bytes = RUNSYNC_LIMIT_BYTES if sync else RUN_LIMIT_BYTES
    if size_bytes <= limit_bytes:
        return None
    sizes = ", ".join(f"{name} {len(data) * 4 / 3e6:.1f} MB" for name, data in job.sent().items()) or "no files"
    helps = "" if sync or size_bytes > RUNSYNC_LIMIT_BYTES else ", or --sync, which takes 20 MB"
    return (
        f"the request has {size_bytes / 1e6:.1f} MB ({sizes}) and RunPod takes {limit_bytes / 1e6:.0f} MB; "
        f"what helps: --max-side N for smaller pictures{helps}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Servers: a RunPod endpoint, or ComfyUI itself; a job is handed over, followed, cancelled
# ---------------------------------------------------------------------------------------------------------------------

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
CANCEL_TIMEOUT_S = 10
SILENCE_LIMIT_S = 120  # without one usable answer for this long, following a job is given up
SLEEP_GAP_S = 30  # a pause that took this much longer than asked: the computer was asleep
FIRST_POLL_S, LAST_POLL_S = 0.1, 5.0
POLL_GROWTH = 1.5
MAX_RETRY_AFTER_S = 60.0
RUNSYNC_WAIT_MS = 1_000  # the least that RunPod takes: the job's id has to be known early, to follow and to cancel it

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})
JOB_ID = re.compile(r"[\w.-]{1,200}")
HANDOVER_FAILED = "the job could not be handed over; it may have been taken all the same, and then runs to its end"

Status = dict[str, Any]  # as GET /status answers: `status`, `output`, `error`, `delayTime`, `executionTime`


class Server(ABC):
    """One HTTP server that runs jobs. `deadline` arguments are readings of `now`. Methods raise PlatformError."""

    last_poll_s = LAST_POLL_S

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        import requests

        def bearer(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if key is not None:
                request.headers["Authorization"] = f"Bearer {key}"
            return request

        self._session = requests.Session()
        self._session.auth = bearer  # a plain header would lose against an entry in ~/.netrc
        self._base = url.rstrip("/")
        self._clock = clock
        self._slept_s = 0.0
        self.sleep = sleep
        self.is_handing_over = False  # a request is under way with which a job begins

    @abstractmethod
    def submit(self, job: Job, deadline: float) -> str:
        """Starts the job and returns its id."""

    @abstractmethod
    def status(self, job_id: str) -> Status:
        """The job's state now."""

    @abstractmethod
    def _cancel(self, job_id: str) -> str:
        """One attempt of `cancel`."""

    def cancel(self, job_id: str) -> str:
        """Takes the job out of the queue, or stops it; returns its state then. Without a usable answer it is tried for
        CANCEL_TIMEOUT_S, and not by `sleep`, which Ctrl-C may have ended."""
        deadline, delay_s = self._clock() + CANCEL_TIMEOUT_S, FIRST_POLL_S
        while True:
            try:
                return self._cancel(job_id)
            except Unreachable as error:
                delay_s = max(delay_s * POLL_GROWTH, error.retry_after_s)
                if self._clock() + delay_s > deadline:
                    raise
                time.sleep(delay_s)

    def follow(self, job_id: str, deadline: float, on_status: Callable[[Status], None]) -> Status:
        """Asks until the job is in a final state and returns that answer; gives every other one to `on_status`.

        Raises JobTimedOut at the deadline, and PlatformError once nothing usable was heard for SILENCE_LIMIT_S. Time
        that the computer sleeps does not count.
        """
        delay_s, heard_at, state = FIRST_POLL_S, self.now(), None
        while True:
            retry_after_s = 0.0
            try:
                status = self.status(job_id)
            except Unreachable as error:
                if error.busy:
                    heard_at = self.now()
                elif self.now() - heard_at > SILENCE_LIMIT_S:
                    raise PlatformError(f"job {job_id} is out of sight and may still run: {error}") from error
                retry_after_s = error.retry_after_s
            else:
                heard_at = self.now()
                if status["status"] in FINAL_STATES:
                    return status
                on_status(status)
                if status["status"] != state:
                    state, delay_s = status["status"], FIRST_POLL_S
            delay_s = self._wait(delay_s, retry_after_s, deadline)

    def now(self) -> float:
        """Seconds by `clock`, without those that the computer slept: they are nobody's delay."""
        return self._clock() - self._slept_s

    def _note_sleep(self, began: float, longest_s: float) -> None:
        """A step that took much longer than it can."""
        late_s = self.now() - began - longest_s
        if late_s > SLEEP_GAP_S:
            self._slept_s += late_s

    def _wait(self, delay_s: float, retry_after_s: float, deadline: float) -> float:
        """Pauses, at most to the deadline; returns the next delay."""
        began = self.now()
        if deadline <= began:
            raise JobTimedOut("the job was not done within --timeout")
        pause_s = min(max(delay_s, retry_after_s), deadline - began)
        self.sleep(pause_s)
        self._note_sleep(began, pause_s)
        return min(delay_s * POLL_GROWTH, self.last_poll_s)

    def call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        files: Mapping[str, Any] | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        missing: str = "",
    ) -> dict[str, Any]:
        """One request; the JSON object that was answered. `missing`: what HTTP 404 means. Redirects are not followed:
        neither API has any."""
        import requests

        request, began = f"{method} {self._base}{path}", self.now()
        try:
            response = self._session.request(
                method,
                self._base + path,
                # http.client sends a file in blocks, each with its own timeout; bytes would have to be out within one.
                data=io.BytesIO(body) if body is not None else None,
                files=files,
                headers={"Content-Type": "application/json"} if body is not None else {},
                timeout=(CONNECT_TIMEOUT_S, read_timeout_s),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise Unreachable(f"{request}: {reason_of(error)}") from error
        finally:
            self._note_sleep(began, CONNECT_TIMEOUT_S + read_timeout_s)
        return read_answer(response, request, missing)


def read_answer(response: requests.Response, request: str, missing: str = "") -> dict[str, Any]:
    code = response.status_code
    text = response.content[:100_000].decode(errors="replace") if code >= 300 else ""
    if code in (401, 403):
        raise Refused(f"{request}: HTTP {code}, the API key was refused")
    if code == 404:
        raise NotFound(missing or f"{request}: HTTP 404", text)
    if code == 429 or code >= 500:
        header = response.headers.get("Retry-After", "").strip()
        # 0 for its rarer form, a date, which needs both clocks to agree.
        pause_s = min(float(header), MAX_RETRY_AFTER_S) if re.fullmatch(r"[0-9]{1,9}", header) else 0.0
        raise Unreachable(f"{request}: HTTP {code}", busy=code == 429, retry_after_s=pause_s)
    if code >= 300:
        raise Refused(f"{request}: HTTP {code}, {one_line(text, 300) or 'no reason given'}", text)
    try:
        answer = parse_json(response.content or b"{}")
    except ValueError as error:
        raise Unreachable(f"{request}: HTTP {code} with something that is not JSON") from error
    if not isinstance(answer, dict):
        raise Unreachable(f"{request}: HTTP {code} with JSON that is not an object")
    return answer


def job_id_of(answer: Mapping[str, Any], key: str) -> str:
    job_id = answer.get(key)
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise PlatformError("the server took the job and named no id for it that could be asked for")
    return job_id


class Endpoint(Server):
    """A RunPod Serverless endpoint, as docs.runpod.io describes its /run, /runsync, /status and /cancel."""

    def __init__(
        self,
        url: str,
        endpoint_id: str,
        key: str,
        *,
        sync: bool = False,
        warn: Callable[[str], object] = print,
        **clock: Any,
    ) -> None:
        super().__init__(f"{url.rstrip('/')}/{quote(endpoint_id, safe='')}", key, **clock)
        self._sync = sync
        self._warn = warn

    def submit(self, job: Job, deadline: float) -> str:
        """Sent again only after HTTP 429: otherwise a second job could be billed."""
        body, delay_s = request_body(job), FIRST_POLL_S
        if warning := size_warning(job, len(body), self._sync):
            self._warn(warning)
        path = f"/runsync?wait={RUNSYNC_WAIT_MS}" if self._sync else "/run"
        missing = f"there is no endpoint at {self._base}"
        while True:
            self.is_handing_over = True
            try:
                return job_id_of(self.call("POST", path, body=body, missing=missing), "id")
            except Unreachable as error:
                if not error.busy:
                    raise PlatformError(f"{HANDOVER_FAILED}: {error}") from error
                self.is_handing_over = False
                delay_s = self._wait(delay_s, error.retry_after_s, deadline)

    def _cancel(self, job_id: str) -> str:
        missing = f"RunPod does not know job {job_id}"
        answer = self.call("POST", f"/cancel/{job_id}", read_timeout_s=CANCEL_TIMEOUT_S, missing=missing)
        return str(answer.get("status", "CANCELLED"))

    def status(self, job_id: str) -> Status:
        missing = f"RunPod no longer knows job {job_id}: its time to live is over"
        status = self.call("GET", f"/status/{job_id}", missing=missing)
        if not isinstance(status.get("status"), str):
            raise Unreachable("an answer without a status")
        return status


class ComfyUI(Server):
    """ComfyUI itself, as behind an SSH tunnel: the same jobs, without a worker in between.

    Routes and shapes are those of server.py, 0.3.64 to 0.18.1.
    """

    NONCE_INPUT = "__job_nonce"
    last_poll_s = 1.0  # nobody counts the requests here

    def __init__(self, url: str, **clock: Any) -> None:
        super().__init__(url, **clock)
        self._has_jobs = True  # /api/jobs came with 0.18
        self._is_ours = False  # else the job is one that was queued before, or by somebody else
        self._renamed: dict[str, str] = {}
        self._warnings: list[str] = []

    def submit(self, job: Job, deadline: float) -> str:
        names = {name: self._upload(name, data) for name, data in job.sent().items()}
        places = [slot.place for slot in all_slots(job.workflow)]
        moved = [Change(place, names[name]) for place in places if (name := value_at(job.workflow, place)) in names]
        self._is_ours = True
        return self._queue(apply_changes(job.workflow, moved))

    def _upload(self, name: str, data: bytes | str) -> str:
        """Stores a file in ComfyUI's input folder; returns the name that it has there. Nothing is overwritten."""
        if isinstance(data, str):
            raise InputError(f"ComfyUI itself takes no URLs; save {name} and give the file")
        try:
            answer = self.call("POST", "/upload/image", files={"image": (name, data)})
        except Unreachable as error:
            raise PlatformError(f"{name} could not be sent: {error}") from error
        stored = answer.get("name")
        return "/".join(filter(None, [answer.get("subfolder"), stored])) if isinstance(stored, str) else name

    def _queue(self, workflow: Workflow, more: Collection[str] = (), refused: Collection[str] = ()) -> str:
        """Queues it with one input that no other job has, in the nodes that nothing links from, and `more`, without
        those that `refused` it; returns the job's id.

        Else ComfyUI answers a workflow that it has run before with the names of files that may be gone, or another's
        by now. A node that is no output node never runs, so the input does not matter there.
        """
        nonce = f"{random.getrandbits(32):08x}"  # the same on all: equal nodes stay one execution
        fresh = (workflow.keys() - linked_from(workflow)).union(more).difference(refused) & workflow.keys()
        workflow = apply_changes(workflow, [Change(Place(node_id, self.NONCE_INPUT), nonce) for node_id in fresh])
        # Without a client_id a prompt that comes from the cache has no outputs in its history (0.18.1).
        body = workflow_json({"prompt": workflow, "client_id": f"{random.getrandbits(128):032x}"})
        self.is_handing_over = True
        try:
            answer = self.call("POST", "/prompt", body=body)
        except Refused as error:
            raise JobFailed(f"[PROMPT_REJECTED] {refusal(error.text)}") from error
        except Unreachable as error:
            raise PlatformError(f"{HANDOVER_FAILED}: {error}") from error
        self._warnings = node_sentences(answer.get("node_errors"))
        return job_id_of(answer, "prompt_id")

    def follow(self, job_id: str, deadline: float, on_status: Callable[[Status], None]) -> Status:
        """Queued again where a node does not take the nonce, or others named files that an earlier job made."""
        current, more, refused = job_id, set[str](), set[str]()  # `more`: nodes with the nonce that others link from
        while True:
            status = super().follow(current, deadline, on_status)
            stale = set(status.get("stale", ())) if self._is_ours else set()
            refusing = {str(status.get("node_id"))} if self.NONCE_INPUT in str(status.get("error")) else set()
            try:
                workflow = self._workflow_of(current) if stale or refusing else {}
            except ClientError:  # its history was cleared meanwhile
                return {**status, "id": current}
            # One that refuses it runs again where a node runs that it links from.
            sources = {source for node_id in stale & refused for source in links_of(workflow, node_id).values()}
            if refusing <= refused and stale | sources <= more | refused:
                return {**status, "id": current}
            more |= stale | sources
            refused |= refusing
            current = self._renamed[job_id] = self._queue(workflow, more, refused)

    def _workflow_of(self, job_id: str) -> Workflow:
        """What was queued, without the nonce."""
        record = self.call("GET", f"/history/{job_id}").get(job_id)
        workflow = parse_workflow(record["prompt"][2] if isinstance(record, dict) else None)
        for node in workflow.values():
            node["inputs"].pop(self.NONCE_INPUT, None)
        return workflow

    def _cancel(self, job_id: str) -> str:
        """From the queue first, then interrupted until it has let go: ComfyUI can lose an interrupt, and takes one for
        a prompt that it does not run yet without effect."""
        job_id = self._renamed.get(job_id, job_id)
        if (state := str(self.status(job_id)["status"])) in FINAL_STATES:
            return state
        self._post("/queue", {"delete": [job_id]})
        for _ in range(round(CANCEL_TIMEOUT_S / FIRST_POLL_S)):
            try:
                state = str(self.status(job_id)["status"])
            except NotFound:
                return "CANCELLED"
            if state in FINAL_STATES:
                return state
            self._post("/interrupt", {"prompt_id": job_id})
            time.sleep(FIRST_POLL_S)
        raise PlatformError("ComfyUI does not let go of it")

    def _post(self, path: str, order: Mapping[str, Any]) -> None:
        self.call("POST", path, body=json.dumps(order).encode(), read_timeout_s=CANCEL_TIMEOUT_S)

    def status(self, job_id: str) -> Status:
        if self._has_jobs:
            try:
                job = self.call("GET", f"/api/jobs/{job_id}")
            except NotFound as error:
                self._has_jobs = "Job not found" in error.text  # else: the route is not there
            except Unreachable:
                pass  # it fails for outputs that its summary does not understand, which the history has all the same
            else:
                state = {"pending": "IN_QUEUE", "in_progress": "IN_PROGRESS"}.get(str(job.get("status")))
                return (
                    {"status": state} if state else self._final(job_id, job.get("execution_status"), job.get("outputs"))
                )
        # In this order: a prompt enters the history in the step in which it leaves the queue.
        queue = self.call("GET", "/queue")
        for key, state in (("queue_running", "IN_PROGRESS"), ("queue_pending", "IN_QUEUE")):
            if any(isinstance(item, list) and job_id in item[1:2] for item in list_in(queue, key)):
                return {"status": state}
        record = self.call("GET", f"/history/{job_id}").get(job_id)
        if not isinstance(record, dict):
            raise NotFound(f"ComfyUI does not know job {job_id} (any more): was it restarted, or its queue cleared?")
        return self._final(job_id, record.get("status"), record.get("outputs"))

    def _final(self, job_id: str, status: object, outputs: object) -> Status:
        """A finished prompt as RunPod and the worker would tell it."""
        entries = list_in(dict_or_empty(status), "messages")
        events = {entry[0]: entry[1] for entry in entries if isinstance(entry, list) and len(entry) == 2}
        stamps = [dict_or_empty(event).get("timestamp") for event in events.values()]
        times = [stamp for stamp in stamps if is_number(stamp)]
        told: Status = {"executionTime": max(times) - min(times)} if times else {}
        debug = {"debug": {"prompt_id": job_id, "comfyui": self._base}}
        if isinstance(error := events.get("execution_error"), dict):
            where = f"node {error.get('node_id')} ({error.get('node_type')})"
            reason = f"[EXECUTION_FAILED] {where}: {error.get('exception_type')}: {error.get('exception_message')}"
            failure = {"status": "FAILED", "error": one_line(reason), "node_id": error.get("node_id")}
            return {**told, **failure, "output": debug}
        if "execution_interrupted" in events:
            return {**told, "status": "CANCELLED", "output": debug}
        result = comfyui_result(self._base, dict_or_empty(outputs))
        if not any(result.values()):
            hint = "does it end in a SaveImage node or another output node?"
            reason = f"[NO_OUTPUT] the workflow ran and gave nothing; {hint}"
            return {**told, "status": "FAILED", "error": reason, "output": debug}
        made_by = {item["node_id"] for kind in FILE_LISTS for item in result[kind]}
        stale = made_by.intersection(dict_or_empty(events.get("execution_cached")).get("nodes") or ())
        output = {**result, "warnings": self._warnings, **debug}
        return {**told, "status": "COMPLETED", "stale": sorted(stale), "output": output}


def refusal(text: str) -> str:
    """What POST /prompt answered to a workflow that it does not take, in sentences."""
    answer: dict[str, Any] = {}
    with suppress(ValueError):
        answer = dict_or_empty(parse_json(text))
    error = dict_or_empty(answer.get("error"))
    whole = ": ".join(one_line(error[key], 300) for key in ("message", "details") if error.get(key))
    reason = " ".join(node_sentences(answer.get("node_errors"))) or whole or one_line(text, 300) or "no reason given"
    return f"ComfyUI refused the workflow: {reason}"


def node_sentences(node_errors: object) -> list[str]:
    """A sentence for each fault of each node, of a refusal or of a workflow of which only a part is taken."""
    sentences = [
        f"Node {node_id} ({node.get('class_type')}): {error.get('message')}: {error.get('details')}."
        for node_id, node in dict_or_empty(node_errors).items()
        for error in list_in(dict_or_empty(node), "errors")
        if isinstance(error, dict)
    ]
    return [one_line(sentence, 300) for sentence in sentences[:20]]


FILE_LISTS = ("images", "videos", "audio", "files")
FILE_KEYS = {"filename": "", "subfolder": "", "type": "output"}


def comfyui_result(base: str, outputs: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What the history names, as the worker's result: files as links to /view, texts. Previews only if nothing is
    saved. Every key of a node's output can hold files (images, gifs, audio, 3d ...)."""
    import mimetypes

    entries = [
        (node_id, entry)
        for node_id, output in outputs.items()
        for key in dict_or_empty(output)
        for entry in list_in(output, key)
    ]
    files: dict[str, tuple[str, str, str]] = {}  # by the query of their link; an output can name one twice
    for node_id, entry in entries:
        if isinstance(entry, dict) and isinstance(name := entry.get("filename"), str) and name:
            where = {key: entry.get(key) or usual for key, usual in FILE_KEYS.items()}
            files.setdefault(urlencode(where), (node_id, name, where["type"]))
    kept = "output" if any(place == "output" for _, _, place in files.values()) else "temp"
    result: dict[str, list[Any]] = {kind: [] for kind in (*FILE_LISTS, "texts")}
    for query, (node_id, name, place) in files.items():
        if place == kept:
            kind = str(mimetypes.guess_type(name)[0]).partition("/")[0]
            item = {"filename": name, "type": "url", "data": f"{base}/view?{query}", "node_id": node_id}
            result[{"image": "images", "video": "videos", "audio": "audio"}.get(kind, "files")].append(item)
    result["texts"] = [
        {"node_id": node_id, "text": text if isinstance(text, str) else json.dumps(text)}
        for node_id, output in outputs.items()
        for key in ("text", "tags", "string")
        for text in leaves(dict_or_empty(output).get(key))
    ]
    return result


def leaves(value: object) -> list[str | int | float]:
    """The strings and numbers of a value, out of lists in lists too."""
    pending, found = [value], []
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += reversed(value)
        elif isinstance(value, str | int | float):
            found.append(value)
    return found


# --- what a final state means, and what is shown before it -----------------------------------------------------------

TIMEOUT_REASON = re.compile(r"executionTimeout exceeded|\[JOB_TIMEOUT\]")  # by RunPod and by the worker, both FAILED


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
    because = f": {reason}" if reason else ""
    if state == "TIMED_OUT" or TIMEOUT_REASON.search(reason):
        raise JobTimedOut(f"the job ran out of time on RunPod{because}")
    raise JobFailed(f"the job {'was cancelled' if state == 'CANCELLED' else 'failed'}{because}")


def failure_reason(status: Mapping[str, Any]) -> str:
    """`error` as one line. The SDK encodes a raised exception as JSON (runpod 1.12.0, serverless/modules/rp_job.py)."""
    error = status.get("error")
    if isinstance(error, str) and error.lstrip().startswith("{"):
        with suppress(ValueError):
            error = parse_json(error)
    if isinstance(error, dict):
        error = error.get("error_message") or error.get("message") or error
    reason = one_line(error) if error else ""
    code = dict_or_empty(status.get("output")).get("error_code")
    return reason if not code or str(code) in reason else f"[{one_line(code, 40)}] {reason}".rstrip()


def describe_progress(status: Mapping[str, Any]) -> tuple[str, float | None]:
    """A running job's state in words, and percent where known. Every key of a progress update is optional."""
    state, update = one_line(status.get("status"), 40), status.get("output")
    if state == "IN_QUEUE":
        return "waiting in the queue", None
    queued = status.get("delayTime")
    queue = f"queue {queued / 1000:.1f} s, " if is_number(queued) else ""
    if not isinstance(update, dict):
        words = one_line(update, 80) if isinstance(update, str) else state.lower().replace("_", " ")
        return queue + words, None
    parts = [one_line(update[key], 40) for key in ("stage", "node_class") if isinstance(update.get(key), str)]
    if isinstance(update.get("node"), str):
        parts.append(f"(node {one_line(update['node'], 40)})")
    if is_number(update.get("value")) and is_number(update.get("max")):
        parts.append(f"{update['value']}/{update['max']}")
    percent = update.get("percent")
    known = float(percent) if is_number(percent) and 0 <= percent <= 100 else None
    return queue + (" ".join(parts) or "running"), known


def is_number(value: object) -> TypeGuard[float]:
    """Of a size that has a meaning here: the SDK sends NaN on, and JSON knows no limits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def dict_or_empty(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def list_in(output: Mapping[str, Any], key: str) -> list[Any]:
    found = output.get(key)
    return found if isinstance(found, list) else []


class ProgressDisplay:
    """Shows progress on a stream: a bar on a terminal, elsewhere one line for each change; None: nowhere."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._last = ""
        self._bar: Any = None
        if stream is not None and stream.isatty():
            with suppress(ImportError):  # lines will do
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
            write_line(self._stream, text)
        self._last = text


# ---------------------------------------------------------------------------------------------------------------------
# Saving: every item of a result becomes a new file
# ---------------------------------------------------------------------------------------------------------------------

MAX_STEM_BYTES = 180  # with a number and a suffix still below the 255 bytes that file systems take
RESERVED_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)  # on Windows
DOWNLOAD_LIMIT_S = 600


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


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name, numbered where it is taken; upper and lower case count as the same."""
    used = {other.casefold() for other in taken}
    return next(candidate for candidate in numbered(name) if candidate.casefold() not in used)


def save_new(directory: Path, name: str, chunks: Iterable[bytes]) -> Path:
    """Writes a new file and returns its path; it appears whole, or not at all, and never replaces another.

    Raises JobFailed where the file cannot be written, and whatever `chunks` raises.
    """
    partial = directory / f".partial-{random.SystemRandom().getrandbits(64):016x}"
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
        return partial.replace(_reserve(directory, name))
    except OSError as error:
        raise JobFailed(f"{name} cannot be written into {directory}: {reason_of(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def _reserve(directory: Path, name: str) -> Path:
    """Makes an empty file under the first free name: with O_EXCL, which also refuses a link that leads nowhere."""
    candidates = numbered(name)
    while True:
        path = directory / next(candidates)
        with suppress(FileExistsError):
            path.open("xb").close()
            return path


def save_result(output: Mapping[str, Any], directory: Path, on_saved: Callable[[Path], object]) -> list[ClientError]:
    """Saves every item of a result and tells each path; returns what went wrong. A broken item stops no other."""
    failures: list[ClientError] = []
    lists = {kind: output.get(kind, []) for kind in FILE_LISTS}
    for kind, items in lists.items():
        if not isinstance(items, list):
            failures.append(JobFailed(f"the result's {kind} are not a list"))
            continue
        for item in items:
            name = safe_basename(dict_or_empty(item).get("filename"), fallback=kind.removesuffix("s"))
            try:
                on_saved(save_new(directory, name, item_chunks(item)))
            except ClientError as error:
                failures.append(type(error)(f"{name} is not saved: {error}"))
    if not any(lists.values()) and not failures and not output.get("texts"):
        failures.append(JobFailed("the job succeeded and made nothing to save"))
    return failures


def item_chunks(item: object) -> Iterator[bytes]:
    """The bytes of one item of a result: plain Base64, a data URI, or a URL.

    Raises PlatformError, and JobFailed, also at the end where nothing came, or not the size that was announced.
    """
    if not isinstance(item, dict):
        raise JobFailed(f"it is no object but {type(item).__name__}")
    data, announced, total = item.get("data"), item.get("size_bytes"), 0
    if not isinstance(data, str) or not data:
        raise JobFailed("it has no data")
    is_url = item.get("type") == "s3_url" or data.startswith(("https://", "http://"))
    for chunk in _download(data) if is_url else [_decode(data)]:
        total += len(chunk)
        yield chunk
    if total == 0 or (is_number(announced) and total != announced):
        raise JobFailed(f"it has {total} bytes{f' instead of {announced}' if is_number(announced) else ''}")


def _decode(data: str) -> bytes:
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except ValueError as error:
        raise JobFailed(f"its data is not Base64: {one_line(error, 100)}") from error


def _download(url: str) -> Iterator[bytes]:
    """The body behind a presigned URL, streamed. It goes without the endpoint's key."""
    import requests

    deadline = time.monotonic() + DOWNLOAD_LIMIT_S
    try:
        timeout_s = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        # With `auth`, because an entry in ~/.netrc would spoil a presigned URL.
        with requests.get(url, stream=True, timeout=timeout_s, auth=lambda request: request) as response:
            if response.status_code != 200:
                hint = "; the link is not valid, or not any more" if response.status_code == 403 else ""
                raise PlatformError(f"its download gave HTTP {response.status_code}{hint}")
            for chunk in response.iter_content(1 << 20):
                if time.monotonic() > deadline:
                    raise PlatformError(f"its download took more than {DOWNLOAD_LIMIT_S} s")
                yield chunk
    except (requests.RequestException, ValueError) as error:  # ValueError: a URL that cannot be taken apart
        raise PlatformError(f"its download failed: {reason_of(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Jobs: one from the options to the saved files; many of them
# ---------------------------------------------------------------------------------------------------------------------

Options = argparse.Namespace
Connect = Callable[..., Server]
STATUS_FACTS = ("delayTime", "executionTime", "workerId")


@dataclass
class Report:
    """How one job ended; what --json prints and --save-run stores."""

    job_id: str | None = None
    state: str = ""
    exit_code: ExitCode = ExitCode.SAVED
    saved: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    timings_ms: dict[str, int] = field(default_factory=dict)
    debug: dict[str, Any] = field(default_factory=dict)
    workflow: Workflow | None = None

    def fail(self, error: ClientError) -> None:
        self.errors.append(str(error))
        self.exit_code = self.exit_code or error.exit_code

    def as_json(self) -> dict[str, Any]:
        told = {key: value for key, value in asdict(self).items() if value not in ({}, None)}
        return {"ok": not self.exit_code, **told}


def prepare(options: Options, console: Console) -> Job:
    """The job that the options ask for. Reads its files; says what it changes in them and in the workflow."""
    if options.workflow is None:
        raise InputError("--workflow FILE is missing; --help has examples")
    if options.quality is not None and options.format not in ("webp", "jpeg"):
        raise InputError("--quality goes with --format webp or --format jpeg")
    document = read_document(options.workflow)
    workflow = parse_workflow(document)
    job = Job(workflow, timeout_s=options.timeout, recorded=dict_or_empty(dict_or_empty(document).get("sources")))
    changes = plan_changes(workflow, options, read_given(workflow, options, job, console))
    for slot in unfilled(workflow, changes, job.sent()):
        read_recorded(str(value_at(workflow, slot.place)), job, console)
    missing = unfilled(workflow, changes, job.sent())
    if missing and not options.keep_images:
        raise InputError(unfilled_message(workflow, missing))
    for change in changes:
        console.say(change_shown(workflow, change, 100))
    if not options.keep_seeds and (left := places_shown(workflow, seeds_left(workflow, changes))):
        console.warn(f"a seed that does not change, because its number is not a seed's alone: {left}")
    job.workflow = apply_changes(workflow, changes)
    job.changes = {str(change.place): change.value for change in changes}
    job.seeds = {str(place): value_at(job.workflow, place) for place in seed_places(workflow)}
    wishes = {"output_format": options.format, "output_quality": options.quality, "debug": options.debug or None}
    job.wishes = {key: value for key, value in wishes.items() if value is not None}
    return job


def plan_changes(workflow: Workflow, options: Options, given: Sequence[GivenFile] = ()) -> list[Change]:
    """Everything that the options change in the workflow. Raises InputError where two of them change the same."""
    changes = [plan_set(workflow, assignment) for assignment in options.set]
    changes += plan_files(workflow, given, [change.place for change in changes])
    for role, option in TEXT_OPTIONS.items():
        named = [split_named(workflow, text) for text in getattr(options, option.removeprefix("--"))]
        if sum(node_id is None for node_id, _ in named) > 1:
            raise InputError(f"{option} is given more than once; name the nodes, as in {option} NODE=TEXT")
        changes += [change for node_id, text in named for change in plan_text(workflow, text, role, node_id)]
    taken = [change.place for change in changes]
    if twice := [place for place in taken if taken.count(place) > 1]:
        raise InputError(f"{twice[0]} would be set twice; leave one of the options out")
    if options.keep_seeds:
        return changes
    fixed, dice = options.seed, random.SystemRandom()
    seeds = plan_seeds(workflow, lambda: dice.randrange(SEED_LIMIT) if fixed is None else int(fixed))
    if fixed is not None and not seeds:
        raise InputError("--seed: the workflow has no seed of its own")
    return changes + [change for change in seeds if change.place not in taken]


def read_given(workflow: Workflow, options: Options, job: Job, console: Console) -> list[GivenFile]:
    """Puts the files of --img and --file into the job, each under a name of its own."""
    import mimetypes

    given = []
    for text, is_image in [(text, True) for text in options.img] + [(text, False) for text in options.file]:
        try:
            node_id, reference = split_named(workflow, text)
        except InputError:
            if not Path(text).is_file():
                raise
            node_id, reference = None, text
        name = add_file(reference, is_image, options.max_side, job, console)
        kind = "image" if is_image else str(mimetypes.guess_type(name)[0]).partition("/")[0]
        given.append(GivenFile(name, kind if is_image or kind in ("video", "audio") else "file", node_id))
    return given


def read_recorded(name: str, job: Job, console: Console) -> None:
    """Adds the file that a run.json has by this name, where the workflow comes from one. Raises InputError where it is
    not what was sent then."""
    source = dict_or_empty(job.recorded.get(name))
    path, side = source.get("path"), source.get("max_side")
    if not isinstance(path, str):
        return
    side = side if is_whole_number(side) and side > 0 else None
    add_file(path, bool(source.get("is_image")), side, job, console, name)
    if job.sources[name]["sha256"] != source.get("sha256"):
        raise InputError(f"{path} is not what it was in that run; name a file with --img")


def add_file(
    reference: str, is_image: bool, max_side: int | None, job: Job, console: Console, name: str | None = None
) -> str:
    """Reads one file, or takes a URL as it is, into the job; returns the name that it is sent by: its own unless one is
    given, numbered where that is another's."""
    files, fallback = (job.images, "image") if is_image else (job.files, "file")
    source: dict[str, Any] = {"path": reference, "is_image": is_image, "max_side": max_side, "sha256": None}
    content: bytes | str = reference
    if reference.lower().startswith("https://"):
        own_name = url_path(reference)
    elif reference.lower().startswith("http://"):
        raise InputError(f"{one_line(reference, 100)}: only https addresses are taken")
    else:
        path = Path(reference).expanduser()  # no shell does that behind NODE=
        picture = read_picture(path, max_side) if is_image else Picture(read_file(path))
        if picture.remark:
            console.say(f"{path}: {picture.remark}")
        content, own_name = picture.content, path.stem + (picture.suffix or path.suffix)
        source |= {"path": str(path.absolute()), "sha256": sha256(picture.content)}
    name = name or free_name(safe_basename(own_name, fallback), [*job.sent(), *job.recorded])
    files[name], job.sources[name] = content, source
    return name


def url_path(url: str) -> str:
    try:
        return urlsplit(url).path
    except ValueError as error:
        raise InputError(f"{one_line(url, 100)} is no URL: {error}") from error


def sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


@dataclass
class Run:
    """One job from its options to its files. `display` is for progress."""

    options: Options
    console: Console
    display: TextIO | None = None
    began: float = field(default_factory=time.monotonic)
    report: Report = field(default_factory=Report)

    def attempt(self, connected: Connect | None, **clock: Any) -> Report:
        """The report also has what went wrong. None as `connected`: nothing is sent."""
        try:
            self._send(connected(**clock) if connected else None)
        except ClientError as error:
            self.report.fail(error)
        except KeyboardInterrupt:
            self.report.fail(Interrupted("interrupted"))
        self._note_time()
        return self.report

    def _note_time(self) -> None:
        self.report.timings_ms["all"] = round((time.monotonic() - self.began) * 1000)

    def _send(self, server: Server | None) -> None:
        job = Job({}) if self.options.resume else prepare(self.options, self.console)
        self.report.changes, self.report.seeds = job.changes, job.seeds
        if server is None:
            if warning := size_warning(job, len(request_body(job)), self.options.sync):
                self.console.warn(warning)
            self.report.workflow = job.workflow
            return
        make_output_directory(self.options.out)
        server.sleep(0)  # of many jobs, those that were still being prepared end here on Ctrl-C
        deadline = server.now() + self.options.timeout
        try:
            job_id = self.report.job_id = self.options.resume or server.submit(job, deadline)
        except KeyboardInterrupt:
            if server.is_handing_over:
                self.console.warn("if the job was taken before this, it runs to its end: its id did not arrive here")
            raise
        if self.options.detach:
            self.report.state = "IN_QUEUE"
            self.console.result(job_id)
            return
        status = self._followed(server, job_id, deadline)
        self._note(status)
        self._take(outcome(status))
        if self.options.save_run:
            self._note_time()
            store = {**self.report.as_json(), "workflow": job.workflow, "sources": job.sources}
            self._saved(save_new(self.options.out, "run.json", [json.dumps(store, indent=1).encode()]))

    def _followed(self, server: Server, job_id: str, deadline: float) -> Status:
        """The final state. On Ctrl-C, or at the deadline, the job is cancelled, because RunPod bills by time."""
        try:
            self.console.say(f"job {job_id}")
            with ProgressDisplay(self.display) as display:
                return server.follow(job_id, deadline, display.update)
        except (KeyboardInterrupt, JobTimedOut):
            self.console.say(f"cancelling job {job_id}; Ctrl-C leaves it as it is")
            try:
                self.report.state = server.cancel(job_id)
                self.console.say(cancelled(job_id, self.report.state))
            except KeyboardInterrupt:
                self.console.warn(f"job {job_id} may still run; --cancel {job_id} ends it")
                raise
            except ClientError as error:
                self.console.warn(f"job {job_id} could not be cancelled and may still run: {error}")
            raise

    def _note(self, status: Status) -> None:
        """State, times, and with --debug what the worker says about itself and about a failure."""
        output = dict_or_empty(status.get("output"))
        self.report.state = str(status["status"])
        self.report.job_id = str(status.get("id") or self.report.job_id)  # ComfyUI may have got it a second time
        self.report.debug = dict_or_empty(output.get("debug"))
        for name, key in (("queue", "delayTime"), ("run", "executionTime")):
            if is_number(status.get(key)):
                self.report.timings_ms[name] = round(status[key])
        if self.options.debug:
            facts = {name: status[name] for name in STATUS_FACTS if name in status}
            for key in ("timings_ms", "debug", "details"):
                facts |= {f"{key}.{name}": part for name, part in dict_or_empty(output.get(key)).items()}
            for key, value in facts.items():
                told = value if isinstance(value, str) else json.dumps(value)
                self.console.say(f"{one_line(key, 60)}: {one_line(told, 2000)}")

    def _take(self, output: Mapping[str, Any]) -> None:
        """The result's warnings are told, its texts printed, its files saved."""
        # The official worker puts what it could not return under `errors`.
        for remark in list_in(output, "warnings") + list_in(output, "errors"):
            self.report.warnings.append(one_line(remark))
            self.console.warn(one_line(remark))
        for entry in list_in(output, "texts"):
            text = entry.get("text") if isinstance(entry, dict) else entry
            self.report.texts.append(text if isinstance(text, str) else json.dumps(entry))
            self.console.result(self.report.texts[-1])
        for failure in save_result(output, self.options.out, self._saved):
            self.report.fail(failure)

    def _saved(self, path: Path) -> None:
        self.report.saved.append(str(path))
        self.console.result(str(path))


def cancelled(job_id: str, state: str) -> str:
    return f"job {job_id} is cancelled" if state == "CANCELLED" else f"job {job_id} was already {state}"


def make_output_directory(directory: Path) -> None:
    """Made before the job is sent, so that a result is not lost for want of a place."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path that none can be
        raise InputError(f"--out {one_line(directory)} cannot be made: {reason_of(error)}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"--out {directory} cannot be written to")


# --- many jobs: --repeat and --batch ---------------------------------------------------------------------------------

WAIT_SLICE_S = 0.5  # on Windows, Ctrl-C does not end a wait for a thread
LINE_OPTIONS = (
    *("workflow", "img", "file", "keep_images", "max_side", "prompt", "negative", "set", "seed", "keep_seeds"),
    *("out", "format", "quality", "save_run", "debug", "timeout"),
)


@dataclass(frozen=True, eq=False)
class Task:
    """One of many jobs: its options, or why there are none. `key` is the same in the next run of the same batch."""

    name: str
    options: Options | None
    error: str = ""
    key: str = ""


def tasks_of(options: Options) -> list[Task]:
    """The jobs of --batch (or the one of the command line), each --repeat times. Raises InputError."""
    lines = {"": "{}"}
    if options.batch is not None:
        text = read_file(options.batch).decode("utf-8-sig", errors="replace")
        lines = {f"line {number} ": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        if not lines:
            raise InputError(f"--batch {options.batch} has no job")
    copies: dict[str, int] = {}
    tasks = []
    for (name, line), number in itertools.product(lines.items(), range(options.repeat)):
        name = (name + f"{number + 1}/{options.repeat}" * (options.repeat > 1)).strip()
        try:
            own = line_options(line, options)
            own.seed = None if own.seed is None else own.seed + number
            if own.seed is not None and own.seed > MAX_SEED:
                raise InputError(f"--seed has counted up to {own.seed}, and no node takes more than {MAX_SEED}")
            key = task_key(own)
            copies[key] = copies.get(key, 0) + 1
            tasks.append(Task(name, own, key=f"{key}-{copies[key]}"))
        except InputError as error:
            tasks.append(Task(name, None, str(error)))
    return tasks


def line_options(line: str, base: Options) -> Options:
    """The options of one line of a batch: an object with the names of the command line's, which it goes before."""
    try:
        values = parse_json(line)
    except ValueError as error:
        raise InputError(f"it is not JSON: {one_line(error, 120)}") from error
    if not isinstance(values, dict):
        raise InputError('it is no object such as {"prompt": "a cat", "seed": 7}')
    parser, own, arguments = build_parser(), argparse.Namespace(**vars(base)), []
    for name, value in values.items():
        key, option = name.replace("-", "_"), f"--{name.replace('_', '-')}"
        if key not in LINE_OPTIONS:
            raise InputError(f"a line of a batch has no option {one_line(name, 40)}{nearest(key, LINE_OPTIONS)}")
        for reset in ("seed", "keep_seeds") if key in ("seed", "keep_seeds") else (key,):
            setattr(own, reset, parser.get_default(reset))
        if key == "set" and isinstance(value, dict):
            value = [f"{place}={part if isinstance(part, str) else json.dumps(part)}" for place, part in value.items()]
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict | list):
                raise InputError(f"{option} takes a text, or a list of them")
            if part is not None and part is not False:  # 0 is a seed
                arguments.append(option if part is True else f"{option}={part}")
    return parser.parse_args(arguments, own)


def task_key(options: Options) -> str:
    """What tells a job of a batch from another: the contents of its files, and the options that change its result."""
    named = [part for text in (*options.img, *options.file) for part in (text, text.partition("=")[2])]
    paths = [*filter(None, [options.workflow]), *(Path(name) for name in named if "\0" not in name)]
    contents = [sha256(read_file(path)) for path in paths if path.is_file()]
    told = {name: str(getattr(options, name)) for name in LINE_OPTIONS if name not in ("timeout", "debug", "save_run")}
    return sha256(json.dumps([told, contents]).encode())


class Done:
    """The jobs of a batch that were saved: a line of JSON each, beside what they made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._saved: dict[str, list[str]] = {}
        for line in read_file(path).decode(errors="replace").splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError, KeyError):  # a line that was cut off
                entry = parse_json(line)
                self._saved[entry["key"]] = [str(file) for file in entry["saved"]]

    def get(self, key: str) -> list[str] | None:
        """What the job has saved, if all of it is still there."""
        saved = self._saved.get(key)
        return saved if saved is not None and all(map(os.path.exists, saved)) else None

    def add(self, key: str, saved: list[str]) -> None:
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({'key': key, 'saved': saved})}\n")  # the line before may have been cut off


class ManyRuns:
    """Several jobs at once; a line for each that has ended, and a table. What a batch has done before is left out."""

    def __init__(self, options: Options, connected: Connect | None, console: Console) -> None:
        if connected:
            make_output_directory(options.out)
        self._tasks = tasks_of(options)
        self._connected = connected
        self._console = console
        self._parallel = options.parallel
        self._done = Done(options.out / f"{options.batch.stem}.done.jsonl") if options.batch and connected else None
        self._runs: dict[Task, Run] = {}
        self._stop = threading.Event()
        self._not_sent = Report(state="NOT SENT", exit_code=ExitCode.INTERRUPTED)

    def run(self) -> dict[str, Any]:
        """All of them; the object of --json."""
        from concurrent.futures import ThreadPoolExecutor

        began = time.monotonic()
        pool = ThreadPoolExecutor(self._parallel)
        futures = {pool.submit(self._work, task): task for task in self._tasks}
        self._wait_for(futures)
        pool.shutdown(wait=False)
        reports = [(task, self._report_of(task, future)) for future, task in futures.items()]
        print_table([row_of(task, report) for task, report in reports], began, self._console)
        codes = [report.exit_code for _, report in reports if report.exit_code]
        code = ExitCode.INTERRUPTED if self._stop.is_set() else next(iter(codes), ExitCode.SAVED)
        return {"ok": not code, "exit_code": code, "jobs": [{"job": t.name, **r.as_json()} for t, r in reports]}

    def _work(self, task: Task) -> Report:
        """One job, in a thread of its own."""
        if self._stop.is_set():
            return self._not_sent
        if self._done and (saved := self._done.get(task.key)) is not None:
            return Report(state="DONE BEFORE", saved=saved)
        if task.options is None:
            return Report(errors=[task.error], exit_code=ExitCode.BAD_INPUT)
        is_quiet = self._console.quiet or (self._connected is not None and not task.options.debug)
        own = replace(self._console, quiet=is_quiet, prefix=f"[{task.name}] ")
        run = self._runs[task] = Run(task.options, own)
        report = run.attempt(self._connected, sleep=self._sleep)
        if self._done and not report.exit_code:
            try:
                self._done.add(task.key, report.saved)
            except OSError as error:
                own.warn(f"it is saved, but will be done again: the list of jobs cannot be written: {reason_of(error)}")
        return report

    def _sleep(self, pause_s: float) -> None:
        """Ctrl-C reaches only the main thread; here it comes with the next pause."""
        if self._stop.wait(pause_s):
            raise KeyboardInterrupt

    def _wait_for(self, futures: Mapping[Future[Report], Task]) -> None:
        from concurrent.futures import FIRST_COMPLETED, wait

        pending, ended = set(futures), 0
        try:
            while pending:
                some, pending = wait(pending, WAIT_SLICE_S, FIRST_COMPLETED)
                for future in some:
                    ended += 1
                    report = self._report_of(futures[future], future)
                    line = f"[{ended}/{len(futures)}] " + " ".join(row_of(futures[future], report))
                    self._console.fail(line) if report.exit_code else self._console.say(line)
        except KeyboardInterrupt:
            self._console.say("interrupted: the jobs that run are being cancelled; Ctrl-C again leaves them")
            self._stop.set()
            try:
                while pending := {future for future in pending if not future.done()}:
                    wait(pending, WAIT_SLICE_S)
            except KeyboardInterrupt:
                self._console.warn("what is not cancelled yet may still run")

    def _report_of(self, task: Task, future: Future[Report]) -> Report:
        try:
            error = future.exception(timeout=0)
        except TimeoutError:  # after a second Ctrl-C
            run = self._runs.get(task)
            return replace(run.report, exit_code=ExitCode.INTERRUPTED) if run else self._not_sent
        failed = Report(errors=[f"the client has a defect: {error!r}"], exit_code=ExitCode.PLATFORM)
        return failed if error else future.result()


def row_of(task: Task, report: Report) -> tuple[str, str, str, str, str]:
    state = {"COMPLETED": "saved", "": "ready"}.get(report.state, report.state.lower())
    if report.exit_code not in (ExitCode.SAVED, ExitCode.INTERRUPTED):
        state = "failed"
    elif not report.state and report.job_id:
        state = f"may still run: {report.job_id}"
    elif not report.state and report.exit_code:
        state = "not sent"
    seeds = ",".join(map(str, dict.fromkeys(report.seeds.values()))) or "-"
    what = "; ".join(report.errors) or " ".join(report.saved) or "-"
    return task.name, state, f"{report.timings_ms.get('all', 0) / 1000:.1f} s", seeds, what


def print_table(jobs: Sequence[tuple[str, str, str, str, str]], began: float, console: Console) -> None:
    rows = [("job", "state", "time", "seed", "files, or what went wrong"), *jobs]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        console.say("  ".join([*cells, one_line(row[4], 160)]))
    states = [row[1] for row in jobs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    console.say(f"{counted(len(jobs), 'job')} in {time.monotonic() - began:.1f} s: {counts}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_URL = "https://api.runpod.ai/v2"
MAX_TIMEOUT_S = 86_400  # a job's time to live on RunPod, unless its request says otherwise

USAGE = "client.py --workflow FILE [--img FILE ...] [--prompt TEXT] [options]"
DESCRIPTION = "Run a ComfyUI workflow on a RunPod Serverless endpoint and save what it makes."
EPILOG = """\
examples:
  client.py --workflow edit.json --img room.png chair.png --prompt "put the chair into the room"
  client.py --workflow t2i.json --prompt "a lighthouse at dusk" --repeat 20 --out lighthouse
  client.py --workflow t2i.json --set 3.steps=8 --url http://127.0.0.1:8188     (ComfyUI behind an SSH tunnel)

Ctrl-C cancels the job on RunPod; a second one leaves at once.
exit codes: 0 all saved; 1 the job failed or an item could not be saved; 2 usage or bad input;
            3 platform or network; 4 timed out; 130 interrupted
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{one_line(message, 300)}; --help lists the options")


def build_parser() -> Parser:
    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26)

    parser = Parser(
        "client.py", USAGE, DESCRIPTION, EPILOG, formatter_class=formatter, allow_abbrev=False, add_help=False
    )
    files: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    texts: dict[str, Any] = {"action": "append", "default": []}
    flag: dict[str, Any] = {"action": "store_true"}

    group = parser.add_argument_group("workflow")
    add = group.add_argument
    add("--workflow", metavar="FILE", type=Path, help="in API format, or a run.json of --save-run")
    add("--img", metavar="FILE", **files, help="for LoadImage nodes, lowest id first; or NODE=FILE; https URLs too")
    add("--file", metavar="FILE", **files, help="the same for nodes that load video, audio and the rest")
    add("--keep-images", **flag, help="nodes that get no file keep the one that the workflow names")
    add("--max-side", metavar="N", type=_whole("a side", 1, 100_000), help="shrink pictures to N pixels a side")
    add("--prompt", metavar="TEXT", **texts, help="positive text; or NODE=TEXT")
    add("--negative", metavar="TEXT", **texts, help="negative text; neither ever changes the other")
    add("--set", metavar="NODE.INPUT=VALUE", **texts, help="any other input")
    add = group.add_mutually_exclusive_group().add_argument
    add("--seed", metavar="N", type=_whole("a seed", 0, MAX_SEED), help="for every seed (default: random, and printed)")
    add("--keep-seeds", **flag, help="leave the workflow's seeds as they are")

    add = parser.add_argument_group("result").add_argument
    add("--out", metavar="DIR", type=Path, default=Path("output"), help="folder for the files (default: output)")
    formats = ("png", "webp", "jpeg")
    add("--format", choices=formats, metavar="NAME", help="png, webp or jpeg for pictures (default: as saved)")
    add("--quality", metavar="N", type=_whole("a quality", 1, 100), help="of webp and jpeg (default: 90)")
    add("--save-run", **flag, help="add run.json: --workflow run.json --keep-seeds makes it again")
    add("--json", **flag, help="one object on stdout and nothing else")
    add("--quiet", **flag, help="only warnings and errors on stderr")
    add("--debug", **flag, help="keep the worker's files; print timings and where to look")
    add("--dry-run", **flag, help="say what would change, and send nothing")

    add = parser.add_argument_group("server").add_argument
    add("--endpoint", metavar="ID", help="default: RUNPOD_ENDPOINT_ID")
    add("--url", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}; or ComfyUI's own")
    add("--api-key-file", metavar="FILE", type=Path, help="file with the API key (default: RUNPOD_API_KEY)")
    add("--timeout", metavar="S", type=_timeout_s, default=1800.0, help="seconds for a job (default: 1800)")
    add("--sync", **flag, help="send with /runsync, which takes 20 MB instead of 10")

    group = parser.add_argument_group("jobs")
    add = group.add_mutually_exclusive_group().add_argument
    add("--detach", **flag, help="print the job's id and leave it running")
    add("--resume", metavar="JOB_ID", type=_job_id, help="wait for that job and save its result")
    add("--cancel", metavar="JOB_ID", type=_job_id, help="cancel that job")
    number = _whole("a number of jobs", 1, 10_000)
    add = group.add_argument
    add("--repeat", metavar="N", type=number, default=1, help="so often, with new seeds; --seed counts up")
    add("--batch", metavar="FILE", type=Path, help='a job a line: {"prompt": "a cat"}; a rerun skips what is done')
    add("--parallel", metavar="N", type=number, default=8, help="jobs at once (default: 8)")
    add("-h", "--help", action="help", help="show this")
    return parser


def _whole(what: str, first: int, last: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,20}", text) or not first <= int(text) <= last:
            raise argparse.ArgumentTypeError(f"{what} is a whole number from {first} to {last}")
        return int(text)

    return parse


def _job_id(text: str) -> str:
    if not JOB_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("a job's id has letters, digits, dots and dashes only")
    return text


def _timeout_s(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) or not 1 <= float(text) <= MAX_TIMEOUT_S:
        raise argparse.ArgumentTypeError(f"the timeout is a number of seconds from 1 to {MAX_TIMEOUT_S}")
    return float(text)


def connect(options: Options, environ: Mapping[str, str], console: Console) -> Connect:
    """What makes a connection for each job, with a `sleep` of its own. Raises InputError, PlatformError."""
    if not re.match(r"https?://[\w.\[-]", options.url):
        raise InputError("--url has the form https://host/path")
    if options.endpoint is None and not url_path(options.url).strip("/") and is_comfyui(options.url):
        for name in ("format", "quality", "sync"):
            if getattr(options, name):
                raise InputError(f"--{name} is for endpoints; this is ComfyUI itself")
        return lambda **clock: ComfyUI(options.url, **clock)
    endpoint_id = options.endpoint or environ.get("RUNPOD_ENDPOINT_ID")
    if not endpoint_id:
        raise InputError("name the endpoint with --endpoint or RUNPOD_ENDPOINT_ID")
    key = environ.get("RUNPOD_API_KEY", "")
    if options.api_key_file is not None:
        key = read_file(options.api_key_file, "key file").decode("utf-8-sig", errors="replace")
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        places = "the environment variable RUNPOD_API_KEY, or name --api-key-file"
        raise InputError(f"put the endpoint's API key into {places}")
    return lambda **clock: Endpoint(options.url, endpoint_id, key, sync=options.sync, warn=console.warn, **clock)


def is_comfyui(url: str) -> bool:
    """Whether ComfyUI itself answers there. Raises PlatformError where nothing does."""
    try:
        return {"system", "devices"} <= ComfyUI(url).call("GET", "/system_stats").keys()
    except Refused:
        return False
    except Unreachable as error:
        raise PlatformError(f"no ComfyUI answers: {error}; is the tunnel up, and ComfyUI ready?") from error


def run(options: Options, environ: Mapping[str, str], console: Console) -> dict[str, Any]:
    """The program without its outermost error handling; returns the object of --json. Raises ClientError."""
    many = options.batch is not None or options.repeat > 1
    if many and (options.detach or options.resume or options.cancel):
        raise InputError("--detach, --resume and --cancel are for one job, not for --repeat and --batch")
    if (options.resume or options.cancel) and (options.dry_run or options.save_run):
        raise InputError("--dry-run and --save-run go with a job that is sent, not with --resume and --cancel")
    connected = connect(options, environ, console) if not options.dry_run else None
    if options.cancel and connected:
        state = connected().cancel(options.cancel)
        console.say(cancelled(options.cancel, state))
        return {"ok": True, "exit_code": ExitCode.SAVED, "job_id": options.cancel, "state": state}
    if many:
        return ManyRuns(options, connected, console).run()
    return Run(options, console, None if options.quiet else sys.stderr).attempt(connected).as_json()


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a result's text must not end the program
    # The end by a supervisor, and of the terminal, is Ctrl-C too; but for nohup, which has it ignored.
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    console = Console("--quiet" in arguments, "--json" in arguments)
    try:
        told = run(build_parser().parse_args(arguments), os.environ, console)
    except ClientError as error:
        told = failed(error)
    except KeyboardInterrupt:
        told = failed(Interrupted("interrupted"))
    except ModuleNotFoundError as error:
        told = failed(
            InputError(f"{error.name} is missing: `uv run client.py` brings it, or `pip install requests Pillow tqdm`")
        )
    except Exception as error:  # noqa: BLE001 - the outermost function: a sentence instead of a traceback
        told = failed(PlatformError(f"the client has a defect: {type(error).__name__}: {one_line(error, 300)}"))
    for message in told.get("errors", ()):
        console.say(message) if told["exit_code"] == ExitCode.INTERRUPTED else console.fail(message)
    if console.json:
        # Through JSON once: what the server sent as NaN or Infinity would make it none.
        write_line(sys.stdout, json.dumps(json.loads(json.dumps(told), parse_constant=str)))
    return int(told["exit_code"])


def failed(error: ClientError) -> dict[str, Any]:
    return {"ok": False, "exit_code": error.exit_code, "errors": [str(error)]}


if __name__ == "__main__":
    exit_code = main()
    if threading.active_count() > 1:  # jobs that a second Ctrl-C has left: their threads must not keep the program
        os._exit(exit_code)
    sys.exit(exit_code)
