"""What is wrong with a workflow and ComfyUI would not say in time: the files that it names, and links that kill.

ComfyUI opens whatever file of the machine a loader names, and looks at a saver's prefix only when everything has been
computed (folder_paths.py: get_annotated_filepath, get_save_image_path). A link to nowhere in an input that its class
does not have, or a chain of about 980 nodes, ends its prompt worker thread (graph.py: get_node; caching.py:
get_ordered_ancestry_internal). All seen with 0.18.1.
"""

from __future__ import annotations

import difflib
import posixpath
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from worker.errors import WorkflowInvalid
from worker.graph import Workflow, link_of, links_of, longest_chain, shown_node, title_of, upstream_of

if TYPE_CHECKING:
    from worker.comfyui import ComfyUI

MAX_CHAIN = 500
MAX_SENTENCES = 5
MAX_SHOWN_NAMES = 5
MAX_SHOWN_CHARS = 80
MAX_COMPARED_NAMES = 1000  # likeness costs some 10 us a pair

# Inputs that take a path below the output directory.
_PREFIX_INPUTS = {"filename_prefix"}
# SaveImageDataSetToFolder and its kin check neither this nor their prefix (0.18.1, nodes_dataset.py).
_FOLDER_INPUTS = {"folder_name"}
# Nodes whose output is the text in their input `value`.
_CONSTANTS = ("PrimitiveString", "PrimitiveStringMultiline")
# Widgets whose value is a file that the browser has uploaded, or an object of such files (0.18.1, nodes_load_3d.py).
_FILE_KINDS = ("AUDIO_RECORD", "LOAD_3D", "WEBCAM")
# What is no name, whatever the button beside it: these come by links.
_LINKED_KINDS = ("IMAGE", "MASK", "AUDIO", "VIDEO", "LATENT")
# Files of the input directory whose inputs say nothing of it (0.18.1).
_UNMARKED = {
    ("LoadLatent", "latent"),
    ("LoadImageDataSetFromFolder", "folder"),
    ("GeminiInputFiles", "file"),
    ("OpenAIInputFiles", "file"),
}


def check_before_run(workflow: Workflow, sent: Collection[str], comfyui: ComfyUI) -> list[str]:
    """Refuse links to nodes that are not there, and loaders of files that are not there: WorkflowInvalid.

    ``sent`` are the names of the job's files. A node on which no output node depends is not run by ComfyUI: of such a
    loader, an unsent file is only a warning, which is returned. A file outside the input directory is refused there,
    too, and so is a link in place of a file's name, unless it leads to a text that the workflow holds.
    """
    found = list(_loaded(workflow, comfyui))
    outside = [file for file in found if _leaves(file.path)]
    if outside:
        raise _refusal(outside, [_outside_sentence(workflow, file) for file in outside[:MAX_SENTENCES]], sent)
    missing = _not_there(workflow, found, sent, comfyui)
    lost = {node_id for node_id in workflow if any(end not in workflow for _, end in links_of(workflow, node_id))}
    if not missing and not lost:
        return []
    outputs = {node_id for node_id, node in workflow.items() if comfyui.is_output_class(node["class_type"])}
    needed = outputs | upstream_of(workflow, outputs)
    if loose := sorted(lost & needed):
        raise WorkflowInvalid(_loose_sentence(workflow, loose[0]), node_id=loose[0][:MAX_SHOWN_CHARS])
    if fatal := [file for file in missing if file.node_id in needed]:
        raise _refusal(fatal, [_missing_sentence(workflow, file, sent) for file in fatal[:MAX_SENTENCES]], sent)
    return [
        f"{_missing_sentence(workflow, file, sent)} No output node depends on it, so it was not run."
        for file in missing[:MAX_SENTENCES]
    ]


# --- links -----------------------------------------------------------------------------------------------------------


