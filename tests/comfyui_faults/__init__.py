"""The stand-in's faults and nodes (local/comfyui/standin) in real ComfyUI, for tests; a package of custom nodes.

ComfyUI loads it with the arguments that `fault_arguments` in tests/contract/comfyui_client.py gives. Nothing in the
checkout changes: hooks.py replaces what is needed in the running process. It has every kind of fault that the stand-in
has, and of its nodes all but StandinCheckpoint, whose model no real sampler could use. Used with 0.18.1 and 0.3.64.
"""

from .hooks import install
from .own_nodes import StandinFiles, StandinFromFile, StandinSleep, StandinStrict, StandinTee, StandinToFile

_NODES = (StandinSleep, StandinStrict, StandinTee, StandinToFile, StandinFromFile, StandinFiles)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}

install()  # at import: ComfyUI calls nothing in a package of V1 nodes
