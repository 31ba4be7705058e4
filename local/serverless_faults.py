"""The faults of the RunPod stand-in: armed by `POST /_fault`, listed by `GET /_fault`.

    {"kind": "job-done-500", "after": 0, "times": 3}

`after` such calls are spared, the next `times` are struck (default: 0 and 1). `"times": 0` takes the kind back. With
`"call": "status"` a fault of the client side strikes only that call, with `"pod": "pod1"` one of the worker side only
that worker. What each kind does stands in `KINDS`.
"""

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    # What a worker meets.
    "job-done-400": "the result is refused; the job is COMPLETED without an output",
    "job-done-500": "the result is answered 500 and not kept",
    "job-done-drop": "the connection is closed without an answer, the result is not kept",
    "progress-delayed": "a progress update is kept only when the next post of its job has been kept",
    "progress-after-result": "a progress update is kept only after the result: the job shows as running, for good",
    "job-take-held": "a poll gets no job and is held until the kind is taken back; then it may get one",
    "job-take-500": "a poll for a job is answered 500 at once",
    "job-take-drop": "a poll for a job is cut at once, without an answer",
    "stop-repeated": "a worker is told once more to stop the jobs that it has just been told of",
    "stop-pod-ignored": "a result asks for its worker to be stopped, and the worker goes on getting jobs",
    "ping-lost": "a ping is answered, and not counted as a sign of life",
    # What a client meets.
    "client-404": "the call is answered 404 and does nothing",
    "client-429": "the call is answered 429 and does nothing",
    "client-500": "the call is answered 500 and does nothing",
    "client-503": "the call is answered 503 and does nothing",
    "client-html": "the call is answered 200 with an HTML page, and does nothing",
    "client-502": "the call is answered 502 with an HTML page, as by a gateway, and does nothing",
    "client-drop": "the connection is closed without an answer, and the call does nothing",
    "client-cut": "the call is carried out, and the connection is closed in the middle of the answer",
}
CLIENT_PREFIX = "client-"
CLIENT_KINDS = [kind for kind in KINDS if kind.startswith(CLIENT_PREFIX)]


@dataclass
class Fault:
    """One armed fault: `after` and `times` are what is left of them, `struck` counts; `only` is the call or pod."""

    kind: str
    after: int
    times: int
    only: str | None
    struck: int = 0
    taken_back: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, Any]:
        only = {} if self.only is None else {"call" if self.is_client_side else "pod": self.only}
        return {"kind": self.kind, "after": self.after, "times": self.times, "struck": self.struck, **only}

    @property
    def is_client_side(self) -> bool:
        return self.kind.startswith(CLIENT_PREFIX)


class Faults:
    """Every fault of one stand-in, in the order in which they were armed."""

    def __init__(self) -> None:
        self._armed: list[Fault] = []

    def arm(self, order: dict[str, Any], client_calls: Collection[str]) -> None:
        """Arm what a POST asks for; raises ValueError with one sentence where that makes no sense."""
        unknown = order.keys() - {"kind", "after", "times", "call", "pod"}
        if unknown:
            raise ValueError(f"a fault has no {', '.join(sorted(unknown))}")
        kind = order.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}")
        after, times = _count(order, "after", 0), _count(order, "times", 1)
        side = "call" if kind in CLIENT_KINDS else "pod"
        if order.keys() & {"call", "pod"} - {side}:
            raise ValueError(f"{kind} can be limited to a `{side}` only")
        only = order.get(side)
        if not isinstance(only, str | None) or (side == "call" and only is not None and only not in client_calls):
            raise ValueError(f"`{side}` must be a string; a call is one of {', '.join(client_calls)}")
        if times == 0:
            self._take_back(kind)
        else:
            self._armed.append(Fault(kind, after, times, only))

    def describe(self) -> list[dict[str, Any]]:
        return [fault.describe() for fault in self._armed]

    def strike(self, *kinds: str, by: str) -> Fault | None:
        """The fault that a request meets, if any; `by` is the call or the worker. It counts: once a request."""
        for fault in self._armed:
            if fault.kind not in kinds or fault.only not in (None, by):
                continue
            if fault.after:
                fault.after -= 1
            elif fault.times:
                fault.times -= 1
                fault.struck += 1
                return fault
        return None

    def _take_back(self, kind: str) -> None:
        for fault in self._armed:
            if fault.kind == kind:
                fault.taken_back.set()
        self._armed = [fault for fault in self._armed if fault.kind != kind]


def _count(order: dict[str, Any], name: str, default: int) -> int:
    number = order.get(name, default)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"`{name}` must be a whole number, 0 or more")
    return number
