"""The image as it is built and run: what is in it, how it starts and stops, and what can be reached from outside.

Containers have no GPU here, and ComfyUI is the stand-in; everything else is the image's own.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from local.__main__ import free_port
from tests.image.engine import ROOT, SLEEPS, Container, Engine, ReachablePlatform, Sources, forwarding
from tests.process.hub_server import MEMBER_TOKEN, HubServer, running_hub
from tests.process.stack import Api, invert_job, is_inverted, picture_bytes, slow_job, wait_until

Figure = Callable[[str], None]
GLASS_BOX = (ROOT / "docs" / "glass-box.md").read_text()
WORKER_BEGINS = "--- Starting Serverless Worker"
PYTHON = "/opt/worker/.venv/bin/python"


@contextlib.contextmanager
def serverless(
    engine: Engine, image: str, platform: ReachablePlatform, name: str = "worker-1", *options: str, **settings: str
) -> Iterator[Container]:
    """A worker that asks the platform for jobs."""
    with engine.container(image, *options, **platform.settings(name), **settings) as container:
        wait_until(lambda: WORKER_BEGINS in container.log(), "the worker asks for jobs")
        yield container


def comfyui_pid(container: Container) -> int:
    return int(container.sh("cat /dev/shm/comfyui/run/comfyui").split()[0])


def comfyui_runs_a_prompt(container: Container) -> bool:
    script = "exec 3<>/dev/tcp/127.0.0.1/8188; printf 'GET /queue HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    answer = container.sh(script)
    return bool(json.loads(answer[answer.index("{") :])["queue_running"])


# --- what is in it ---


def test_nothing_is_in_it_that_the_build_left_behind(image: str, engine: Engine) -> None:
    looked_for = ["-name .git", "-name 'ssh_host_*'", "-name '*.deb'", "-name decoy.pyc", "-path '*/.cache/*'"]
    looked_for += ["-path '/var/lib/apt/lists/*'", "-path '/tmp/*'", "-name torch-none.txt", "-name .env"]
    script = f"find / -xdev \\( {' -o '.join(looked_for)} \\) -print; touch /tmp/x; find / -xdev -path '/tmp/*'"
    found = engine.must("run", "--rm", "--entrypoint=bash", image, "-c", script).split()
    assert found == ["/tmp/x"]


def test_all_python_has_bytecode_that_fits_it(image: str, engine: Engine) -> None:
    program = """if True:
        import importlib.util, pathlib, struct
        stale, fresh = [], 0
        for root in ("/ComfyUI", "/opt/worker"):
            for source in pathlib.Path(root).rglob("*.py"):
                cached = pathlib.Path(importlib.util.cache_from_source(str(source)))
                header = cached.read_bytes()[:16] if cached.exists() else bytes(16)
                stat = source.stat()
                if struct.unpack("<4xIII", header) == (0, int(stat.st_mtime), stat.st_size):
                    fresh += 1
                else:
                    stale.append(str(source))
        print(fresh, *stale)
    """
    fresh, *stale = engine.must("run", "--rm", f"--entrypoint={PYTHON}", image, "-c", program).split()
    assert int(fresh) > 1000
    assert stale == []


def test_its_configuration(image: str, engine: Engine, figure: Figure) -> None:
    (inspected,) = json.loads(engine.must("image", "inspect", image))
    config = inspected["Config"]
    assert config["Entrypoint"] == ["tini", "--", "/opt/worker/start.sh"]
    assert list(config["ExposedPorts"]) == ["22/tcp"]
    assert config["Labels"]["org.opencontainers.image.title"] == "comfy-endpoint"
    healthcheck = inspected.get("HealthCheck") or inspected["Healthcheck"]  # podman 4, podman 5
    assert healthcheck["StartPeriod"] == 1800 * 10**9
    base_bytes = int(engine.must("image", "inspect", "--format={{.Size}}", "localhost/comfy-endpoint-test-base"))
    figure(f"layers above the base image: {(inspected['Size'] - base_bytes) / 1e6:.0f} MB (without torch and ComfyUI)")
    for layer in json.loads(engine.must("history", "--format=json", image)):
        if layer["size"] > 10_000:
            command = re.sub(r"^\|\d+ .*?(?=/bin/sh)|/bin/sh -c (#\(nop\))?|--mount=\S+", " ", layer["CreatedBy"])
            figure(f"  {layer['size'] / 1e6:7.2f} MB  {' '.join(command.split())[:90]}")


def test_the_packages_of_a_custom_node_are_in_it(image: str, engine: Engine) -> None:
    shown = engine.must("run", "--rm", "--entrypoint=bash", image, "-c", "ls /ComfyUI/custom_nodes/TestNodes")
    assert "__init__.py" in shown
    python = "/ComfyUI/.venv/bin/python"
    assert engine.must("run", "--rm", f"--entrypoint={python}", image, "-c", "import colorama; print('is there')")


def test_a_custom_node_that_cannot_be_imported_fails_the_build(sources: Sources, engine: Engine, image: str) -> None:
    listed = sources.context / "custom_nodes.txt"
    good = listed.read_text()
    broken = sources.commit("Broken", {"__init__.py": "import a_package_that_nobody_has\n"})
    try:
        listed.write_text(f"{good}{broken}\n")
        built = engine.build(sources.context, "localhost/comfy-endpoint-test-broken", *sources.build_options())
    finally:
        listed.write_text(good)
    said = built.stdout + built.stderr
    assert built.returncode != 0
    assert "No module named 'a_package_that_nobody_has'" in said
    assert "ERROR: ComfyUI cannot import Broken (above)." in said


def test_models_are_baked_in_and_the_token_is_nowhere(
    sources: Sources, engine: Engine, image: str, tmp_path: Path
) -> None:
    tag = "localhost/comfy-endpoint-test-baked"
    content = os.urandom(100_000)
    with running_hub() as hub:
        hub.add("org/gated", {"vae/small.pt": content}, gated=True)
        models = "--build-arg=MODELS=org/gated:vae/small.pt:vae"
        options = [*sources.build_options(), "--network=host", models, f"--build-arg=HF_ENDPOINT={hub.url}"]
        refused = engine.build(sources.context, tag, *options)
        (tmp_path / "token").write_text(MEMBER_TOKEN)
        built = engine.build(sources.context, tag, *options, f"--secret=id=HF_TOKEN,src={tmp_path / 'token'}")
    assert refused.returncode != 0  # an image without its models is none
    assert "org/gated" in refused.stdout.split("HF_TOKEN; fi")[-1] + refused.stderr
    assert built.returncode == 0, built.stderr[-3000:]
    copied = tmp_path / "small.pt"
    with engine.container(tag, SLEEPS) as container:
        engine.must("cp", f"{container.id}:/ComfyUI/models/vae/small.pt", copied)
    assert copied.read_bytes() == content
    archive = tmp_path / "image.tar"
    engine.must("save", "--output", archive, tag, timeout_s=200)
    assert occurrences(archive, b"comfy-endpoint") > 0  # the control: layers are not compressed
    assert occurrences(archive, MEMBER_TOKEN.encode()) == 0
    history = engine.must("history", "--no-trunc", tag) + engine.must("image", "inspect", tag)
    assert "org/gated" in history
    assert MEMBER_TOKEN not in history


def occurrences(path: Path, needle: bytes) -> int:
    found = subprocess.run(["grep", "-a", "-c", "-F", needle, path], capture_output=True, check=False)
    return int(found.stdout)


# --- as a pod ---


@dataclass(frozen=True)
class Pod:
    """A container with SSH, whose key is in ``folder``."""

    container: Container
    folder: Path
    ssh_port: int

    def ssh_config(self, **more: str) -> Path:
        path = self.folder / f"config-{len(list(self.folder.iterdir()))}"
        settings = {"IdentityFile": f"{self.folder}/key", "IdentitiesOnly": "yes", "BatchMode": "yes", **more}
        settings |= {"StrictHostKeyChecking": "no", "UserKnownHostsFile": f"{self.folder}/known"}
        path.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        return path

    def ssh(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = ["ssh", "-F", str(self.ssh_config(**more)), "-p", str(self.ssh_port), "root@127.0.0.1", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def new_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_suffix(".pub").read_text().strip()


@pytest.fixture(scope="module")
def pod(engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    folder = tmp_path_factory.mktemp("ssh")
    keys = f"# mine\r\n{new_key(folder / 'other')}\r\n{new_key(folder / 'key')} laptop\r\nssh-ed25519 broken\r\n"
    new_key(folder / "stranger")
    options = ["--shm-size=2g", "--publish=127.0.0.1::22"]
    with engine.container(
        image, *options, PUBLIC_KEY=keys, HF_ENDPOINT="http://127.0.0.1:1", MODELS="org/name:vae/absent.pt:vae"
    ) as container:
        wait_until(lambda: "ComfyUI listens on 127.0.0.1:8188" in container.log(), "ComfyUI listens")
        yield Pod(container, folder, container.published_port(22))


def test_a_pod_runs_comfyui_and_ssh_and_no_handler(pod: Pod) -> None:
    commands = pod.container.sh("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
    assert "main.py" in commands
    assert "sshd" in commands
    assert "rp_handler.py" not in commands
    assert "There is no GPU; ComfyUI computes on the processor." in pod.container.log()


def test_the_ram_disk_is_measured_private_and_linked_to_from_comfyui(pod: Pod) -> None:
    free = re.search(r"RAM disk /dev/shm/comfyui: (\d+) MB free", pod.container.log())
    assert free is not None
    assert 2000 <= int(free[1]) <= 2048
    assert "RAMDISK_MIN_MB" not in pod.container.log()
    for name in ("input", "output", "temp"):
        assert pod.container.sh(f"readlink /ComfyUI/{name}") == f"/dev/shm/comfyui/{name}"
        assert pod.container.sh(f"stat -L -c '%a %U' /ComfyUI/{name}") == "700 root"


def test_comfyui_is_not_reachable_from_outside(pod: Pod) -> None:
    assert pod.container.sh("exec 3<>/dev/tcp/127.0.0.1/8188 && echo inside") == "inside"
    pod.container.sh(f"setsid {PYTHON} -m http.server --bind 0.0.0.0 8189 >/dev/null 2>&1 &")
    control = f"http://{pod.container.address}:8189/"
    wait_until(lambda: answers(control), "the control answers from outside")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((pod.container.address, 8188), timeout=10)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def test_ssh_takes_the_right_key_only(pod: Pod) -> None:
    assert pod.ssh("echo", "in").stdout == "in\n"
    assert pod.ssh("echo", "in", IdentityFile=f"{pod.folder}/other").stdout == "in\n"
    wrong_key = pod.ssh("echo", "in", IdentityFile=f"{pod.folder}/stranger")
    password = pod.ssh("echo", "in", PubkeyAuthentication="no", PreferredAuthentications="password")
    for refused in (wrong_key, password):
        assert refused.returncode == 255
        assert "Permission denied (publickey)" in refused.stderr
    assert "Line 4 of PUBLIC_KEY is no public key" in pod.container.log()


def test_the_host_key_is_the_one_in_the_log(pod: Pod) -> None:
    scanned = subprocess.run(
        ["ssh-keyscan", "-p", str(pod.ssh_port), "127.0.0.1"], capture_output=True, text=True, check=True
    ).stdout
    shown = subprocess.run(["ssh-keygen", "-l", "-f", "-"], input=scanned, capture_output=True, text=True, check=True)
    fingerprints = set(re.findall(r"SHA256:\S+", shown.stdout))
    assert fingerprints == set(re.findall(r"for 2 keys, host key (SHA256:\S+)\.", pod.container.log()))
    assert len(fingerprints) == 1


def test_the_walk_through_of_the_glass_box(pod: Pod, tmp_path: Path, figure: Figure) -> None:
    """The commands of docs/glass-box.md; only the local port differs, and which key and Python are used."""
    tunnel, client, looking = commands_of_the_walk_through()
    port = free_port()
    assert tunnel.count("-L 8188:") == 1 == client.count("http://127.0.0.1:8188")
    tunnel, client = tunnel.replace("-L 8188:", f"-L {port}:"), client.replace(":8188", f":{port}")
    environ = {**os.environ, "RUNPOD_TCP_PORT_22": str(pod.ssh_port), "IP": "127.0.0.1"}
    functions = f'ssh() {{ command ssh -F {pod.ssh_config()} "$@"; }}\npython() {{ {sys.executable} "$@"; }}'
    session = subprocess.Popen(
        ["bash", "-c", f"{functions}\n{tunnel}"],
        start_new_session=True,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/system_stats"), "the tunnel carries HTTP")
        began = time.monotonic()
        saved = subprocess.run(
            ["bash", "-c", f"{functions}\n{client} --out {tmp_path}"],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        figure(f"client.py through the SSH tunnel: {time.monotonic() - began:.2f} s")
        assert saved.returncode == 0, saved.stderr
        (picture,) = saved.stdout.split()
        assert Image.open(picture).size == (640, 480)
        seen, _ = session.communicate(f"{looking}\n", timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(session.pid, signal.SIGKILL)
        session.wait()
    assert "coffee" in seen  # input, as the client uploaded it
    assert re.search(r"org/name:vae/absent\.pt", seen)
    assert "got prompt" in seen
    assert "/dev/shm" in seen
    elsewhere = pod.ssh("-W", "127.0.0.1:22")
    assert "administratively prohibited" in elsewhere.stderr


def commands_of_the_walk_through() -> list[str]:
    """The ssh command, the client's, and what is typed in the session."""
    blocks = re.findall(r"```sh\n(.*?)```", GLASS_BOX, re.DOTALL)
    assert [block.split()[0] for block in blocks] == ["docker", "ssh", "python", "ls"]
    return [block.strip() for block in blocks[1:]]