def check_chain(workflow: Workflow) -> None:
    """Raise WorkflowInvalid for more nodes in a row than ComfyUI's recursion can follow."""
    if (length := longest_chain(workflow)) > MAX_CHAIN:
        raise WorkflowInvalid(f"The workflow has a chain of {length} nodes; ComfyUI is sent {MAX_CHAIN} at most.")


# --- what is saved ---------------------------------------------------------------------------------------------------


def check_save_paths(workflow: Workflow) -> None:
    """Raise WorkflowInvalid for a node that would save outside ComfyUI's output directory.

    ComfyUI's variables, such as %width%, become digits: they are parts of a path like any other.
    """
    for node_id, node in workflow.items():
        inputs = node["inputs"].keys()
        for name in inputs & (_PREFIX_INPUTS | _FOLDER_INPUTS):
            for path in _texts(workflow, node_id, name, known=bool(inputs & _FOLDER_INPUTS)):
                folder = posixpath.normpath(path)
                if name in _PREFIX_INPUTS:
                    folder = posixpath.dirname(folder)  # the last part is the beginning of a name
                if _leaves(folder):
                    where = _node(workflow, node_id)
                    raise WorkflowInvalid(
                        f"{where}: {name} is {_shown(path)}, which leaves the output directory; "
                        "it must be relative, without '..'.",
                        node_id=node_id[:MAX_SHOWN_CHARS],
                    )


# --- what is loaded --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """A file name in an input of a node. ``path`` is the normal form, ``folder`` the annotated one or ``input``."""

    node_id: str
    input_name: str
    name: str
    path: str
    folder: str


def file_inputs(class_type: str, description: Mapping[str, Any]) -> frozenset[str]:
    """The inputs of a class that take a file of the input directory, from its entry in /object_info.

    ComfyUI marks them for its upload button (``image_upload``, ``video_upload``, ...); custom nodes do the same.
    """
    inputs, found = description.get("input"), set()
    for group in ("required", "optional"):
        named = inputs.get(group) if isinstance(inputs, dict) else None
        for name, form in named.items() if isinstance(named, dict) else ():
            match form:
                case [kind, dict() as options, *_] if any(options[key] for key in options if key.endswith("_upload")):
                    if kind not in _LINKED_KINDS:
                        found.add(name)
                case [str() as kind, *_] if kind in _FILE_KINDS or (class_type, name) in _UNMARKED:
                    found.add(name)
                case [list(), *_] if (class_type, name) in _UNMARKED:
                    found.add(name)
    return frozenset(found)


def _loaded(workflow: Workflow, comfyui: ComfyUI) -> Iterator[_Loaded]:
    for node_id, node in workflow.items():
        for input_name in sorted(comfyui.file_inputs(node["class_type"]) & node["inputs"].keys()):
            for name in _texts(workflow, node_id, input_name, known=True):
                folder, bare = _split_annotation(name)
                yield _Loaded(node_id, input_name, name, posixpath.normpath(bare), folder)


def _texts(workflow: Workflow, node_id: str, input_name: str, *, known: bool) -> list[str]:
    """What an input holds, or is linked to, as texts, but for blank ones; an object's values, as Load3D has them.

    With ``known`` a link to what only the run will tell raises WorkflowInvalid; one to nowhere is not our matter.
    """
    value = workflow[node_id]["inputs"][input_name]
    followed: set[str] = set()
    while (source := link_of(value)) in workflow and source not in followed:
        if workflow[source]["class_type"] not in _CONSTANTS:
            if known:
                where = _node(workflow, node_id)
                sentence = f"{where}: {_shown(input_name)} is linked; write the name of the file or folder there."
                raise WorkflowInvalid(sentence, node_id=node_id)
            return []
        followed.add(source)
        value = workflow[source]["inputs"].get("value")
    if isinstance(value, dict):
        value = value.get("__value__", value)  # ComfyUI unwraps it (0.18.1, execution.py: validate_inputs)
    if input_name in _FOLDER_INPUTS and isinstance(value, dict | list) and link_of(value) is None:
        return [str(value)]  # as ComfyUI makes a STRING of it
    parts = value.values() if isinstance(value, dict) else [value]
    return [part for part in parts if isinstance(part, str) and part.strip()]


