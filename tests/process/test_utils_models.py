"""utils.py as start.sh runs it: a real process, a real huggingface_hub, a hub on 127.0.0.1."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import MEMBER_TOKEN, STRANGER_TOKEN, HubServer, running_hub
from huggingface_hub import constants, hf_hub_download

from worker.models import ModelError
from worker.models.grammar import ModelEntry
from worker.models.hub import RETRY_WAITS_S, metadata_of

UTILS = Path(__file__).parents[2] / "utils.py"
ALL_THERE, SOME_MISSING, BAD_CONFIGURATION = 0, 1, 2
RUN_LIMIT_S = 30


def safetensors(seed: int, size_bytes: int = 100_000) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([seed]) * size_bytes


@dataclass
class Bench:
    """A ComfyUI folder, a host cache and a hub, with utils.py to run against them."""

    folder: Path
    hub: HubServer

    @property
    def models(self) -> Path:
        return self.folder / "ComfyUI" / "models"

    @property
    def cache(self) -> Path:
        return self.folder / "host-cache" / "hub"

    def environment(self, models: str, token: str | None = None, **more: str) -> dict[str, str]:
        ours = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "MODELS": models,
            "COMFYUI_DIR": str(self.folder / "ComfyUI"),
            "HOST_CACHE_DIR": str(self.cache),
            "HF_ENDPOINT": self.hub.url,
            **({"HF_TOKEN": token} if token else {}),
        }
        return ours | more

    def utils(self, models: str, *arguments: str, token: str | None = None, **more: str) -> "Run":
        done = subprocess.run(
            [sys.executable, str(UTILS), *arguments],
            cwd="/",
            env=self.environment(models, token, **more),
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_S,
        )
        assert "Traceback" not in done.stderr
        for secret in filter(None, (token, MEMBER_TOKEN, STRANGER_TOKEN)):
            assert secret not in done.stdout + done.stderr
        return Run(done.returncode, done.stdout, done.stderr)

    def cache_on_host(self, repo_id: str, filename: str, revision: str | None = None) -> Path:
        """Have huggingface_hub itself fill the host cache; returns the blob. Forgets the requests that it made."""
        pointer = hf_hub_download(
            repo_id, filename, revision=revision, cache_dir=self.cache, endpoint=self.hub.url, token=MEMBER_TOKEN
        )
        self.hub.requests.clear()
        return Path(pointer).resolve()

    def files_below_models(self) -> list[str]:
        return sorted(str(path.relative_to(self.models)) for path in self.models.rglob("*") if not path.is_dir())


@dataclass
class Run:
    code: int
    stdout: str
    stderr: str

    @property
    def columns(self) -> list[list[str]]:
        """stdout: one line a model, its columns two spaces apart."""
        return [line.split("  ") for line in self.stdout.splitlines()]

    @property
    def complaints(self) -> list[str]:
        lines = self.stderr.splitlines()
        return [line.removeprefix("utils.py: ") for line in lines if line.startswith("utils.py: ")]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)  # no request by the test process itself
    (tmp_path / "ComfyUI").mkdir()
    with running_hub() as hub:
        yield Bench(tmp_path, hub)


def point_library_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before huggingface_hub is imported, for the library in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + template[template.index("/{repo_id}") :])


# -- linking


def test_a_cached_model_is_linked_without_a_request_or_the_library(bench: Bench) -> None:
    bench.hub.add("Org/Name", {"split/a.safetensors": safetensors(1)})
    blob = bench.cache_on_host("Org/Name", "split/a.safetensors")
    environment = bench.environment("Org/Name:split/a.safetensors:unet")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(UTILS), "--link-only"],
        cwd="/",
        env=environment,
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
    )
    assert done.returncode == ALL_THERE
    path = bench.models / "diffusion_models" / "a.safetensors"
    assert path.readlink() == blob
    assert bench.files_below_models() == ["diffusion_models/a.safetensors"]
    assert bench.hub.requests == []
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "worker.models.sources" in imported
    assert imported.isdisjoint({"huggingface_hub", "httpx2", "asyncio", "ssl", "worker.models.download"})


def test_each_revision_links_to_its_own_blob(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)}, revision="v1")
    bench.hub.add("org/name", {"a.safetensors": safetensors(2)})
    first = bench.cache_on_host("org/name", "a.safetensors", "v1")
    second = bench.cache_on_host("org/name", "a.safetensors")
    run = bench.utils("org/name@v1:a.safetensors:vae:one.safetensors, org/name:a.safetensors:vae:two.safetensors")
    assert run.code == ALL_THERE
    assert (bench.models / "vae/one.safetensors").readlink() == first
    assert (bench.models / "vae/two.safetensors").readlink() == second
    assert first != second
    assert bench.hub.requests == []


def test_link_only_leaves_the_rest_and_says_so(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)})
    bench.cache_on_host("org/name", "a.safetensors")
    run = bench.utils("org/name:b.safetensors:vae,org/name:a.safetensors:vae", "--link-only")
    assert run.code == ALL_THERE
    assert [line[:2] for line in run.columns] == [
        ["org/name:b.safetensors", "to download"],
        ["org/name:a.safetensors", "host cache"],
    ]
    assert bench.files_below_models() == ["vae/a.safetensors"]
    assert bench.hub.requests == []


def test_check_says_it_and_does_nothing(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)})
    bench.cache_on_host("org/name", "a.safetensors")
    models = "org/name:a.safetensors:vae"
    run = bench.utils(models, "--check")
    assert (run.code, run.columns[0][1]) == (ALL_THERE, "host cache")
    run = bench.utils(models + ",org/name:b.safetensors:vae", "--check")
    assert (run.code, run.columns[1][1]) == (SOME_MISSING, "to download")
    assert not bench.models.exists()
    assert bench.hub.requests == []


# -- downloading


def test_a_model_is_downloaded_once(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"split/a.safetensors": content})
    run = bench.utils("org/name:split/a.safetensors:vae:b.safetensors")
    path = bench.models / "vae" / "b.safetensors"
    assert run.code == ALL_THERE, run.stderr
    assert run.columns[0][:4] == ["org/name:split/a.safetensors", "download", str(path), "0.1 MB"]
    assert path.read_bytes() == content
    assert not path.is_symlink()
    assert bench.files_below_models() == ["vae/b.safetensors"]
    bench.hub.requests.clear()
    again = bench.utils("org/name:split/a.safetensors:vae:b.safetensors")
    assert (again.code, again.columns[0][1]) == (ALL_THERE, "in place")
    assert bench.hub.requests == []


def test_a_broken_file_and_a_dangling_link_are_replaced(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)})
    (bench.models / "vae").mkdir(parents=True)
    (bench.models / "vae/a.safetensors").write_bytes(safetensors(1)[:-1])
    (bench.models / "vae/b.safetensors").symlink_to("/gone")
    run = bench.utils("org/name:a.safetensors:vae,org/name:b.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == safetensors(1)
    assert (bench.models / "vae/b.safetensors").read_bytes() == safetensors(2)


def test_the_token_opens_gated_and_private_repositories_and_stays_with_the_hub(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.safetensors": safetensors(1)}, gated=True)
    bench.hub.add("org/private", {"b.safetensors": safetensors(2)}, private=True)
    models = "org/gated:a.safetensors:vae,org/private:b.safetensors:vae"
    run = bench.utils(models, token=f" {MEMBER_TOKEN}\n")
    assert run.code == ALL_THERE, run.stderr
    assert bench.files_below_models() == ["vae/a.safetensors", "vae/b.safetensors"]
    to_hub = {request.authorization for request in bench.hub.requests if not request.by_storage}
    to_storage = {request.authorization for request in bench.hub.requests if request.by_storage}
    assert (to_hub, to_storage) == ({f"Bearer {MEMBER_TOKEN}"}, {None})


def test_a_cut_connection_is_resumed(bench: Bench) -> None:
    content = safetensors(1, 300_000)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.hub.blob(content).cut_after_bytes = 200_000
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == content
    ranges = [request.range for request in bench.hub.requests if request.by_storage]
    assert ranges[0] is None
    assert len(ranges) == 2


def test_a_hub_that_is_unwell_for_a_moment_is_asked_again(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)})
    bench.hub.refusals = [503]
    assert bench.utils("org/name:a.safetensors:vae").code == ALL_THERE
    assert bench.hub.refusals == []


# -- what cannot be had


def test_each_refusal_is_one_sentence_and_the_good_ones_go_on(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"gated"}, gated=True)
    bench.hub.add("org/private", {"b.pth": b"private"}, private=True)
    bench.hub.add("org/open", {"c.pth": b"open"})
    run = bench.utils(
        "org/gated:a.pth:vae,org/private:b.pth:vae,org/none:a.pth:vae:n.pth,"
        "org/open:no.pth:vae,org/open@v9:c.pth:vae:v9.pth,org/open:c.pth:vae"
    )
    assert run.code == SOME_MISSING
    assert run.complaints == [
        f"org/gated:a.pth: the repository is gated: accept its terms at {bench.hub.url}/org/gated and set HF_TOKEN",
        "org/private:b.pth: there is no repository at "
        f"{bench.hub.url}/org/private, or it is private: check the RepoID, or set HF_TOKEN",
        "org/none:a.pth: there is no repository at "
        f"{bench.hub.url}/org/none, or it is private: check the RepoID, or set HF_TOKEN",
        f"org/open:no.pth: the repository has no such file: look at {bench.hub.url}/org/open/tree/main",
        f"org/open@v9:c.pth: the repository has no revision v9: look at {bench.hub.url}/org/open/tree/main",
    ]
    assert [line[1] for line in run.columns] == ["missing"] * 5 + ["download"]
    assert bench.files_below_models() == ["vae/c.pth"]


def test_a_token_without_rights_is_told_what_it_lacks(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"gated"}, gated=True)
    bench.hub.add("org/private", {"b.pth": b"private"}, private=True)
    run = bench.utils("org/gated:a.pth:vae,org/private:b.pth:vae", token=STRANGER_TOKEN)
    assert run.code == SOME_MISSING
    assert run.complaints[0].endswith("/org/gated with the account of HF_TOKEN")
    assert run.complaints[1].endswith("or let HF_TOKEN's account read it")


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_that_has_expired_long_ago", "does not accept HF_TOKEN (401)"),
        ("hf_two\nlines", "characters that no token has"),
    ],
    ids=["expired", "two lines"],
)
def test_a_bad_token(bench: Bench, token: str, sentence: str) -> None:
    bench.hub.add("org/open", {"a.pth": b"open"})
    run = bench.utils("org/open:a.pth:vae", token=token)
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert sentence in run.complaints[0]
    assert bench.files_below_models() == []


def test_no_space_is_noticed_before_the_first_byte(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.hub.blob(content).claimed_size_bytes = 10**18
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == SOME_MISSING
    assert "no space: it has 1,000,000,000,000.0 MB" in run.complaints[0]
    assert [request.method for request in bench.hub.requests] == ["HEAD"]


@pytest.mark.parametrize("fault", ["shorter than the hub said", "shorter than its header says"])
def test_a_file_that_is_not_whole_never_gets_its_name(bench: Bench, fault: str) -> None:
    content = safetensors(1)[:-1]
    bench.hub.add("org/name", {"a.safetensors": content})
    if fault == "shorter than the hub said":
        bench.hub.blob(content).claimed_size_bytes += 1
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert ("download failed" if "hub" in fault else "its header says") in run.complaints[0]
    assert bench.files_below_models() == []


def test_a_failed_replacement_leaves_the_old_file(bench: Bench) -> None:
    (bench.models / "vae").mkdir(parents=True)
    (bench.models / "vae/a.safetensors").write_bytes(b"broken")
    assert bench.utils("org/none:a.safetensors:vae").code == SOME_MISSING
    assert (bench.models / "vae/a.safetensors").read_bytes() == b"broken"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_download_that_is_stopped_leaves_nothing(bench: Bench, signum: signal.Signals) -> None:
    content = safetensors(1, 4_000_000)
    bench.hub.add("org/name", {"a.safetensors": content})
    stalled = bench.hub.blob(content).stalled = threading.Event()
    process = subprocess.Popen(
        [sys.executable, str(UTILS)],
        env=bench.environment("org/name:a.safetensors:vae"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert stalled.wait(RUN_LIMIT_S)
        assert any(name.endswith(".incomplete") for name in bench.files_below_models())
        process.send_signal(signum)
        output, _ = process.communicate(timeout=RUN_LIMIT_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signum
    assert "Traceback" not in output
    assert bench.files_below_models() == []


@pytest.mark.parametrize(
    ("status", "attempts", "sentence"),
    [
        (400, 1, "answered with 400"),
        (403, 1, "access is refused (403)"),
        (429, 3, "limits the rate of requests (429)"),
        (503, 3, "answered with 503: try again later"),
    ],
)
def test_only_what_may_pass_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, status: int, attempts: int, sentence: str
) -> None:
    point_library_at(bench.hub.url, monkeypatch)
    bench.hub.refusals = [status] * 10
    waits_s: list[float] = []
    entry = ModelEntry("org/name", None, "a.pth", bench.models / "vae/a.pth")
    with pytest.raises(ModelError, match=re.escape(sentence)):
        metadata_of(entry, None, waits_s.append)
    assert len(bench.hub.requests) == attempts
    assert tuple(waits_s) == RETRY_WAITS_S[: attempts - 1]
    assert not bench.models.exists()


def test_no_network_is_one_sentence_without_the_token(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as closed:
        address = closed.url.removeprefix("http://")
    point_library_at(f"http://mirror:{MEMBER_TOKEN}@{address}", monkeypatch)
    entry = ModelEntry("org/name", None, "a.pth", bench.models / "vae/a.pth")
    waits_s: list[float] = []
    with pytest.raises(ModelError) as caught:
        metadata_of(entry, MEMBER_TOKEN, waits_s.append)
    assert tuple(waits_s) == RETRY_WAITS_S
    assert f"no connection to http://mirror:***@{address} (ConnectError: [Errno 111]" in str(caught.value)
    assert MEMBER_TOKEN not in str(caught.value)


def test_offline_is_named(bench: Bench) -> None:
    run = bench.utils("org/name:a.safetensors:vae", HF_HUB_OFFLINE="1")
    assert run.code == SOME_MISSING
    assert "HF_HUB_OFFLINE forbids it" in run.complaints[0]
    assert bench.hub.requests == []


# -- configuration


def test_a_bad_entry_is_reported_and_the_good_one_done(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    run = bench.utils("org/name:a.pth,\n org/name:a.pth:vae")
    assert run.code == BAD_CONFIGURATION
    assert run.complaints[0].startswith("MODELS entry 1 ('org/name:a.pth')")
    assert bench.files_below_models() == ["vae/a.pth"]


def test_a_checkout_that_is_not_there(bench: Bench) -> None:
    run = bench.utils("org/name:a.pth:vae", COMFYUI_DIR="/nowhere")
    assert run.code == BAD_CONFIGURATION
    assert run.complaints == ["COMFYUI_DIR=/nowhere is not a folder: set it to the ComfyUI checkout"]


@pytest.mark.parametrize("arguments", [[], ["--link-only"], ["--check"]])
def test_no_models_is_no_work(bench: Bench, arguments: list[str]) -> None:
    run = bench.utils("", *arguments)
    assert (run.code, run.stdout, run.stderr) == (ALL_THERE, "", "")


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_in_the_way_of_a_folder_is_one_sentence(bench: Bench, cached: bool) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    if cached:
        bench.cache_on_host("org/name", "a.pth")
    bench.models.mkdir()
    (bench.models / "vae").write_text("a file")
    run = bench.utils("org/name:a.pth:vae")
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert str(bench.models / "vae") in run.complaints[0]
