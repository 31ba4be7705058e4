"""Checks of POST /prompt: what ComfyUI 0.18.1 refuses, and in which words (execution.py, validate_prompt)."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .catalogue import NODE_CLASSES
from .folders import Folders
from .node import Node, type_name
from .versions import Version
from .workflow import Workflow, is_link

log = logging.getLogger(__name__)

Problem = dict[str, Any]  # {"type", "message", "details", "extra_info"}


@dataclass
class Verdict:
    """`error` is None when at least one output node can run; `node_errors` may name others that cannot."""

    error: Problem | None = None
    outputs: list[str] = field(default_factory=list)
    node_errors: dict[str, Any] = field(default_factory=dict)


class _Refused(Exception):
    """One input is wrong."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem["message"])
        self.problem = problem


def validate(workflow: Workflow, folders: Folders, targets: list[str] | None, version: Version) -> Verdict:
    """Check a workflow; `targets`, where given, are the only output nodes to run.

    Literals are converted in place to the type of their input (`"64"` becomes 64), as in ComfyUI.
    Raises TypeError and the like for what is no workflow at all: the answer to it is 500.
    """
    if version.touches_every_input:
        _touch_every_input(workflow)
    candidates = []
    for node_id in workflow:
        node = workflow[node_id]
        problem = _class_problem(node_id, node, version)
        if problem:
            return Verdict(error=problem)
        if NODE_CLASSES[node["class_type"]].output_node and (targets is None or node_id in targets):
            candidates.append(node_id)
    if not candidates:
        return Verdict(error=_problem("prompt_no_outputs", "Prompt has no outputs"))
    return _validate_outputs(_Checker(workflow, folders), candidates)


def _touch_every_input(workflow: Workflow) -> None:
    """Fail on a malformed workflow where app/node_replace_manager.py does, before any check has been made."""
    for node in workflow.values():
        if "class_type" in node and "inputs" in node:
            node["inputs"].items()


def _class_problem(node_id: str, node: Mapping[str, Any], version: Version) -> Problem | None:
    class_type = node["class_type"] if "class_type" in node else None  # noqa: SIM401 - a UI workflow has lists here
    if class_type in NODE_CLASSES:
        return None
    if not version.names_missing_nodes:
        message = "Cannot execute because a node is missing the class_type property."
        if "class_type" in node:
            message = f"Cannot execute because node {class_type} does not exist."
        return _problem("invalid_prompt", message, f"Node ID '#{node_id}'")
    title = node.get("_meta", {}).get("title", class_type)
    if "class_type" in node:
        message = f"Node '{title}' not found. The custom node may not be installed."
    else:
        name = title or f"ID #{node_id}"
        message = f"Node '{name}' has no class_type. The workflow may be corrupted or a custom node is missing."
    about = {"node_id": node_id, "class_type": class_type, "node_title": title}
    return _problem("missing_node_type", message, f"Node ID '#{node_id}'", about)


def _validate_outputs(checker: _Checker, candidates: list[str]) -> Verdict:
    verdict = Verdict()
    complaints = []
    for output in candidates:
        if checker.is_valid_output(output):
            verdict.outputs.append(output)
            continue
        problems = checker.problems[output]
        complaints += [f"{problem['message']}: {problem['details']}" for problem in problems]
        for node_id, found in checker.problems.items():
            if found:
                entry = {"errors": found, "dependent_outputs": [], "class_type": checker.class_name(node_id)}
                verdict.node_errors.setdefault(node_id, entry)["dependent_outputs"].append(output)
    if not verdict.outputs:
        message = "Prompt outputs failed validation"
        verdict.error = _problem("prompt_outputs_failed_validation", message, "\n".join(complaints))
    return verdict


