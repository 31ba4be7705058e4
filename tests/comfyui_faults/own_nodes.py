"""The stand-in's own nodes for real ComfyUI, with the same names, inputs and outputs."""

from __future__ import annotations

import base64
import json
import time
import uuid
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy
import torch
from nodes import SaveImage
from PIL import Image


class StandinSleep:
    """Passes an image on after `seconds`, in `steps` of equal length, as a sampler would take them."""

    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        seconds = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 3600.0, "step": 0.01})
        steps = ("INT", {"default": 10, "min": 1, "max": 10000, "step": 1})
        return {"required": {"image": ("IMAGE",), "seconds": seconds, "steps": steps}}

    def run(self, image: Any, seconds: float, steps: int) -> tuple[Any]:
        bar = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            time.sleep(seconds / steps)
            # The bar looks for interrupts too, but 0.18.1 leaves out most of its steps.
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update(1)
        return (image,)


class _AnyInput(dict[str, Any]):
    """Optional inputs that say that they contain every name, as those of widespread node packages do."""

    def __contains__(self, _name: object) -> bool:
        return True

    def __missing__(self, _name: str) -> tuple[str, dict[str, Any]]:
        return ("*", {})


class StandinStrict:
    """Saves as SaveImage does. Inputs of any name are valid and arrive, and `run` refuses them."""

    CATEGORY = "image"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {**SaveImage.INPUT_TYPES(), "optional": _AnyInput()}

    def run(self, images: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
        return SaveImage().save_images(images, filename_prefix, prompt, extra_pnginfo)


class StandinTee:
    """Saves as SaveImage does, and passes the images on: an output node that others link from."""

    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return SaveImage.INPUT_TYPES()

    def run(self, images: Any, filename_prefix: str, prompt: Any = None, extra_pnginfo: Any = None) -> dict[str, Any]:
        return {**SaveImage().save_images(images, filename_prefix, prompt, extra_pnginfo), "result": (images,)}


class StandinToFile:
    """Writes the first image into the temp folder and gives the path, as nodes for video do."""

    CATEGORY = "image"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image: Any) -> tuple[str]:
        path = Path(folder_paths.get_temp_directory(), f"standin_{uuid.uuid4().hex}.png")
        Image.fromarray((image[0].cpu().numpy() * 255).astype("uint8")).save(path)
        return (str(path),)


class StandinFromFile:
    """The image at a path."""

    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"path": ("STRING", {"default": ""})}}

    def run(self, path: str) -> tuple[Any]:
        with Image.open(path) as picture:
            pixels = numpy.array(picture.convert("RGB"), dtype="float32") / 255
        return (torch.from_numpy(pixels)[None],)


class StandinFiles:
    """Writes `files`, a JSON object of Base64 by path in the output folder, says `ui`, a JSON object, and gives the
    first path."""

    CATEGORY = "image"
    RETURN_TYPES = ("STRING",)
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"files": ("STRING", {"default": "{}"}), "ui": ("STRING", {"default": "{}"})}}

    def run(self, files: str, ui: str) -> dict[str, Any]:
        contents = json.loads(files)
        for name, content in contents.items():
            path = Path(folder_paths.get_output_directory(), name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        return {"ui": json.loads(ui), "result": (next(iter(contents), ""),)}
