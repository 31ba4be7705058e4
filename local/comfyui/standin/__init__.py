"""A small ComfyUI: the protocol of three versions, and the nodes that need no model, on Pillow."""
