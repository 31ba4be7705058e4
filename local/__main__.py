"""The whole product on one machine: no GPU, no Docker, no account.

    python -m local                      boots everything, prints the URLs and a client command, stays up until Ctrl-C
    python -m local -- COMMAND...        boots everything, runs COMMAND, stops everything; its exit code is COMMAND's

`{url}` in COMMAND becomes the base URL of the RunPod stand-in; RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID are set for it.
`start.sh`, `rp_handler.py` and the SDK's loop are the real ones. ComfyUI is the stand-in of this folder, or the
checkout that COMFYUI_DIR and COMFYUI_PYTHON name.
"""

import argparse
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from local.serverless_api import worker_environment

ROOT = Path(__file__).resolve().parent.parent
ENDPOINT = "local"
BOOT_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.05
PR_SET_PDEATHSIG = 1  # prctl(2): the child gets a signal when its parent dies, even of SIGKILL


class LocalError(Exception):
    """One sentence on why the stack cannot run."""


@dataclass(frozen=True)
class Platform:
    """A running RunPod stand-in. ``api_url`` is what a client's --url takes."""

    process: subprocess.Popen[str]
    url: str
    api_key: str

    @property
    def api_url(self) -> str:
        return f"{self.url}/v2"


@dataclass(frozen=True)
class Worker:
    """A running `start.sh` with all that it has started, and its environment."""

    process: subprocess.Popen[str]
    settings: Mapping[str, str]

    @property
    def id(self) -> str:
        """The platform's name for it."""
        return self.settings["RUNPOD_POD_ID"]

    @property
    def comfyui_url(self) -> str:
        return f"http://127.0.0.1:{self.settings['COMFYUI_PORT']}"


@dataclass(frozen=True)
class Stack:
    """A platform with one worker."""

    platform: Platform
    worker: Worker

    def raise_if_down(self) -> None:
        for name, process in (("start.sh", self.worker.process), ("The RunPod stand-in", self.platform.process)):
            if process.poll() is not None:
                raise LocalError(f"{name} ended with code {process.returncode}; its lines above say why.")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_stack(
    environ: Mapping[str, str], platform_port: int = 0, log_file: IO[str] = sys.stderr
) -> Iterator[Stack]:
    """Start the platform stand-in and one worker; stop both, and all that they started, on the way out."""
    with (
        running_platform(environ, port=platform_port, log_file=log_file) as platform,
        running_worker(platform, environ, log_file=log_file) as worker,
    ):
        yield Stack(platform, worker)


@contextlib.contextmanager
def running_platform(
    environ: Mapping[str, str], *options: str, port: int = 0, log_file: IO[str] = sys.stderr
) -> Iterator[Platform]:
    """Start the platform stand-in, with more of its ``options``. Raises LocalError."""
    api_key = secrets.token_hex(16)
    serve = [sys.executable, "-m", "local.serverless_api", "--port", str(port), "--api-key", api_key]
    process = start([*serve, "--endpoint", ENDPOINT, *options], environ, log_file, subprocess.PIPE)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()  # "listening URL"
        if not words:
            raise LocalError("The RunPod stand-in did not start; its line above says why.")
        yield Platform(process, words[-1], api_key)
    finally:
        stop(process)


@contextlib.contextmanager
def running_worker(platform: Platform, environ: Mapping[str, str], log_file: IO[str] = sys.stderr) -> Iterator[Worker]:
    """Start `start.sh` as a worker of ``platform``."""
    settings = worker_settings(environ, platform.url, platform.api_key)
    process = start(["bash", str(ROOT / "start.sh")], settings, log_file)
    try:
        yield Worker(process, settings)
    finally:
        stop(process)


