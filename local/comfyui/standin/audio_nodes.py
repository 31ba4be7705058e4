"""Nodes that make and save audio, all of it silence (comfy_extras/nodes_audio.py of ComfyUI 0.18.1)."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any

from .containers import flac_of_silence, mp3_of_silence, opus_of_silence
from .folders import Folders
from .node import Context, Inputs, Node, Result
from .saving import HIDDEN, SaveNode, write_output


@dataclass(frozen=True)
class Audio:
    """What travels along an AUDIO link: silence."""

    sample_rate: int
    channels: int
    samples: int


class EmptyAudio(Node):
    display_name = "Empty Audio"
    category = "audio"
    module = "comfy_extras.nodes_audio"
    returns = ("AUDIO",)
    v3 = True

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required = {
            "duration": ("FLOAT", {"default": 60.0, "min": 0.0, "max": 2**64 - 1, "step": 0.01}),
            "sample_rate": ("INT", {"advanced": True, "default": 44100, "min": 1, "max": 192000}),
            "channels": ("INT", {"advanced": True, "default": 2, "min": 1, "max": 2}),
        }
        return {"required": required}

    def run(self, context: Context, **inputs: Any) -> Result:
        rate: int = inputs["sample_rate"]
        return Result((Audio(rate, inputs["channels"], round(inputs["duration"] * rate)),))


class SaveAudio(SaveNode):
    display_name = "Save Audio (FLAC)"
    category = "audio"
    module = "comfy_extras.nodes_audio"
    suffix = "flac"
    qualities: tuple[str, ...] = ()
    default_quality = ""

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        required: dict[str, Any] = {
            "audio": ("AUDIO", {}),
            "filename_prefix": ("STRING", {"default": "audio/ComfyUI", "multiline": False}),
        }
        if cls.qualities:
            choice = {"default": cls.default_quality, "multiselect": False, "options": list(cls.qualities)}
            required["quality"] = ("COMBO", choice)
        return {"required": required, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        content = self.encode(inputs["audio"], self.metadata(context, inputs))
        return Result(ui={"audio": [write_output(context.folders, inputs["filename_prefix"], self.suffix, content)]})

    def encode(self, audio: Audio, tags: dict[str, str]) -> bytes:
        return flac_of_silence(audio.sample_rate, audio.channels, audio.samples, tags)


class SaveAudioMP3(SaveAudio):
    """Always of 128 kbit/s, and without the workflow."""

    display_name = "Save Audio (MP3)"
    suffix = "mp3"
    qualities = ("V0", "128k", "320k")
    default_quality = "V0"

    def encode(self, audio: Audio, tags: dict[str, str]) -> bytes:
        return mp3_of_silence(audio.sample_rate, audio.channels, audio.samples)


class SaveAudioOpus(SaveAudio):
    """Whatever the quality, and without the workflow."""

    display_name = "Save Audio (Opus)"
    suffix = "opus"
    qualities = ("64k", "96k", "128k", "192k", "320k")
    default_quality = "128k"

    def encode(self, audio: Audio, tags: dict[str, str]) -> bytes:
        return opus_of_silence(audio.channels, audio.samples / audio.sample_rate)


class PreviewAudio(SaveNode):
    display_name = "Preview Audio"
    category = "audio"
    module = "comfy_extras.nodes_audio"

    @classmethod
    def inputs(cls, folders: Folders) -> Inputs:
        return {"required": {"audio": ("AUDIO", {})}, "hidden": dict(HIDDEN)}

    def run(self, context: Context, **inputs: Any) -> Result:
        audio: Audio = inputs["audio"]
        content = flac_of_silence(audio.sample_rate, audio.channels, audio.samples, self.metadata(context, inputs))
        prefix = "ComfyUI_temp_" + "".join(random.choices(string.ascii_lowercase, k=5))
        return Result(ui={"audio": [write_output(context.folders, prefix, "flac", content, kind="temp")]})
