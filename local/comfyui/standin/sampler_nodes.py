"""The nodes of a text-to-image workflow, without a model: a picture is drawn from the texts and the seed.

Names, inputs and messages are those of ComfyUI 0.18.1 (nodes.py); the pictures are not. Equal texts, seed and size
give the same picture, and any change of them another one.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from .containers import safetensors
from .folders import Folders
from .images import Batch, Frame
from .node import Context, Inputs, Node, Result
from .saving import write_output

_SAMPLERS = [
    "euler",
    "euler_cfg_pp",
    "euler_ancestral",
    "euler_ancestral_cfg_pp",
    "heun",
    "heunpp2",
    "exp_heun_2_x0",
    "exp_heun_2_x0_sde",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde",
    "dpmpp_sde_gpu",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu",
    "ddpm",
    "lcm",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation",
    "gradient_estimation_cfg_pp",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "sa_solver_pece",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
]
_SCHEDULERS = [
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
]
_STEP_S = 0.005


@dataclass(frozen=True)
class Latent:
    """What travels along a LATENT link: the pictures, as they will be decoded."""

    pictures: tuple[Image.Image, ...]


class CheckpointLoaderSimple(Node):
    """Any file in a folder of checkpoints does: it is not read."""

    display_name = "Load Checkpoint"
    category = "loaders"
    returns = ("MODEL", "CLIP", "VAE")

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"ckpt_name": (folders.model_files("checkpoints"), {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((inputs["ckpt_name"],) * 3)


class StandinCheckpoint(Node):
    """Not in ComfyUI: a checkpoint without a file, so that a text-to-image workflow needs no model folder."""

    display_name = "Checkpoint (stand-in only)"
    category = "loaders"
    module = "standin"
    returns = ("MODEL", "CLIP", "VAE")

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result(("standin",) * 3)


class CLIPTextEncode(Node):
    display_name = "CLIP Text Encode (Prompt)"
    category = "conditioning"
    returns = ("CONDITIONING",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        text = ("STRING", {"multiline": True, "dynamicPrompts": True})
        return {"required": {"text": text, "clip": ("CLIP", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((inputs["text"],))


class EmptyLatentImage(Node):
    display_name = "Empty Latent Image"
    category = "latent"
    returns = ("LATENT",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        side = {"default": 512, "min": 16, "max": 16384, "step": 8}
        batch_size = ("INT", {"default": 1, "min": 1, "max": 4096})
        return {"required": {"width": ("INT", side), "height": ("INT", side), "batch_size": batch_size}}

    def run(self, context: Context, **inputs: Any) -> Result:
        # A latent has an eighth of the picture's sides, rounded down.
        size = (inputs["width"] // 8 * 8, inputs["height"] // 8 * 8)
        return Result((Latent((Image.new("RGB", size),) * inputs["batch_size"]),))


class SaveLatent(Node):
    """Writes a latent of zeros, whatever the pictures."""

    display_name = "SaveLatent"
    category = "_for_testing"
    output_node = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {"samples": ("LATENT",), "filename_prefix": ("STRING", {"default": "latents/ComfyUI"})}
        return {"required": required, "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}}

    def run(self, context: Context, **inputs: Any) -> Result:
        pictures = inputs["samples"].pictures
        shape = [len(pictures), 4, pictures[0].height // 8, pictures[0].width // 8]
        size_bytes = 4 * math.prod(shape)
        header: dict[str, Any] = {
            "latent_format_version_0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
            "latent_tensor": {"dtype": "F32", "shape": shape, "data_offsets": [0, size_bytes]},
        }
        if context.metadata:
            more = {name: json.dumps(value) for name, value in (inputs["extra_pnginfo"] or {}).items()}
            header["__metadata__"] = {"prompt": json.dumps(inputs["prompt"]), **more}
        content = safetensors(header, bytes(size_bytes))
        return Result(ui={"latents": [write_output(context.folders, inputs["filename_prefix"], "latent", content)]})


class VAEDecode(Node):
    display_name = "VAE Decode"
    category = "latent"
    returns = ("IMAGE",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"samples": ("LATENT", {}), "vae": ("VAE", {})}}

    def run(self, context: Context, **inputs: Any) -> Result:
        return Result((Batch(tuple(Frame.from_pixels(picture) for picture in inputs["samples"].pictures)),))


class KSampler(Node):
    """Takes 5 ms a step, shows how noise gives way to the picture, and stops between steps."""

    display_name = "KSampler"
    category = "sampling"
    returns = ("LATENT",)

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {
            "model": ("MODEL", {}),
            "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
            "steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
            "cfg": ("FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}),
            "sampler_name": (_SAMPLERS, {}),
            "scheduler": (_SCHEDULERS, {}),
            "positive": ("CONDITIONING", {}),
            "negative": ("CONDITIONING", {}),
            "latent_image": ("LATENT", {}),
            "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
        }
        return {"required": required}

    def run(self, context: Context, **inputs: Any) -> Result:
        latent: Latent = inputs["latent_image"]
        told = (inputs["positive"], inputs["negative"], inputs["seed"])
        drawn = Latent(tuple(_draw(empty.size, *told, number=number) for number, empty in enumerate(latent.pictures)))
        noise = Image.effect_noise(drawn.pictures[0].size, 64).convert("RGB")
        steps: int = inputs["steps"]
        for step in range(1, steps + 1):
            time.sleep(_STEP_S)
            shown = Image.blend(noise, drawn.pictures[0], step / steps) if context.preview else None
            context.progress(step, steps, ("JPEG", shown) if shown else None)
        return Result((drawn,))


def _draw(size: tuple[int, int], positive: str, negative: str, seed: int, *, number: int) -> Image.Image:
    """Coloured tiles that depend on everything, and the positive text across them."""
    dice = random.Random(repr((positive, negative, seed, number)))
    tiles = Image.frombytes("RGB", (8, 8), dice.randbytes(8 * 8 * 3))
    picture = tiles.resize(size, Image.Resampling.NEAREST)
    ImageDraw.Draw(picture).multiline_text((2, 2), positive.encode("ascii", "replace").decode(), fill="white")
    return picture
