"""What a node class of the stand-in is, and its description as /object_info gives it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image

from .folders import Folders
from .versions import Version

# {"required": {name: (type or list of choices, options)}, "optional": {...}, "hidden": {name: "PROMPT"}}
Inputs = dict[str, dict[str, Any]]
Preview = tuple[str, Image.Image]  # ("JPEG" or "PNG", picture)


class InterruptedPromptError(Exception):
    """The running prompt was told to stop (POST /interrupt)."""


@dataclass(frozen=True)
class Result:
    """What a node gives: one value per output slot, and lists for the `outputs` of the history."""

    outputs: tuple[Any, ...] = ()
    ui: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a node may use while it runs.

    `progress(value, maximum, preview)` reports a step; it raises InterruptedPromptError when the prompt is to stop.
    `say(text)` sends a text about the node to every client. `preview`: samplers should show their steps.
    """

    folders: Folders
    metadata: bool
    preview: bool
    progress: Callable[[float, float, Preview | None], None]
    say: Callable[[str], None]


class Node(ABC):
    """Base of all node classes. One instance serves a node id until the id or its class leaves the workflow."""

    display_name: ClassVar[str | None]
    category: ClassVar[str] = "image"
    module: ClassVar[str] = "nodes"
    returns: ClassVar[tuple[str, ...]] = ()
    output_names: ClassVar[tuple[str, ...] | None] = None
    output_node: ClassVar[bool] = False
    deprecated: ClassVar[bool] = False
    experimental: ClassVar[bool] = False
    # Whether inputs of any name arrive, as in nodes whose dict of optional inputs says that it contains every name.
    takes_any_input: ClassVar[bool] = False
    # Whether ComfyUI defines it with the newer node interface, whose descriptions have more keys.
    v3: ClassVar[bool] = False
    # Inputs that `validate` looks at itself; ComfyUI then leaves out its own check of range and choices.
    validates: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def inputs(cls, folders: Folders) -> Inputs:
        """The inputs that the class takes, with the choices of this moment."""

    @classmethod
    def validate(cls, folders: Folders, values: Mapping[str, Any]) -> str | None:
        """The reason to refuse `values`, the literal inputs named in `validates`; None accepts them."""
        return None

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        """Something outside the workflow that the result depends on; equal values keep the cached result."""
        return None

    @abstractmethod
    def run(self, context: Context, **inputs: Any) -> Result:
        """Execute the node. Whatever it raises becomes an execution_error of the prompt."""


def describe(node_class: type[Node], folders: Folders, version: Version) -> dict[str, Any]:
    """The entry of one class in GET /object_info (server.py, without the texts for the web interface)."""
    inputs = node_class.inputs(folders)
    entry: dict[str, Any] = {
        "input": inputs,
        "input_order": {category: list(names) for category, names in inputs.items()},
        **({"is_input_list": False} if node_class.v3 or version.describes_more else {}),
        "output": node_class.returns,
        "output_is_list": [False] * len(node_class.returns),
        "output_name": node_class.output_names or node_class.returns,
        "name": node_class.__name__,
        "display_name": node_class.display_name,
        "description": "",
        "python_module": node_class.module,
        "category": node_class.category,
        "output_node": node_class.output_node,
    }
    if node_class.v3:
        newer = {"output_matchtypes": None, "dev_only": False, "price_badge": None} if version.describes_more else {}
        flags = {"deprecated": node_class.deprecated, "experimental": node_class.experimental}
        return {**entry, **flags, "api_node": False, "output_tooltips": [None] * len(node_class.returns), **newer}
    flags = {"deprecated": node_class.deprecated, "experimental": node_class.experimental}
    return {**entry, **{name: True for name, value in flags.items() if value}}


def type_name(failure: BaseException) -> str:
    """`PIL.UnidentifiedImageError`, but `KeyError` for a builtin: how ComfyUI names exceptions on the wire."""
    kind = type(failure)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
