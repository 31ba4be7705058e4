"""Where the faults take hold in ComfyUI's process: its server, its queue, its nodes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import folder_paths
import nodes
import torch
from aiohttp import web
from comfy.cli_args import args
from comfy_execution.progress import ProgressRegistry
from execution import PromptQueue
from protocol import BinaryEventTypes
from server import PromptServer

STANDIN = Path(__file__).resolve().parents[2] / "local" / "comfyui" / "standin"
_STALL = "stall"  # not a message: the event loop stands still for so many seconds


def install() -> None:
    """Do what is due at the start, then hook everything else."""
    faults = _standin_module("faults").Faults(
        args.user_directory or folder_paths.get_user_directory(), dict(os.environ)
    )
    faults.at_boot()
    run = _Run(faults)
    _hook_nodes(run)
    _hook_history(run)
    _hook_messages(faults)
    _hook_http(faults)


def _standin_module(name: str) -> ModuleType:
    """A module of the stand-in, under a name that ComfyUI does not use."""
    package = "comfyui_standin"
    if package not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            package, STANDIN / "__init__.py", submodule_search_locations=[str(STANDIN)]
        )
        assert spec
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{name}")


class _Run:
    """What the prompt that runs has done so far; used by the worker thread alone.

    A node has begun when its progress has, as in the stand-in: cached nodes never do. Its faults strike a little
    later, when its client has been told and just before its function is called.
    """

    def __init__(self, faults: Any) -> None:
        self.faults = faults
        self.begun: set[str] = set()
        self.newest: tuple[ProgressRegistry, str] | None = None

    def begin(self, registry: ProgressRegistry, node_id: str) -> None:
        self.begun.add(node_id)
        self.newest = (registry, node_id)

    def strike(self, start_progress: Any) -> None:
        """Once a node, though a node may be called several times. `start_progress` is ComfyUI's own."""
        if self.newest is None:
            return
        (registry, node_id), self.newest = self.newest, None

        def flood(count: int) -> None:
            for _ in range(count):
                start_progress(registry, node_id)

        self.faults.at_node(_stall, flood, torch.OutOfMemoryError)

    def end(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The outputs for the history, once the files of this run are spoilt where that is due."""
        begun, self.begun = self.begun, set()
        self.faults.at_prompt_end()
        folder_of = folder_paths.get_directory_by_type
        return {
            node_id: self.faults.at_saved_files(ui, folder_of) if node_id in begun else ui
            for node_id, ui in outputs.items()
        }


def _stall(seconds: float) -> None:
    PromptServer.instance.send_sync(_STALL, seconds)


def _hook_nodes(run: _Run) -> None:
    start_progress, before_node_execution = ProgressRegistry.start_progress, nodes.before_node_execution

    def start(registry: ProgressRegistry, node_id: str) -> None:
        run.begin(registry, node_id)
        start_progress(registry, node_id)

    def before() -> None:
        before_node_execution()  # ends the prompt when it was interrupted
        run.strike(start_progress)

    ProgressRegistry.start_progress = start
    nodes.before_node_execution = before


def _hook_history(run: _Run) -> None:
    task_done = PromptQueue.task_done

    def done(queue: PromptQueue, item_id: int, history_result: dict[str, Any], *rest: Any, **more: Any) -> None:
        listed = {**history_result, "outputs": run.end(history_result["outputs"])}
        if late := run.faults.strikes("history_late"):
            time.sleep(late.seconds)
        with queue.mutex:  # so that nobody sees an entry that is to be missing
            prompt_id = queue.currently_running[item_id][1]
            task_done(queue, item_id, listed, *rest, **more)
            if run.faults.strikes("history_missing"):
                queue.delete_history_item(prompt_id)

    PromptQueue.task_done = done


def _hook_messages(faults: Any) -> None:
    send, before_message = PromptServer.send, _standin_module("fault_sockets").before_message

    async def faulty_send(server: PromptServer, event: Any, data: Any, sid: str | None = None) -> None:
        if event == _STALL:
            time.sleep(data)
            return
        # Its number is not the one that goes over the wire.
        name = str(BinaryEventTypes.PREVIEW_IMAGE if event == BinaryEventTypes.UNENCODED_PREVIEW_IMAGE else event)
        prompt_id = getattr(server, "last_prompt_id", "")
        for receiver in list(server.sockets) if sid is None else [sid]:
            socket = server.sockets.get(receiver)
            if socket is not None and await before_message(faults, socket, name, prompt_id):
                await send(server, event, data, receiver)

    PromptServer.send = faulty_send


def _hook_http(faults: Any) -> None:
    module = _standin_module("fault_routes")
    routes, server = module.FaultRoutes(faults), PromptServer.instance
    for add, handler in (
        (server.routes.get, routes.get),
        (server.routes.post, routes.post),
        (server.routes.delete, routes.delete),
    ):
        add(module.PATH)(handler)

    @web.middleware
    async def answer(request: web.Request, handler: Any) -> web.StreamResponse:
        return await routes.answer(request, handler)

    server.app.middlewares.append(answer)