def test_the_health_check_says_whether_comfyui_answers(pod: Pod, engine: Engine, image: str) -> None:
    assert engine("healthcheck", "run", pod.container.id).returncode == 0
    with engine.container(image, SLEEPS) as container:
        assert engine("healthcheck", "run", container.id).returncode == 1


def test_an_idle_pod_without_a_key_has_no_ssh_warns_of_64_mb_and_stops_at_once(
    engine: Engine, image: str, figure: Figure
) -> None:
    with engine.container(image) as container:
        wait_until(lambda: "ComfyUI listens" in container.log(), "ComfyUI listens")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((container.address, 22), timeout=10)
        assert "sshd" not in container.sh("cat /proc/[0-9]*/comm || true")
        log = container.log()
        code, seconds = container.stop()
    assert "The RAM disk has less than RAMDISK_MIN_MB=256 MB; give the container more (docker: --shm-size=1g)." in log
    assert code == 0
    figure(f"stop of an idle pod: {seconds:.2f} s, exit code {code}")


def test_a_read_only_root_file_system_is_enough(engine: Engine, image: str, tmp_path: Path) -> None:
    """/run, /tmp and /dev/shm are writable then, as with `docker run --read-only --tmpfs /run --tmpfs /tmp`."""
    key = new_key(tmp_path / "key")
    with engine.container(image, "--read-only", "--publish=127.0.0.1::22", PUBLIC_KEY=key) as container:
        wait_until(lambda: "ComfyUI listens" in container.log(), "ComfyUI listens")
        assert Pod(container, tmp_path, container.published_port(22)).ssh("echo", "in").stdout == "in\n"
        assert engine("exec", container.id, "touch", "/ComfyUI/x").returncode != 0