class _Checker:
    """Checks nodes from an output upwards, each once. `problems` is empty for a node whose sources are to blame."""

    def __init__(self, workflow: Workflow, folders: Folders) -> None:
        self.problems: dict[str, list[Problem]] = {}
        self._workflow = workflow
        self._folders = folders
        self._valid: dict[str, bool] = {}
        self._in_progress: set[str] = set()

    def class_name(self, node_id: str) -> str:
        name: str = self._workflow[node_id]["class_type"]
        return name

    def is_valid_output(self, node_id: str) -> bool:
        try:
            return self._is_valid(node_id)
        except Exception as failure:
            log.exception("output node %s cannot be checked", node_id)
            about = {"exception_type": type_name(failure), "traceback": traceback.format_tb(failure.__traceback__)}
            message = "Exception when validating node"
            problem = _problem("exception_during_validation", message, str(failure), about)
            self._settle(node_id, False, [problem])
            return False

    def _is_valid(self, node_id: str) -> bool:
        if node_id in self._valid:
            return self._valid[node_id]
        if node_id in self._in_progress:
            return False  # a cycle: ComfyUI refuses the outputs below it and blames no node
        node_class = NODE_CLASSES[self._workflow[node_id]["class_type"]]
        values = self._workflow[node_id]["inputs"]
        declared = node_class.inputs(self._folders)
        self._in_progress.add(node_id)
        problems, sources_valid = [], True
        for category in ("required", "optional"):
            for name, config in declared.get(category, {}).items():
                try:
                    if name in values:
                        sources_valid &= self._check_value(node_class, values, name, config)
                    elif category == "required":
                        about = {"input_name": name}
                        raise _Refused(_problem("required_input_missing", "Required input is missing", name, about))
                except _Refused as refusal:
                    problems.append(refusal.problem)
        problems += self._own_check(node_class, values)
        self._in_progress.discard(node_id)
        return self._settle(node_id, sources_valid and not problems, problems)

    def _settle(self, node_id: str, valid: bool, problems: list[Problem]) -> bool:
        self._valid[node_id] = valid
        self.problems[node_id] = problems
        return valid

    def _check_value(self, node_class: type[Node], values: dict[str, Any], name: str, config: tuple[Any, ...]) -> bool:
        """Raises _Refused; False when only a source of the input is wrong."""
        if isinstance(values[name], list):
            return self._check_link(values[name], name, config)
        kind, options = _kind_and_options(config)
        values[name] = _converted(values[name], name, kind, options)
        if name not in node_class.validates:
            _check_range(values[name], name, kind, options)
        return True

    def _check_link(self, link: list[Any], name: str, config: tuple[Any, ...]) -> bool:
        kind, options = _kind_and_options(config)
        about: dict[str, Any] = {"input_name": name, "input_config": (kind, options)}
        if len(link) != 2:
            message = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            raise _Refused(_problem("bad_linked_input", message, name, {**about, "received_value": link}))
        source, slot = link
        received = NODE_CLASSES[self._workflow[source]["class_type"]].returns[slot]
        if kind != "*" and received not in (*kind.split(","), "*"):
            details = f"{name}, received_type({received}) mismatch input_type({kind})"
            about.update(received_type=received, linked_node=link)
            raise _Refused(
                _problem("return_type_mismatch", "Return type mismatch between linked nodes", details, about)
            )
        try:
            return self._is_valid(source)
        except Exception as failure:
            log.exception("node %s cannot be checked", source)
            about.update(exception_message=str(failure), exception_type=type_name(failure))
            about.update(traceback=traceback.format_tb(failure.__traceback__), linked_node=link)
            message = "Exception when validating inner node"
            problem = _problem("exception_during_inner_validation", message, str(failure), about)
            return self._settle(source, False, [problem])

    def _own_check(self, node_class: type[Node], values: Mapping[str, Any]) -> list[Problem]:
        given = {name: values[name] for name in node_class.validates if name in values and not is_link(values[name])}
        reason = node_class.validate(self._folders, given) if given else None
        if reason is None:
            return []
        message = "Custom validation failed for node"
        return [
            _problem("custom_validation_failed", message, f"{name} - {reason}", {"input_name": name}) for name in given
        ]


def _converted(value: Any, name: str, kind: Any, options: dict[str, Any]) -> Any:
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    converter = (
        {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(kind) if isinstance(kind, str) else None
    )
    if converter is None:
        return value
    try:
        return converter(value)
    except (TypeError, ValueError, OverflowError) as failure:
        about = {"input_name": name, "input_config": (kind, options), "received_value": value}
        about["exception_message"] = str(failure)
        message = f"Failed to convert an input value to a {kind} value"
        raise _Refused(_problem("invalid_input_type", message, f"{name}, {value}, {failure}", about)) from failure


def _check_range(value: Any, name: str, kind: Any, options: dict[str, Any]) -> None:
    about = {"input_name": name, "input_config": (kind, options), "received_value": value}
    if "min" in options and value < options["min"]:
        message = f"Value {value} smaller than min of {options['min']}"
        raise _Refused(_problem("value_smaller_than_min", message, name, about))
    if "max" in options and value > options["max"]:
        message = f"Value {value} bigger than max of {options['max']}"
        raise _Refused(_problem("value_bigger_than_max", message, name, about))
    allowed = options.get("options", []) if kind == "COMBO" else kind
    if isinstance(allowed, list) and value not in allowed:
        choices = str(allowed)
        if len(allowed) > 20:
            about["input_config"], choices = None, f"(list of length {len(allowed)})"
        details = f"{name}: '{value}' not in {choices}"
        raise _Refused(_problem("value_not_in_list", "Value not in list", details, about))


def _kind_and_options(config: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    return config[0], config[1] if len(config) > 1 else {}


def _problem(kind: str, message: str, details: str = "", extra_info: dict[str, Any] | None = None) -> Problem:
    return {"type": kind, "message": message, "details": details, "extra_info": extra_info or {}}