def worker_settings(environ: Mapping[str, str], platform_url: str, api_key: str) -> dict[str, str]:
    """The environment of `start.sh`: what the caller has set wins."""
    worker_id = f"local-{secrets.token_hex(4)}"
    ramdisk_dir = environ.get("RAMDISK_DIR", f"/dev/shm/comfy-endpoint-{worker_id}")
    settings = {
        "COMFYUI_PORT": str(free_port()),
        "RAMDISK_DIR": ramdisk_dir,
        "WORKER_PYTHON": sys.executable,
        "REQUIRE_GPU": "0",
    }
    if "COMFYUI_DIR" not in environ:
        settings |= {"COMFYUI_DIR": str(ROOT / "local" / "comfyui"), "COMFYUI_PYTHON": sys.executable}
    platform = worker_environment(platform_url, ENDPOINT, api_key, worker_id)
    # The SDK prefers a key from ~/.runpod/config.toml to the one in its environment, so it gets another home.
    return {**settings, **environ, **platform, "MODE": "serverless", "HOME": f"{ramdisk_dir}/user"}


def start(
    command: list[str], environ: Mapping[str, str], log_file: IO[str], stdout: int | None = None
) -> subprocess.Popen[str]:
    """A child in a session of its own, so that Ctrl-C reaches only us and we end it in order; it never outlives us."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # A shell starts what goes into the background with SIGINT ignored, and bash cannot trap it then.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=log_file if stdout is None else stdout,
        stderr=log_file,
        text=True,
        start_new_session=True,
        preexec_fn=prepare,
    )


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM, with which a worker finishes its job; SIGINT where that takes long; SIGKILL where nothing helps."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return


def run_command(stack: Stack, command: list[str], environ: Mapping[str, str]) -> int:
    """Run ``command`` against the stack; returns its exit code. Raises LocalError if the stack dies under it."""
    words = [word.replace("{url}", stack.platform.api_url) for word in command]
    access = {"RUNPOD_API_KEY": stack.platform.api_key, "RUNPOD_ENDPOINT_ID": ENDPOINT}
    try:
        client = subprocess.Popen(words, env={**environ, **access}, stdin=subprocess.DEVNULL, text=True)
    except OSError as error:
        raise LocalError(f"{command[0]} cannot be started: {error.strerror}.") from error
    try:
        while client.poll() is None:
            stack.raise_if_down()
            time.sleep(POLL_S)
    finally:
        stop(client)
    return client.returncode


def wait_until_up(stack: Stack) -> None:
    """Return when ComfyUI answers. Raises LocalError."""
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        stack.raise_if_down()
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{stack.worker.comfyui_url}/system_stats", timeout=2),
        ):
            return
        time.sleep(POLL_S)
    raise LocalError(f"ComfyUI did not answer within {BOOT_TIMEOUT_S:g} s.")


def stay_up(stack: Stack) -> None:
    """Print how to use the stack, then wait until it dies or Ctrl-C."""
    wait_until_up(stack)
    platform = stack.platform
    print(
        f"\nRunPod API  {platform.api_url}/{ENDPOINT}   (key: {platform.api_key})\n"
        f"ComfyUI     {stack.worker.comfyui_url}\n\n"
        f"RUNPOD_API_KEY={platform.api_key} .venv/bin/python client.py --url {platform.api_url} \\\n"
        f"    --endpoint {ENDPOINT} --workflow workflows/one_image.json --img workflows/photos/coffee.jpg\n\n"
        "Ctrl-C stops everything.",
        flush=True,
    )
    while True:
        stack.raise_if_down()
        time.sleep(0.5)


def main() -> int:
    """Returns the command's exit code, 0 after Ctrl-C, or 1 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m local", description="Run the whole stack on this machine.")
    parser.add_argument("--platform-port", type=int, default=0, help="port of the RunPod API (default: a free one)")
    parser.add_argument("command", nargs="*", help="what to run against the stack; {url} is its base URL")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end in order, as after Ctrl-C
    try:
        with running_stack(os.environ, options.platform_port) as stack:
            if options.command:
                return run_command(stack, options.command, os.environ)
            stay_up(stack)
    except LocalError as error:
        print(f"ERROR: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0 if not options.command else 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
