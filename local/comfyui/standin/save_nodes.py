"""Output nodes: files for the history, and images over the websocket (nodes.py of ComfyUI 0.18.1)."""

from __future__ import annotations

import json
import random
import string
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .folders import Folders, save_place
from .images import Batch, Frame
from .node import Context, Inputs, Node, Result

_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}


class SaveImage(Node):
    display_name = "Save Image"
    output_node = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        prefix = ("STRING", {"default": "ComfyUI"})
        return {"required": {"images": ("IMAGE", {}), "filename_prefix": prefix}, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        metadata = _png_metadata(inputs) if context.metadata else None
        folder, prefix = context.folders.output, inputs["filename_prefix"]
        return Result(ui={"images": save_images(inputs["images"], prefix, folder, "output", metadata, 4)})


class PreviewImage(Node):
    display_name = "Preview Image"
    output_node = True

    def __init__(self) -> None:
        # One name per node object, which outlives the prompt: a second run of the node counts on.
        self._prefix = "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"images": ("IMAGE",)}, "hidden": dict(_HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        metadata = _png_metadata(inputs) if context.metadata else None
        folder = context.folders.temp
        return Result(ui={"images": save_images(inputs["images"], self._prefix, folder, "temp", metadata, 1)})


class SaveImageWebsocket(Node):
    display_name = "SaveImageWebsocket"
    category = "api/image"
    module = "custom_nodes.websocket_image_save"
    output_node = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"images": ("IMAGE",)}}

    @classmethod
    def fingerprint(cls, folders: Folders, values: Mapping[str, Any]) -> Any:
        return time.time()

    def run(self, context: Context, **inputs: Any) -> Result:
        images: Batch = inputs["images"]
        for number, frame in enumerate(images.frames):
            context.progress(number, len(images.frames), ("PNG", frame.to_pixels()))
        return Result()


class StandinStrict(Node):
    """Not in ComfyUI: saves as SaveImage does. Inputs of any name are valid and arrive, and `run` refuses them."""

    display_name = "Strict (stand-in only)"
    module = "standin"
    output_node = True
    takes_any_input = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {**SaveImage.inputs(folders), "optional": {}}

    # The narrow signature is what this node is for: Python's own TypeError is what a workflow with more inputs gets.
    def run(  # type: ignore[override]
        self, context: Context, *, images: Batch, filename_prefix: str, prompt: Any, extra_pnginfo: Any
    ) -> Result:
        hidden = {"prompt": prompt, "extra_pnginfo": extra_pnginfo}
        return SaveImage().run(context, images=images, filename_prefix=filename_prefix, **hidden)


class StandinTee(SaveImage):
    """Not in ComfyUI: saves as SaveImage does, and passes the images on: an output node that others link from."""

    display_name = "Tee (stand-in only)"
    module = "standin"
    returns = ("IMAGE",)

    def run(self, context: Context, **inputs: Any) -> Result:
        return replace(super().run(context, **inputs), outputs=(inputs["images"],))


class StandinToFile(Node):
    """Not in ComfyUI: writes the first image into the temp folder and gives the path, as nodes for video do."""

    display_name = "To file (stand-in only)"
    module = "standin"
    returns = ("STRING",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, context: Context, **inputs: Any) -> Result:
        path = context.folders.temp / f"standin_{random.randbytes(8).hex()}.png"
        inputs["image"].frames[0].to_pixels().save(path)
        return Result((str(path),))


class StandinFromFile(Node):
    """Not in ComfyUI: the image at a path."""

    display_name = "From file (stand-in only)"
    module = "standin"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"path": ("STRING", {"default": ""})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        with Image.open(inputs["path"]) as picture:
            return Result((Batch((Frame.from_pixels(picture),)),))


def _png_metadata(inputs: Mapping[str, Any]) -> PngInfo:
    metadata = PngInfo()
    metadata.add_text("prompt", json.dumps(inputs["prompt"]))
    for name, value in (inputs["extra_pnginfo"] or {}).items():
        metadata.add_text(name, json.dumps(value))
    return metadata


def save_images(
    images: Batch, prefix: str, folder: Path, kind: str, metadata: PngInfo | None, compress_level: int
) -> list[dict[str, str]]:
    """Write every frame as a PNG and give the entries of the history that name them."""
    place = save_place(folder, prefix, *images.size)
    files = []
    for number, frame in enumerate(images.frames):
        stem = place.stem.replace("%batch_num%", str(number))
        name = f"{stem}_{place.counter + number:05}_.png"
        frame.to_pixels().save(place.folder / name, pnginfo=metadata, compress_level=compress_level)
        files.append({"filename": name, "subfolder": place.subfolder, "type": kind})
    return files
