"""One execution of one workflow (execution.py of ComfyUI 0.18.1, PromptExecutor and execute)."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from .cache import Cached, ResultCache
from .catalogue import NODE_CLASSES
from .faults import Faults
from .folders import Folders
from .node import Context, InterruptedPromptError, type_name
from .plan import Plan
from .progress import Progress
from .prompt_queue import Item, Outcome
from .sessions import TEXT, Sessions, text_frame
from .versions import Version
from .workflow import is_link

log = logging.getLogger(__name__)


class PromptRun:
    """Runs the nodes of a prompt. `outcome` is what the history keeps of it.

    `metadata`: saved files hold the workflow. `preview`: samplers show their steps.
    """

    def __init__(
        self,
        item: Item,
        sessions: Sessions,
        cache: ResultCache,
        folders: Folders,
        version: Version,
        faults: Faults,
        check_interrupt: Callable[[], None],
        *,
        metadata: bool,
        preview: bool,
    ) -> None:
        _, self._prompt_id, self._workflow, self._extra_data, self._outputs, _ = item
        self._sessions = sessions
        self._cache = cache
        self._folders = folders
        self._version = version
        self._faults = faults
        self._check_interrupt = check_interrupt
        self._progress = Progress(sessions, self._prompt_id, check_interrupt, throttled=version.throttles_progress)
        self._metadata = metadata
        self._preview = preview
        self._executed: list[str] = []
        self.outcome = Outcome()

    def execute(self) -> None:
        """Run to the end, whichever it is."""
        self._report("execution_start")
        self._cache.start(self._workflow)
        cached = [node_id for node_id in self._workflow if self._is_cached(node_id)]
        self._report("execution_cached", nodes=cached)
        plan = Plan(self._workflow, self._outputs, self._is_cached)
        while (node_id := plan.next()) is not None:
            if not self._run_node(node_id):
                self.outcome.success = False
                return
            plan.done(node_id)
        self._report("execution_success")

    def _is_cached(self, node_id: str) -> bool:
        return self._cache.get(node_id) is not None

    def _run_node(self, node_id: str) -> bool:
        """Run a node, or repeat the message of a cached one. False: it stopped the prompt, and that is reported."""
        cached = self._cache.get(node_id)
        if cached is not None:
            self._repeat(node_id, cached)
            return True
        inputs: dict[str, Any] = {}
        self._progress.start(node_id)
        try:
            inputs.update(self._gather(node_id))
            self._compute(node_id, inputs)
        except InterruptedPromptError:
            log.info("Processing interrupted")
            self._report_stop("execution_interrupted", node_id, always=True)
            return False
        except Exception as failure:
            log.exception("!!! Exception during processing !!! %s", failure)
            self._report_stop("execution_error", node_id, **self._error_details(failure, inputs))
            return False
        self._progress.finish(node_id)
        self._executed.append(node_id)
        return True

    def _repeat(self, node_id: str, cached: Cached) -> None:
        output = cached.ui["output"] if cached.ui else None
        heard = self._tell("executed", node=node_id, display_node=node_id, output=output)
        if cached.ui and (heard or not self._version.cached_needs_client):
            self._keep(node_id, cached.ui)
        self._progress.finish(node_id)

    def _gather(self, node_id: str) -> dict[str, Any]:
        """The values for a node: known inputs (few classes get a nonce under an unknown name), and hidden ones."""
        node = self._workflow[node_id]
        node_class = NODE_CLASSES[node["class_type"]]
        declared = node_class.inputs(self._folders)
        known = {**declared.get("required", {}), **declared.get("optional", {})}
        values = {}
        for name, value in node["inputs"].items():
            if is_link(value):
                source = self._cache.get(value[0])
                values[name] = source.outputs[value[1]] if source else None
            elif name in known or node_class.takes_any_input:
                values[name] = value
        extra = self._extra_data if isinstance(self._extra_data, dict) else {}
        pnginfo = extra.get("extra_pnginfo")
        prompt = self._cache.with_fingerprints(self._workflow)
        hidden = {"PROMPT": prompt, "EXTRA_PNGINFO": pnginfo, "UNIQUE_ID": node_id}
        # V1 nodes declare the bare kind, V3 nodes a tuple with it.
        kinds = {name: kind if isinstance(kind, str) else kind[0] for name, kind in declared.get("hidden", {}).items()}
        return values | {name: hidden[kind] for name, kind in kinds.items()}

    def _compute(self, node_id: str, inputs: dict[str, Any]) -> None:
        self._sessions.last_node_id = node_id
        self._tell("executing", node=node_id, display_node=node_id)
        node = self._cache.node_object(node_id, self._workflow[node_id]["class_type"])
        self._check_interrupt()
        self._faults.at_node(self._sessions.stall, partial(self._flood, node_id))
        step, say = partial(self._progress.step, node_id), partial(self._say, node_id)
        result = node.run(Context(self._folders, self._metadata, self._preview, step, say), **inputs)
        listed = self._faults.at_saved_files(result.ui, self._folders.of_type)
        ui = None
        if result.ui:
            meta = {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
            ui = {"meta": meta, "output": result.ui}
            self._keep(node_id, {"meta": meta, "output": listed})
            self._tell("executed", node=node_id, display_node=node_id, output=result.ui)
        self._cache.put(node_id, Cached(result.outputs, ui))

    def _say(self, node_id: str, text: str) -> None:
        self._sessions.publish(TEXT, text_frame(node_id, text))  # to every client (0.18.1, send_progress_text)

    def _flood(self, node_id: str, count: int) -> None:
        for _ in range(count):
            self._progress.start(node_id)

    def _keep(self, node_id: str, ui: dict[str, Any]) -> None:
        self.outcome.outputs[node_id] = ui["output"]
        self.outcome.meta[node_id] = ui["meta"]

    def _error_details(self, failure: Exception, inputs: dict[str, Any]) -> dict[str, Any]:
        return {
            "exception_message": f"{failure}\n",
            "exception_type": type_name(failure),
            "traceback": traceback.format_tb(failure.__traceback__),
            "current_inputs": {name: [_printable(value)] for name, value in inputs.items()},
            "current_outputs": list(self._workflow),
        }

    def _tell(self, event: str, **data: Any) -> bool:
        """Send to the prompt's client; False when it has none."""
        client_id = self._sessions.client_id
        if client_id is None:
            return False
        self._sessions.publish(event, {**data, "prompt_id": self._prompt_id}, client_id)
        return True

    def _report(self, event: str, *, always: bool = False, **data: Any) -> None:
        """Send to the prompt's client (with `always`: to everybody, if it has none) and keep for the history."""
        stamped = {"prompt_id": self._prompt_id, **data, "timestamp": int(time.time() * 1000)}
        self.outcome.messages.append((event, stamped))
        if self._sessions.client_id is not None or always:
            self._sessions.publish(event, stamped, self._sessions.client_id)

    def _report_stop(self, event: str, node_id: str, *, always: bool = False, **details: Any) -> None:
        node_type = self._workflow[node_id]["class_type"]
        self._report(
            event, always=always, node_id=node_id, node_type=node_type, executed=list(self._executed), **details
        )


def _printable(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float, str)) else str(value)
