"""Builds the stand-in from its options and runs it: HTTP in an asyncio loop, prompts in one worker thread."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from aiohttp import web

from .custom_nodes import import_custom_nodes, run_prestartup_scripts
from .executor import Executor
from .faults import Faults
from .folders import Folders
from .model_paths import extra_model_folders
from .options import parse
from .prompt_queue import PromptQueue
from .routes import Routes
from .sessions import Sessions, queue_info
from .versions import VERSIONS, Version

log = logging.getLogger(__name__)

# ComfyUI validates and signs a chain of nodes by recursion, with one Python frame a node, and so takes chains of some
# 600 nodes under Python's limit of 1000 frames. Here a node takes three frames.
_RECURSION_LIMIT = 3000


def main(argv: list[str]) -> int:
    """Run until SIGINT (status 0) or SIGTERM (the process ends at once, as ComfyUI's does); with --quick-test-for-ci
    only until all is imported."""
    options = parse(argv[1:], Path(argv[0]).absolute().parent)
    stream = sys.stdout if options.log_stdout else sys.stderr
    logging.basicConfig(level=options.verbose, format="%(message)s", stream=stream)
    log.info("This is a stand-in for ComfyUI %s: its protocol and its model-free nodes.", options.like)
    sys.setrecursionlimit(_RECURSION_LIMIT)
    extra = extra_model_folders(map(Path, itertools.chain(*options.extra_model_paths_config)))
    folders = Folders(
        options.input_directory, options.output_directory, options.temp_directory, options.models_directory, extra
    )
    shutil.rmtree(folders.temp, ignore_errors=True)
    try:
        folders.temp.mkdir(parents=True)
        faults = Faults(options.user_directory, dict(os.environ))
        faults.at_boot()
        wanted = frozenset(options.whitelist_custom_nodes) if options.disable_all_custom_nodes else None
        node_folders = (options.custom_nodes_directory, *extra.get("custom_nodes", ()))
        run_prestartup_scripts(node_folders, wanted)
        import_custom_nodes(node_folders, wanted)
        if options.quick_test_for_ci:
            return 0
        asyncio.run(_serve(options, folders, faults))
    except KeyboardInterrupt:
        log.info("Stopped server")
    except OSError as failure:
        log.error("cannot start: %s", failure)
        return 1
    finally:
        shutil.rmtree(folders.temp, ignore_errors=True)
    return 0


async def _serve(options: argparse.Namespace, folders: Folders, faults: Faults) -> None:
    version = VERSIONS[options.like]
    sessions = Sessions(asyncio.get_running_loop(), _features(version, options.max_upload_size), faults)
    preview = options.preview_method != "none"
    executor = Executor(sessions, folders, version, faults, metadata=not options.disable_metadata, preview=preview)
    queue = PromptQueue(lambda remaining: sessions.publish("status", {"status": queue_info(remaining)}))
    routes = Routes(queue, sessions, executor, folders, version, faults)
    runner = web.AppRunner(routes.application(options), access_log=None)
    await runner.setup()
    for address in options.listen.split(","):
        await web.TCPSite(runner, address, options.port).start()
        log.info("To see the GUI go to: http://%s:%s", address, options.port)
    threading.Thread(target=prompt_worker, args=(executor, queue), daemon=True).start()
    await sessions.deliver_forever()


def prompt_worker(executor: Executor, queue: PromptQueue) -> None:
    """The worker thread. Python names it after this function, `Thread-1 (prompt_worker)`: as in ComfyUI (main.py)."""
    executor.work_forever(queue, _history_delay_s())


def _features(version: Version, max_upload_size_mib: float) -> dict[str, Any]:
    """What GET /features says (comfy_api/feature_flags.py)."""
    return {
        "supports_preview_metadata": True,
        "max_upload_size": round(max_upload_size_mib * 1024 * 1024),
        **version.features,
    }


def _history_delay_s() -> float:
    """STANDIN_HISTORY_DELAY_MS widens the gap between execution_success and the history entry (default 1.5 ms)."""
    return float(os.environ.get("STANDIN_HISTORY_DELAY_MS", "1.5")) / 1000