def _split_annotation(name: str) -> tuple[str, str]:
    """``"a.png [output]"`` -> ``("output", "a.png")``, as folder_paths.annotated_filepath does it (0.18.1)."""
    for folder in ("output", "input", "temp"):
        if name.endswith(f"[{folder}]"):
            return folder, name[: -len(folder) - 3]
    return "input", name


def _leaves(path: str) -> bool:
    """Whether a path in normal form leads out of the directory that it is relative to."""
    return path == ".." or path.startswith(("/", "../"))


def _not_there(workflow: Workflow, files: list[_Loaded], sent: Collection[str], comfyui: ComfyUI) -> list[_Loaded]:
    """But for the names that a node offers itself, such as "none": no file of the job has been written yet."""
    present = {posixpath.normpath(name) for name in sent}
    unsent = [file for file in files if file.folder != "input" or file.path not in present]
    inputs = {(workflow[file.node_id]["class_type"], file.input_name) for file in unsent}
    offered = {place: comfyui.choices(*place) or () for place in inputs}
    return [file for file in unsent if file.name not in offered[workflow[file.node_id]["class_type"], file.input_name]]


# --- sentences -------------------------------------------------------------------------------------------------------


def _node(workflow: Workflow, node_id: str) -> str:
    return shown_node(node_id, title_of(workflow, node_id), workflow[node_id]["class_type"])


def _refusal(files: list[_Loaded], sentences: list[str], sent: Collection[str]) -> WorkflowInvalid:
    if len(files) > MAX_SENTENCES:
        sentences.append(f"{len(files) - MAX_SENTENCES} more files are not listed.")
    named = [file.name[:MAX_SHOWN_CHARS] for file in files[:MAX_SENTENCES]]
    return WorkflowInvalid(" ".join(sentences), files=named, sent_count=len(sent))


def _loose_sentence(workflow: Workflow, node_id: str) -> str:
    where = _node(workflow, node_id)
    name, end = next(link for link in links_of(workflow, node_id) if link[1] not in workflow)
    return f"{where}: {_shown(name)} is linked to node {_shown(end)}, which the workflow does not have."


def _outside_sentence(workflow: Workflow, file: _Loaded) -> str:
    return f"{_where(workflow, file)}, which is outside the input directory; send the file under 'images' or 'files'."


def _missing_sentence(workflow: Workflow, file: _Loaded, sent: Collection[str]) -> str:
    where = _where(workflow, file)
    if file.folder != "input":
        return f"{where}, but the {file.folder} directory is empty when a job begins; send the file under 'images'."
    same = unicodedata.normalize("NFC", file.path)
    if any(unicodedata.normalize("NFC", name) == same for name in sent):
        return f"{where}, which was sent in another Unicode form; spell both names in the same way."
    return f"{where}, which was not sent; {_sent_names(file.path, sent)}."


def _where(workflow: Workflow, file: _Loaded) -> str:
    node = _node(workflow, file.node_id)
    return f"{node}: {file.input_name} names {_shown(file.name)}"


def _shown(name: str) -> str:
    return repr(name if len(name) <= MAX_SHOWN_CHARS else f"{name[:MAX_SHOWN_CHARS]}...")


def _sent_names(wanted: str, sent: Collection[str]) -> str:
    if not sent:
        return "no file was sent"

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, wanted[:MAX_SHOWN_CHARS], name[:MAX_SHOWN_CHARS]).quick_ratio()

    nearest = sorted(list(sent)[:MAX_COMPARED_NAMES], key=likeness, reverse=True)[:MAX_SHOWN_NAMES]
    more = f" and {len(sent) - len(nearest)} more" if len(sent) > len(nearest) else ""
    return f"sent were {', '.join(map(_shown, nearest))}{more}"
