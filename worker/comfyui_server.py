"""ComfyUI as a process that answers on a port: requests that wait as long as waiting makes sense, and its end.

Slow is not dead: ComfyUI's event loop can stand still while a node holds Python's lock or a disk is read. A request
waits on as long as the process lives and computes, and the job that it is for may still run.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from worker.errors import ComfyUICrashed, ComfyUIStuck, ComfyUIUnavailable, JobCancelled, JobTimeout
from worker.process import ComfyUIProcess, ProcessState

HTTP_TIMEOUT_S = 60.0  # validation hashes the input files and lists the model folders, on a network volume too
ANSWER_POLL_S = 0.1
READY_POLL_S = 0.05
READY_TIMEOUT_S = 2.0
HUNG_S = 30.0  # a ComfyUI that neither answers nor computes for so long is ended
IDLE_CPU_S = 0.1  # so little processor time in HUNG_S is none
BUSY_S = 120.0  # one that computes without an answer, with nothing to do, is ended, too
# A start after the first one may take so many times as long; then it hangs.
RESTART_FACTOR = 5.0
MIN_RESTART_S = 60.0
DYING_S, DYING_POLL_S = 0.2, 0.005


class ComfyUIServer:
    """The ComfyUI that `start.sh` runs on 127.0.0.1:``port``. Not thread-safe: one job at a time.

    ``state`` is the start of it that has answered last: the one that a job runs on.
    """

    def __init__(
        self,
        port: int,
        process: ComfyUIProcess,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.port = port
        self.process = process
        self.clock = clock
        self.sleep = sleep
        self.state: ProcessState | None = None
        self._boot_s: float | None = None
        self._check: Callable[[], None] = _no_check

    @contextlib.contextmanager
    def serving(self, check: Callable[[], None] | None) -> Iterator[None]:
        """While requests are for a job, ``check`` raises JobTimeout or JobCancelled out of their waiting. None: they
        are not, because the job is over."""
        before, self._check = self._check, check or _no_check
        try:
            yield
        finally:
            self._check = before

    # --- readiness ---

    def wait_ready(self, timeout_s: float) -> ProcessState:
        """Poll every 50 ms until the current start of ComfyUI answers; returns it.

        Raises ComfyUIUnavailable after ``timeout_s``. A start that dies is replaced by `start.sh`, or the container
        ends with it, so waiting on is right as long as there is time; one that hangs is ended.
        """
        started = self.clock()
        state, silence = self.process.state(), None
        while True:
            self._check()
            if state is not None and self.process.has_booted(state) and self._answers():
                if self._boot_s is None:
                    self._boot_s = self.clock() - started
                self.state = state
                return state
            newest = self.process.state()
            if silence is None or newest != state:
                state, silence = newest, _Silence(self, newest)
            elif self._hangs(state, silence):
                self._end(state)
            if self.clock() - started >= timeout_s:
                raise ComfyUIUnavailable(
                    f"ComfyUI did not answer on port {self.port} within {timeout_s:g} s.", log=self.process.log_tail()
                )
            self.sleep(READY_POLL_S)

    def _hangs(self, state: ProcessState | None, silence: _Silence) -> bool:
        """Whether a start, with nothing to do or in its boot, has been silent for too long."""
        if state is None or self._boot_s is None:
            return False  # the first boot has all the time that it is given
        if state == self.state:
            return silence.is_hang() or silence.total_s() >= BUSY_S
        return silence.total_s() >= max(MIN_RESTART_S, RESTART_FACTOR * self._boot_s)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=READY_TIMEOUT_S)
        try:
            connection.request("GET", "/system_stats")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    # --- its end ---

    def raise_if_dead(self) -> None:
        """Raise ComfyUICrashed, with the end of ComfyUI's log, if the start that this job runs on has ended."""
        if self.state is None or self.process.is_alive(self.state):
            return
        death = self.process.death_of(self.state)
        raise ComfyUICrashed(
            f"ComfyUI ended in the middle of the job: {death.sentence}",
            exit_code=death.exit_code,
            out_of_memory=death.out_of_memory,
            log=self.process.log_tail(),
        )

    def _await_death(self) -> None:
        """The kernel closes the connections of a process that ends just before that counts as dead (do_exit)."""
        deadline = self.clock() + DYING_S
        while self.state is not None and self.process.is_alive(self.state) and self.clock() < deadline:
            self.sleep(DYING_POLL_S)

    def end(self) -> None:
        """Kill the start that this job runs on; `start.sh` starts the next one. Raises ComfyUIStuck."""
        self._end(self.state)

    def _end(self, state: ProcessState | None) -> None:
        if state is not None and not self.process.kill(state):
            raise ComfyUIStuck("ComfyUI cannot be ended; this worker is being replaced, send the job again.")

    # --- requests ---

    def call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float = HTTP_TIMEOUT_S,
        grace_s: float | None = None,
    ) -> tuple[int, bytes]:
        """One request, on a connection of its own; returns status and body.

        With ``grace_s``, a job that has to end while the answer is out still waits for it so long, and then ComfyUI is
        ended: what it carried out after that would be for nobody. Raises ComfyUICrashed when the process has ended or
        hangs, ComfyUIUnavailable for any other trouble (caused by TimeoutError after ``timeout_s``), and what the check
        of `serving` does.
        """
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, payload, headers)
            self._await_answer(connection.sock, timeout_s, grace_s)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            if not isinstance(error, TimeoutError):
                self._await_death()
            self.raise_if_dead()
            asked = f"{method} /{path.split('/')[1]}"  # what follows can be a caller's word
            raise ComfyUIUnavailable(f"ComfyUI did not answer {asked} ({type(error).__name__}).") from error
        finally:
            connection.close()

    def _await_answer(self, connection: socket.socket, timeout_s: float, grace_s: float | None) -> None:
        """Return when there is something to read, be it the end of the connection. Raises TimeoutError."""
        deadline, silence = self.clock() + timeout_s, _Silence(self, self.state)
        while not _is_readable(connection, min(ANSWER_POLL_S, timeout_s)):
            try:
                self._check()
            except (JobTimeout, JobCancelled):
                if grace_s is not None and not _is_readable(connection, grace_s):
                    self.end()
                raise
            if self.state is not None and silence.is_hang():
                self.end()
                told = f"ComfyUI neither answered nor computed for {HUNG_S:g} s and was ended."
                raise ComfyUICrashed(told, log=self.process.log_tail())
            if self.clock() >= deadline:
                raise TimeoutError


class _Silence:
    """How long a start of ComfyUI has not answered, and how long of that it has used no processor."""

    def __init__(self, server: ComfyUIServer, state: ProcessState | None) -> None:
        self._server = server
        self._state = state
        self._since = self._idle_since = server.clock()
        self._cpu_s = self._used_s()

    def total_s(self) -> float:
        return self._server.clock() - self._since

    def is_hang(self) -> bool:
        now, used_s = self._server.clock(), self._used_s()
        if used_s - self._cpu_s > IDLE_CPU_S:
            self._idle_since, self._cpu_s = now, used_s
        return now - self._idle_since >= HUNG_S

    def _used_s(self) -> float:
        return 0.0 if self._state is None else self._server.process.cpu_s(self._state)


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    return bool(select.select([connection], [], [], timeout_s)[0])


def _no_check() -> None:
    """Nothing ends the waiting from outside."""
