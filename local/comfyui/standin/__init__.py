"""A small ComfyUI: the protocol of version 0.18.1, and the image nodes that need no model, on Pillow."""

COMFYUI_VERSION = "0.18.1"