def test_a_model_that_a_read_only_root_cannot_take_is_said_in_a_sentence(engine: Engine, image: str) -> None:
    with reachable_hub(engine) as hub:
        hub.add("org/name", {"vae/a.pt": b"weights"})
        settings = {"MODELS": "org/name:vae/a.pt:vae", "HF_ENDPOINT": hub.url}
        with engine.container(image, "--read-only", **settings) as container:
            wait_until(lambda: "SOME MODELS ARE MISSING" in container.log(), "the model is missing")
            assert "Read-only file system" in container.log()
            assert "Traceback" not in container.log()
            wait_until(lambda: "ComfyUI listens" in container.log(), "ComfyUI listens all the same")


@contextlib.contextmanager
def reachable_hub(engine: Engine) -> Iterator[HubServer]:
    """A Hugging Face hub that containers reach."""
    gateway = engine.gateway()
    with running_hub() as hub, contextlib.ExitStack() as stack:
        ports = [int(url.rpartition(":")[2]) for url in (hub.url, hub.storage_url)]
        hub_port, storage_port = (stack.enter_context(forwarding(gateway, port)) for port in ports)
        hub.url, hub.storage_url = f"http://{gateway}:{hub_port}", f"http://{gateway}:{storage_port}"
        yield hub


# --- as a serverless worker ---


