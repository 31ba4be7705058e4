"""Nodes for text and numbers (comfy_extras/nodes_primitive.py, nodes_string.py, nodes_preview_any.py of 0.18.1)."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from .folders import Folders
from .node import Context, Inputs, Node, Result

_LARGEST = 2**63 - 1


class _Primitive(Node):
    """Passes its one value on."""

    category = "utils/primitive"
    module = "comfy_extras.nodes_primitive"
    v3 = True
    options: ClassVar[dict[str, Any]]

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"value": (cls.returns[0], cls.options)}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((inputs["value"],))


class PrimitiveString(_Primitive):
    display_name = "String"
    returns = ("STRING",)
    options: ClassVar[dict[str, Any]] = {"multiline": False}


class PrimitiveStringMultiline(_Primitive):
    display_name = "String (Multiline)"
    returns = ("STRING",)
    options: ClassVar[dict[str, Any]] = {"multiline": True}


class PrimitiveInt(_Primitive):
    display_name = "Int"
    returns = ("INT",)
    options: ClassVar[dict[str, Any]] = {"min": -_LARGEST, "max": _LARGEST, "control_after_generate": True}


class PrimitiveFloat(_Primitive):
    display_name = "Float"
    returns = ("FLOAT",)
    options: ClassVar[dict[str, Any]] = {"min": -_LARGEST, "max": _LARGEST, "step": 0.1}


class PrimitiveBoolean(_Primitive):
    display_name = "Boolean"
    returns = ("BOOLEAN",)
    options: ClassVar[dict[str, Any]] = {}


class StringConcatenate(Node):
    display_name = "Concatenate"
    category = "utils/string"
    module = "comfy_extras.nodes_string"
    returns = ("STRING",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        text = ("STRING", {"multiline": True})
        delimiter = ("STRING", {"default": "", "multiline": False})
        return {"required": {"string_a": text, "string_b": text, "delimiter": delimiter}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((inputs["string_a"] + inputs["delimiter"] + inputs["string_b"],))


class PreviewAny(Node):
    display_name = "Preview as Text"
    category = "utils"
    module = "comfy_extras.nodes_preview_any"
    output_node = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"source": ("*", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        source = inputs["source"]
        if isinstance(source, (str, int, float)):
            return Result(ui={"text": [str(source)]})
        try:
            text = "None" if source is None else json.dumps(source, indent=4)
        except (TypeError, ValueError):
            text = str(source)
        return Result(ui={"text": [text]})
