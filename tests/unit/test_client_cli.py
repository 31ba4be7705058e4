"""client.py as a process: what it sends, what it prints where, and its exit codes."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from client_server import QUEUED, Server, answer
from PIL import Image

import client

ROOT = Path(__file__).parents[2]
PICTURE = base64.b64encode(b"picture").decode()
SAVED = {"images": [{"filename": "a.png", "type": "base64", "data": PICTURE}]}
WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "old.png"}, "_meta": {"title": "In"}},
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "positive": ["6", 0], "negative": ["7", 0]}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "old"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad"}},
}


def completed(output: object) -> list[Any]:
    return [QUEUED, answer(200, {"id": "j1", "status": "COMPLETED", "output": output, "delayTime": 12})]


class Folder:
    """A folder with a workflow and a picture, and client.py as a process in it."""

    def __init__(self, path: Path, server: Server) -> None:
        self.path = path
        self.server = server
        (path / "workflow.json").write_text(json.dumps(WORKFLOW))
        Image.new("RGB", (8, 8), "red").save(path / "in.png")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "client.py"), *arguments],
            cwd=self.path,
            env={"PATH": os.environ["PATH"], "RUNPOD_API_KEY": "secret", "RUNPOD_ENDPOINT_ID": "ep", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=30)
        assert "Traceback" not in err
        assert "secret" not in out + err
        return process.returncode, out, err

    def job(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        common = ("--workflow", "workflow.json", "--img", "in.png", "--url", self.server.url)
        return self.run(*common, *arguments, **environment)

    def sent(self) -> Any:
        return json.loads(self.server.requests[0][3])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    server = Server()
    server.script = completed(SAVED)
    yield Folder(tmp_path, server)
    server.close()


# --- the good way ----------------------------------------------------------------------------------------------------


def test_a_job_is_sent_as_agreed_and_its_picture_saved(folder: Folder) -> None:
    code, out, err = folder.job("--prompt", "new", "--seed", "7", "--debug", "--timeout", "90")
    assert (code, out) == (client.ExitCode.SAVED, "output/a.png\n")
    assert (folder.path / "output/a.png").read_bytes() == b"picture"
    body = folder.sent()
    assert body["policy"] == {"executionTimeout": 90_000}
    assert body["input"]["debug"] is True
    assert base64.b64decode(body["input"]["images"]["in.png"]) == (folder.path / "in.png").read_bytes()
    inputs = {key: node["inputs"] for key, node in body["input"]["workflow"].items()}
    assert inputs == {
        "1": {"image": "in.png"},
        "3": {"seed": 7, "positive": ["6", 0], "negative": ["7", 0]},
        "6": {"text": "new"},
        "7": {"text": "bad"},
    }
    told = ['1 "In" (LoadImage).image = "in.png"', '6 (CLIPTextEncode).text = "new"', "3 (KSampler).seed = 7"]
    assert [line for line in told if line not in err.splitlines()] == []
    assert "delayTime: 12" in err


def test_the_wanted_format_is_sent(folder: Folder) -> None:
    folder.server.script = completed(SAVED)
    assert folder.job("--format", "webp", "--quality", "80")[0] == 0
    sent = folder.sent()["input"]
    assert (sent["output_format"], sent["output_quality"]) == ("webp", 80)
    assert set(sent) == {"workflow", "images", "output_format", "output_quality"}


@pytest.mark.parametrize("wish", [("--quality", "80"), ("--quality", "80", "--format", "png"), ("--quality", "101")])
def test_a_quality_that_means_nothing_is_refused(folder: Folder, wish: tuple[str, ...]) -> None:
    code, _, err = folder.job(*wish)
    assert (code, folder.server.requests) == (2, [])
    assert "quality" in err


def test_debug_tells_times_and_where_to_look(folder: Folder) -> None:
    debug = {"prompt_id": "p-1", "files": ["/dev/shm/comfyui/output/a.png"]}
    folder.server.script = completed({**SAVED, "timings_ms": {"run": 7.5}, "debug": debug})
    told = {"timings_ms.run: 7.5", "debug.prompt_id: p-1", 'debug.files: ["/dev/shm/comfyui/output/a.png"]'}
    assert told <= set(folder.job("--debug")[2].splitlines())
    folder.server.script = completed({**SAVED, "timings_ms": {"run": 7.5}, "debug": debug})
    assert not told & set(folder.job()[2].splitlines())


def test_seeds_are_random_and_printed_unless_kept(folder: Folder) -> None:
    seeds = set()
    for _ in range(2):
        folder.server.requests.clear()
        folder.server.script = completed(SAVED)
        _, _, err = folder.job()
        seed = folder.sent()["input"]["workflow"]["3"]["inputs"]["seed"]
        assert 0 <= seed < 2**32
        assert f"3 (KSampler).seed = {seed}\n" in err
        seeds.add(seed)
    assert len(seeds) == 2
    folder.server.requests.clear()
    folder.server.script = completed(SAVED)
    folder.job("--keep-seeds")
    assert folder.sent()["input"]["workflow"] == client.apply_changes(WORKFLOW, [client.Change("1", "image", "in.png")])
    assert sorted(path.name for path in (folder.path / "output").iterdir()) == ["a.png", "a_1.png", "a_2.png"]


def test_two_pictures_of_one_name_are_both_sent(folder: Folder) -> None:
    (folder.path / "other").mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder.path / "other/in.png")
    loaders = {key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("10", "9")}
    (folder.path / "two.json").write_text(json.dumps(loaders))
    arguments = ("--workflow", "two.json", "--img", "in.png", "other/in.png", "--url", folder.server.url)
    assert folder.run(*arguments)[0] == client.ExitCode.SAVED
    sent = folder.sent()["input"]
    assert sent["workflow"]["9"]["inputs"]["image"] == "in.png"
    assert sent["workflow"]["10"]["inputs"]["image"] == "in_1.png"
    assert base64.b64decode(sent["images"]["in_1.png"]) == (folder.path / "other/in.png").read_bytes()


def test_a_url_is_sent_as_it_is(folder: Folder) -> None:
    url = "https://pictures.example//a/photo.png?sig=x%2Fy"
    loaders = {key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("1", "2")}
    (folder.path / "two.json").write_text(json.dumps(loaders))
    assert folder.run("--workflow", "two.json", "--img", url, "in.png", "--url", folder.server.url)[0] == 0
    sent = folder.sent()["input"]
    assert [sent["workflow"][key]["inputs"]["image"] for key in ("1", "2")] == ["photo.png", "in.png"]
    assert sent["images"]["photo.png"] == url


def test_texts_go_to_stdout_and_warnings_to_stderr(folder: Folder) -> None:
    folder.server.script = completed(
        {"images": [], "texts": [{"node_id": "7", "text": "a caption"}], "warnings": ["one branch\nfailed"]}
    )
    code, out, err = folder.job(LC_ALL="C")
    assert (code, out) == (client.ExitCode.SAVED, "a caption\n")
    assert "warning: one branch failed\n" in err


def test_a_large_request_is_told_before_it_is_sent(folder: Folder) -> None:
    noise = Image.frombytes("RGB", (1700, 1700), os.urandom(1700 * 1700 * 3))
    noise.save(folder.path / "in.png", compress_level=0)
    folder.server.script = [answer(400, "exceeded max body size of 10MiB")]
    code, _, err = folder.job()
    assert code == client.ExitCode.PLATFORM
    assert "warning: the request has 11.6 MB (in.png 11.6 MB) and RunPod takes 10 MB" in err
    assert "exceeded max body size" in err


def test_help_fits_a_screen_and_tells_the_exit_codes(folder: Folder) -> None:
    code, out, _ = folder.run("--help", COLUMNS="120")
    assert code == 0
    assert len(out.splitlines()) <= 40
    assert out.count("client.py --workflow ") >= 3
    assert all(f"{number.value} " in out for number in client.ExitCode)


def test_help_imports_none_of_the_packages() -> None:
    script = (
        "import sys, client; client.build_parser().format_help(); print({'requests', 'PIL', 'tqdm'} & {*sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert shown.stdout == "set()\n", shown.stderr


# --- every bad end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "code", "message"),
    [
        (answer(200, {"status": "FAILED", "error": "[NO_OUTPUT] Nothing."}), 1, "the job failed: [NO_OUTPUT] Nothing."),
        (answer(200, {"status": "COMPLETED"}), 1, "completed without a result"),
        (answer(200, {"status": "CANCELLED"}), 1, "was cancelled"),
        (answer(200, {"status": "COMPLETED", "output": {"images": [{"filename": "a"}]}}), 1, "a is not saved"),
        (answer(404, ""), 3, "no longer knows job j1"),
        (answer(401, ""), 3, "refused the key"),
        (answer(200, {"status": "TIMED_OUT"}), 4, "ran out of time"),
    ],
)
def test_the_exit_code_tells_how_the_job_ended(folder: Folder, last: Any, code: int, message: str) -> None:
    folder.server.script = [QUEUED, last]
    assert_one_error(folder.job(), code, message)


def assert_one_error(end: tuple[int, str, str], code: int, message: str) -> None:
    exit_code, out, err = end
    errors = [line for line in err.splitlines() if "error: " in line]
    assert (exit_code, out, len(errors)) == (code, "", 1), err
    assert message in errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workflow", "missing.json"], "cannot be read: No such file"),
        (["--workflow", "in.png"], "is not JSON"),
        (["--img", "missing.png"], "there is no image missing.png"),
        (["--img", "workflow.json"], "workflow.json is not an image"),
        (["--img", "cut.png"], "cut.png is not an image"),
        (["--prompt", "new", "--workflow", "bare.json"], "no text encoder"),
        (["--seed", "-1"], "a seed is a whole number"),
        (["--timeout", "nan"], "the timeout is a number"),
        (["--seed", "1", "--keep-seeds"], "not allowed with"),
        (["--seed", "1", "--workflow", "bare.json"], "has no seed"),
        (["--workflow", "infinite.json"], "cannot be sent as JSON"),
        (["--url", "ftp://host"], "--url has the form"),
        (["--out", "workflow.json"], "--out workflow.json cannot be made"),
        (["--endpoint", ""], "name the endpoint"),
    ],
)
def test_bad_input_ends_before_anything_is_sent(folder: Folder, arguments: list[str], message: str) -> None:
    loader = {"1": {"class_type": "LoadImage", "inputs": {"image": "x"}}}
    (folder.path / "bare.json").write_text(json.dumps(loader))
    (folder.path / "infinite.json").write_text('{"1": {"class_type": "LoadImage", "inputs": {"x": 1e999}}}')
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 9).save(whole, "PNG")
    (folder.path / "cut.png").write_bytes(whole.getvalue()[:-400])
    common = {"--workflow": "workflow.json", "--img": "in.png", "--url": folder.server.url}
    common |= dict(zip(arguments[::2], arguments[1::2], strict=False))
    flags = arguments[-1:] if len(arguments) % 2 else []
    environment = {"RUNPOD_ENDPOINT_ID": ""} if arguments[0] == "--endpoint" else {}
    end = folder.run(*(word for pair in common.items() for word in pair), *flags, **environment)
    assert_one_error(end, client.ExitCode.BAD_INPUT, message)
    assert folder.server.requests == []


def test_without_a_key_nothing_is_sent(folder: Folder) -> None:
    assert_one_error(folder.job(RUNPOD_API_KEY=""), client.ExitCode.BAD_INPUT, "RUNPOD_API_KEY")
    assert folder.server.requests == []


def test_an_entry_in_netrc_does_not_replace_the_key(folder: Folder) -> None:
    (folder.path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (folder.path / ".netrc").chmod(0o600)
    assert folder.job(HOME=str(folder.path))[0] == client.ExitCode.SAVED
    assert {authorization for _, _, authorization, _ in folder.server.requests} == {"Bearer secret"}


def test_a_server_that_is_not_there_is_a_platform_failure(folder: Folder) -> None:
    end = folder.job("--url", "http://127.0.0.1:1/v2")
    assert_one_error(end, client.ExitCode.PLATFORM, "Connection refused")


def test_the_timeout_cancels_the_job(folder: Folder) -> None:
    folder.server.script = [QUEUED]
    assert_one_error(folder.job("--timeout", "1"), client.ExitCode.TIMED_OUT, "--timeout")
    assert folder.server.requests[-1][1] == "/v2/ep/cancel/j1"


def test_ctrl_c_cancels_the_job(folder: Folder) -> None:
    asked = threading.Event()

    def queued(handler: BaseHTTPRequestHandler) -> None:
        QUEUED(handler)
        if "/status/" in handler.path:
            asked.set()

    folder.server.script = [queued]
    process = folder.start("--workflow", "workflow.json", "--img", "in.png", "--url", folder.server.url)
    assert asked.wait(20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == client.ExitCode.INTERRUPTED
    assert folder.server.requests[-1][1] == "/v2/ep/cancel/j1"
    assert "job j1 is cancelled on RunPod\ninterrupted\n" in err
    assert "Traceback" not in err
