"""Output nodes that show what others made, and one that can say anything (comfy_extras of ComfyUI 0.18.1)."""

from __future__ import annotations

import base64
import json
import uuid
from pathlib import Path
from typing import Any

from .folders import Folders
from .images import Batch
from .node import Context, Inputs, Node, Result
from .save_nodes import save_images
from .saving import HIDDEN

_MODELS = "STRING,FILE_3D_GLB,FILE_3D_GLTF,FILE_3D_FBX,FILE_3D_OBJ,FILE_3D_STL,FILE_3D_USDZ,FILE_3D"


class ImageCompare(Node):
    display_name = "Image Compare"
    module = "comfy_extras.nodes_image_compare"
    output_node = True
    experimental = True
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        images: dict[str, Any] = {"image_a": ("IMAGE", {}), "image_b": ("IMAGE", {})}
        view = ("IMAGECOMPARE", {"socketless": True})
        return {"required": {"compare_view": view}, "optional": images, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        ui: dict[str, list[Any]] = {}
        for side in "ab":
            images: Batch | None = inputs.get(f"image_{side}")
            folder, prefix = context.folders.temp, f"comfy.compare.{side}"
            ui[f"{side}_images"] = save_images(images, prefix, folder, "temp", None, 1) if images else []
        return Result(ui=ui)


class Preview3D(Node):
    """Knows paths only, not models that another node hands on."""

    display_name = "Preview 3D & Animation"
    category = "3d"
    module = "comfy_extras.nodes_load_3d"
    output_node = True
    experimental = True
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        model = (_MODELS, {"default": "", "widgetType": "STRING", "multiline": False})
        more = {"camera_info": ("LOAD3D_CAMERA", {"advanced": True}), "bg_image": ("IMAGE", {"advanced": True})}
        return {"required": {"model_file": model}, "optional": more, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        background: Batch | None = inputs.get("bg_image")
        path = None
        if background:
            name = f"bg_{uuid.uuid4().hex}.png"
            background.frames[0].to_pixels().save(context.folders.temp / name, compress_level=1)
            path = f"temp/{name}"
        return Result(ui={"result": [inputs["model_file"], inputs.get("camera_info"), path]})


class StandinFiles(Node):
    """Not in ComfyUI: writes `files`, a JSON object of Base64 by path in the output folder, says `ui`, a JSON object,
    and gives the first path. So a workflow can have the outputs of any node there is."""

    display_name = "Files (stand-in only)"
    module = "standin"
    output_node = True
    returns = ("STRING",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"files": ("STRING", {"default": "{}"}), "ui": ("STRING", {"default": "{}"})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        files: dict[str, str] = json.loads(inputs["files"])
        for name, content in files.items():
            path = Path(context.folders.output, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(content))
        return Result((next(iter(files), ""),), json.loads(inputs["ui"]))
