"""podman for the image test: a base image made of Debian's packages, and containers that end with their test.

No registry is needed: the base is made by mmdebstrap, and ComfyUI is the stand-in as a local git repository. The
Dockerfile is the real one; only its build arguments differ.
"""

import contextlib
import os
import resource
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from local.__main__ import ENDPOINT, Platform
from local.serverless_api import worker_environment

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/comfy-endpoint-test-base"
LABEL = "comfy-endpoint-test=1"
CA_CERTIFICATES = Path("/usr/local/share/ca-certificates")
PIP_CONFIG = Path("/etc/pip.conf")
SLEEPS = '--entrypoint=["sleep", "600"]'
BUILD_TIMEOUT_S = 400
COMMAND_TIMEOUT_S = 60


class Engine:
    """podman with runc, whatever this machine's own configuration says."""

    def __init__(self, folder: Path) -> None:
        hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        config = folder / "containers.conf"
        config.write_text(
            "[containers]\n"
            # podman's own limits are higher than a root without CAP_SYS_RESOURCE may set.
            f'default_ulimits = ["nofile={hard_limit}:{hard_limit}", "nproc=16384:16384"]\n'
            "[engine]\n"
            'runtime = "runc"\n'
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "file"\n'
        )
        self._environ = {**os.environ, "CONTAINERS_CONF": str(config)}

    def __call__(
        self, *arguments: str | Path, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """`podman ARGUMENTS`; stdout and stderr are text."""
        return subprocess.run(
            ["podman", *map(str, arguments)],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def must(self, *arguments: str | Path, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """The stdout of a call that has to succeed."""
        finished = self(*arguments, timeout_s=timeout_s)
        assert finished.returncode == 0, f"podman {arguments[0]}: {finished.stdout[-3000:]}\n{finished.stderr[-6000:]}"
        return finished.stdout.strip()

    def make_base(self, folder: Path) -> None:
        """The base image, if it is not there yet: Debian, whose Python is 3.13 where the image's own is 3.12.

        `podman image rm localhost/comfy-endpoint-test-base` makes it anew, with this machine's newest settings.
        """
        if self("image", "exists", BASE).returncode == 0:
            return
        archive = folder / "base.tar"
        command: list[str | Path] = ["mmdebstrap", "--variant=minbase", "--include=ca-certificates,python3-venv"]
        # This machine's own certificates and configuration of pip, so that the build reaches what this machine reaches.
        if certificates := sorted(CA_CERTIFICATES.glob("*.crt")):
            command.append(f"--customize-hook=mkdir -p $1{CA_CERTIFICATES}")
            command.append(f"--customize-hook=copy-in {' '.join(map(str, certificates))} {CA_CERTIFICATES}")
            command.append("--customize-hook=chroot $1 update-ca-certificates")
        if PIP_CONFIG.exists():
            command.append(f"--customize-hook=copy-in {PIP_CONFIG} /etc")
        made = subprocess.run(
            [*command, "trixie", archive], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        assert made.returncode == 0, f"mmdebstrap: {made.stderr[-3000:]}"
        self.must("import", archive, BASE, timeout_s=BUILD_TIMEOUT_S)
        archive.unlink()

    def build(self, context: Path, tag: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
        """`--format docker`: the other format has no HEALTHCHECK."""
        arguments = ["build", "--format=docker", "--layers", f"--build-arg=BASE_IMAGE={BASE}", f"--tag={tag}"]
        return self(*arguments, f"--label={LABEL}", *options, context, timeout_s=BUILD_TIMEOUT_S)

    def prune(self) -> None:
        """The images of earlier runs that have lost their name, and nobody else's."""
        self("image", "prune", "--force", f"--filter=label={LABEL}")

    def gateway(self) -> str:
        """The host's address on the containers' network, which is there once a container has run."""
        return self.must("network", "inspect", "podman", "--format", "{{(index .Subnets 0).Gateway}}")

    @contextlib.contextmanager
    def container(self, image: str, *options: str | Path, **settings: str) -> "Iterator[Container]":
        """A running container with ``settings`` in its environment; gone afterwards."""
        environ = [f"--env={name}={value}" for name, value in settings.items()]
        name = f"comfy-endpoint-test-{secrets.token_hex(6)}"
        try:
            yield Container(self, self.must("run", "--detach", f"--name={name}", *environ, *options, image))
        finally:
            self("rm", "--force", "--ignore", "--time=0", name)


@dataclass(frozen=True)
class Container:
    engine: Engine
    id: str

    def sh(self, script: str) -> str:
        """The stdout of a bash script in the container, which has to succeed."""
        return self.engine.must("exec", self.id, "bash", "-euc", script)

    def inspect(self, form: str) -> str:
        return self.engine.must("inspect", self.id, "--format", form)

    @property
    def address(self) -> str:
        """Its IPv4 address on the bridge."""
        return self.inspect("{{.NetworkSettings.IPAddress}}")

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        running, code = self.inspect("{{.State.Running}} {{.State.ExitCode}}").split()
        return int(code) if running == "false" else None

    def log(self) -> str:
        finished = self.engine("logs", self.id)
        return finished.stdout + finished.stderr

    def published_port(self, port: int) -> int:
        return int(self.engine.must("port", self.id, f"{port}/tcp").rpartition(":")[2])

    def stop(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds. 137 if it has not ended within half a minute."""
        began = time.monotonic()
        self.engine.must("stop", "--time=30", self.id)
        seconds = time.monotonic() - began
        code = self.exit_code
        assert code is not None
        return code, seconds


@contextlib.contextmanager
def forwarding(address: str, port: int) -> Iterator[int]:
    """A port of ``address`` whose connections go to ``port`` of 127.0.0.1: containers cannot reach that themselves."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65_536):
                target.sendall(content)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                outer, _ = listener.accept()
                try:
                    inner = socket.create_connection(("127.0.0.1", port))
                except OSError:
                    outer.close()
                    continue
                for ends in ((outer, inner), (inner, outer)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server((address, 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Sources:
    """What the build takes: a copy of this repository as its context, and git repositories of ComfyUI and a node."""

    context: Path
    repositories: Path

    def commit(self, name: str, files: dict[str, str]) -> str:
        """A git repository of these files; returns `REPOSITORY@COMMIT` as custom_nodes.txt has it."""
        folder = self.repositories / name
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content)

        def git(*arguments: str) -> str:
            identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
            # Nobody's own settings; and the same commits every time, so that layers are found again.
            dates = {f"GIT_{who}_DATE": "2026-01-01T00:00:00Z" for who in ("AUTHOR", "COMMITTER")}
            environ = {**os.environ, **dates, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
            command = ["git", "-C", str(folder), *identity, *arguments]
            return subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout.strip()

        git("init", "-q", "-b", "main")
        git("add", "-A")
        git("commit", "-q", "-m", "As it is")
        return f"file:///repositories/{name}@{git('rev-parse', 'HEAD')}"

    def build_options(self) -> list[str]:
        return [
            f"--volume={self.repositories}:/repositories:ro",
            "--build-arg=COMFYUI_REPO=file:///repositories/ComfyUI",
            "--build-arg=COMFYUI_REF=main",
            "--build-arg=TORCH=torch-none",  # the stand-in needs none of its 7 GB
            "--build-arg=CUSTOM_NODE_PACKAGES=libglib2.0-0",
        ]


@dataclass(frozen=True)
class ReachablePlatform:
    """The RunPod stand-in, as containers see it."""

    platform: Platform
    url: str

    def settings(self, worker_id: str) -> dict[str, str]:
        environ = worker_environment(self.url, ENDPOINT, self.platform.api_key, worker_id)
        return {**environ, "REQUIRE_GPU": "0"}


def require_engine() -> None:
    """End the run where the image cannot be tested: nothing of it must look like success."""
    missing = [name for name in ("podman", "runc", "mmdebstrap", "ssh", "git") if shutil.which(name) is None]
    if missing:
        pytest.exit(f"The image cannot be tested without {', '.join(missing)}: run make image-deps.", returncode=1)
    if os.geteuid() != 0:
        pytest.exit("The image test needs root, for its containers' network: sudo make image-test.", returncode=1)
