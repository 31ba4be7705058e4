"""The jobs of tests/soak.py: kinds, each with a picture of its own and what must come of it."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.process.stack import base64_of, invert_workflow, inverted, slow_workflow

DEADLINE_S = 10.0

Workflow = dict[str, dict[str, Any]]


@dataclass
class Order:
    """A job as it is sent, and what must come of it: pictures by node id (each inverted), a code, or CANCELLED."""

    kind: str
    job_input: dict[str, Any]
    pictures: dict[str, bytes] = field(default_factory=dict)
    code: str | None = None
    cancel_after_s: float | None = None


def random_picture(dice: random.Random) -> bytes:
    width, height = dice.randint(8, 160), dice.randint(8, 160)
    image = Image.frombytes("RGB", (8, 8), dice.randbytes(192)).resize((width, height))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def order(kind: str, dice: random.Random, **more: Any) -> Order:
    """A job of a kind with a picture of its own, and ``more`` keys of its input."""
    content = random_picture(dice)
    workflow, extra, pictures, code, cancel_after_s = KINDS[kind](dice, content)
    images = {"a.png": base64_of(content)}
    job_input = {"workflow": workflow, "images": images, "timeout_s": DEADLINE_S, **extra, **more}
    return Order(kind, job_input, pictures, code, cancel_after_s)


Parts = tuple[Workflow, dict[str, Any], dict[str, bytes], str | None, float | None]


def plain(dice: random.Random, content: bytes) -> Parts:
    prefix = dice.choice(["picture", "a/b/picture", "ComfyUI"])
    return invert_workflow(prefix=prefix), {}, {"3": content}, None, None


def with_saver(class_type: str) -> Callable[[random.Random, bytes], Parts]:
    def make(_: random.Random, content: bytes) -> Parts:
        workflow = invert_workflow()
        workflow["3"]["class_type"] = class_type
        if class_type != "StandinStrict":
            workflow["3"]["inputs"].pop("filename_prefix")
        return workflow, {}, {"3": content}, None, None

    return make


def two_outputs(_: random.Random, content: bytes) -> Parts:
    workflow = invert_workflow()
    workflow["3"]["class_type"] = "StandinTee"
    workflow["4"] = {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "again"}}
    workflow["5"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "source"}}
    return workflow, {}, {"3": content, "4": content, "5": inverted(content)}, None, None


def slow(dice: random.Random, content: bytes) -> Parts:
    return slow_workflow(dice.uniform(0.1, 1.5)), {}, {"3": content}, None, None


def cancelled(dice: random.Random, content: bytes) -> Parts:
    return slow_workflow(60), {}, {}, "CANCELLED", dice.uniform(0, 2)


def overdue(_: random.Random, content: bytes) -> Parts:
    return slow_workflow(60), {"timeout_s": 0.5}, {}, "JOB_TIMEOUT", None


def refused(_: random.Random, content: bytes) -> Parts:
    workflow = invert_workflow()
    workflow["2"]["class_type"] = "NoSuchNode"
    return workflow, {}, {}, "PROMPT_REJECTED", None


def failing(_: random.Random, content: bytes) -> Parts:
    return invert_workflow(prefix="x" * 300), {}, {}, "EXECUTION_FAILED", None


def damaged(_: random.Random, content: bytes) -> Parts:
    return invert_workflow(), {"images": {"a.png": base64_of(content[:-20])}}, {}, "MEDIA_INVALID", None


KINDS: dict[str, Callable[[random.Random, bytes], Parts]] = {
    "plain": plain,
    "two outputs": two_outputs,
    "preview": with_saver("PreviewImage"),
    "websocket": with_saver("SaveImageWebsocket"),
    "strict": with_saver("StandinStrict"),
    "slow": slow,
    "cancelled": cancelled,
    "overdue": overdue,
    "refused": refused,
    "failing": failing,
    "damaged": damaged,
}
WEIGHTS = [30, 10, 6, 6, 6, 12, 8, 6, 6, 6, 4]