def test_a_worker_without_a_gpu_says_so_and_ends(engine: Engine, image: str, platform: ReachablePlatform) -> None:
    with engine.container(image, **{**platform.settings("no-gpu"), "REQUIRE_GPU": "1"}) as container:
        wait_until(lambda: container.exit_code is not None, "the container ends")
        assert container.exit_code == 1
        assert "no GPU: choose one for the endpoint, or set REQUIRE_GPU=0" in container.log()


def test_jobs_run_a_killed_comfyui_is_started_again_and_an_idle_worker_stops_at_once(
    engine: Engine, image: str, platform: ReachablePlatform, figure: Figure
) -> None:
    api, content = Api(platform.platform), picture_bytes()
    began = time.monotonic()
    with serverless(engine, image, platform) as container:
        figure(f"podman run to the first job-take: {time.monotonic() - began:.1f} s")
        first = api.run(invert_job(content))
        assert first["status"] == "COMPLETED", first
        assert is_inverted(first["output"]["images"][0], content)
        assert container.sh("find /dev/shm/comfyui/{input,output,temp} -type f") == ""

        killed = api.start_job(slow_job(60))
        wait_until(lambda: comfyui_runs_a_prompt(container), "the job runs")
        container.sh(f"kill -KILL {comfyui_pid(container)}")
        crashed = api.finish(killed)
        assert crashed["output"]["error_code"] == "COMFYUI_CRASHED"
        assert api.run(invert_job(content))["status"] == "COMPLETED"

        code, seconds = container.stop()
    assert code == 0
    figure(f"stop of an idle worker: {seconds:.2f} s, exit code {code}")


