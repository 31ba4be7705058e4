"""The node classes that the stand-in has, by the name that a workflow's `class_type` gives."""

from __future__ import annotations

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
from .node import Node
from .save_nodes import PreviewImage, SaveImage, SaveImageWebsocket

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
        StandinSleep,
    )
}
