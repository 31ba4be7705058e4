"""The node classes that the stand-in has, by the name that a workflow's `class_type` gives."""

from __future__ import annotations

from .audio_nodes import EmptyAudio, PreviewAudio, SaveAudio, SaveAudioMP3, SaveAudioOpus
from .compose_nodes import GetImageSize, ImageBlur, ImageStitch, LoadImageMask, LoadImageOutput, MaskToImage
from .image_nodes import (
    EmptyImage,
    ImageBatch,
    ImageCrop,
    ImageInvert,
    ImageScale,
    ImageScaleBy,
    LoadImage,
    StandinSleep,
)
from .media_loaders import LoadAudio, LoadVideo
from .media_nodes import CreateVideo, SaveAnimatedPNG, SaveAnimatedWEBP, SaveVideo, SaveWEBM
from .node import Node
from .sampler_nodes import (
    CheckpointLoaderSimple,
    CLIPTextEncode,
    EmptyLatentImage,
    KSampler,
    SaveLatent,
    StandinCheckpoint,
    VAEDecode,
)
from .save_nodes import (
    PreviewImage,
    SaveImage,
    SaveImageWebsocket,
    StandinFromFile,
    StandinStrict,
    StandinTee,
    StandinToFile,
)
from .text_nodes import (
    PreviewAny,
    PrimitiveBoolean,
    PrimitiveFloat,
    PrimitiveInt,
    PrimitiveString,
    PrimitiveStringMultiline,
    StringConcatenate,
)
from .view_nodes import ImageCompare, Preview3D, StandinFiles

NODE_CLASSES: dict[str, type[Node]] = {
    node_class.__name__: node_class
    for node_class in (
        SaveImage,
        PreviewImage,
        LoadImage,
        ImageScale,
        ImageScaleBy,
        ImageInvert,
        ImageBatch,
        EmptyImage,
        ImageCrop,
        SaveImageWebsocket,
        LoadImageMask,
        LoadImageOutput,
        MaskToImage,
        ImageStitch,
        ImageBlur,
        GetImageSize,
        SaveAnimatedWEBP,
        SaveAnimatedPNG,
        CreateVideo,
        SaveVideo,
        EmptyAudio,
        SaveAudio,
        SaveAudioMP3,
        SaveAudioOpus,
        PreviewAudio,
        SaveWEBM,
        SaveLatent,
        ImageCompare,
        Preview3D,
        LoadAudio,
        LoadVideo,
        PreviewAny,
        PrimitiveString,
        PrimitiveStringMultiline,
        PrimitiveInt,
        PrimitiveFloat,
        PrimitiveBoolean,
        StringConcatenate,
        CheckpointLoaderSimple,
        CLIPTextEncode,
        EmptyLatentImage,
        KSampler,
        VAEDecode,
        StandinCheckpoint,
        StandinSleep,
        StandinStrict,
        StandinTee,
        StandinToFile,
        StandinFromFile,
        StandinFiles,
    )
}