def test_a_worker_that_is_stopped_finishes_its_job_first(
    engine: Engine, image: str, platform: ReachablePlatform, figure: Figure
) -> None:
    api = Api(platform.platform)
    with serverless(engine, image, platform) as container:
        job_id = api.start_job(slow_job(3))
        wait_until(lambda: comfyui_runs_a_prompt(container), "the job runs")
        code, seconds = container.stop()
        assert api.status(job_id)["status"] == "COMPLETED"
        log = container.log()
        assert log.index("start.sh Stopping.") < log.index(" wipe: ")  # the job was not over yet
    assert code == 0
    figure(f"stop with 3 s of a job to go: {seconds:.2f} s, exit code {code}")


def test_two_containers_on_one_volume_download_a_model_once(engine: Engine, image: str, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "volume").mkdir()
    with reachable_hub(engine) as hub, contextlib.ExitStack() as stack:
        hub.add("org/name", {"vae/model.pt": content})
        settings = {"MODELS": "org/name:vae/model.pt:vae", "DOWNLOAD_TO": "volume", "HF_ENDPOINT": hub.url}
        options = [f"--volume={tmp_path / 'volume'}:/runpod-volume", "--env=MODE=pod"]
        containers = [stack.enter_context(engine.container(image, *options, **settings)) for _ in range(2)]
        for container in containers:
            settled = "test -e /dev/shm/comfyui/run/models-settled && echo settled || true"
            wait_until(lambda: container.sh(settled), "the models are settled")  # noqa: B023 - called at once
            copied = tmp_path / "copied"
            engine.must("cp", f"{container.id}:/runpod-volume/models/vae/model.pt", copied)
            assert copied.read_bytes() == content
            link = container.sh("readlink /ComfyUI/models/vae/model.pt")
            assert link == "/runpod-volume/models/vae/model.pt"
        assert len(hub.fetched()) == 1
