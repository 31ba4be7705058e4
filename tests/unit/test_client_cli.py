"""client.py as a command: what it sends, what it prints where, its exit codes, and how it is interrupted."""

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
from client_server import CLIENT, QUEUED, WORKFLOW, Answer, End, Folder, Server, Signal, answer, picture
from PIL import Image

import client

SAVED = {"images": [picture(b"picture")]}


def completed(output: object, **facts: Any) -> list[Answer]:
    return [QUEUED, answer(200, {"id": "j1", "status": "COMPLETED", "output": output, **facts})]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    server = Server()
    server.script = completed(SAVED)
    yield Folder(tmp_path, server, client.main)
    server.close()


def asked(folder: Folder) -> list[str]:
    return [f"{method} {path.removeprefix('/v2/ep/')}" for method, path, _, _ in folder.server.requests]


# --- the good way ----------------------------------------------------------------------------------------------------


def test_a_job_is_sent_as_agreed_and_its_picture_saved(folder: Folder) -> None:
    folder.server.script = completed(SAVED, delayTime=12)
    end = folder.process(*folder.picture_job(), "--prompt", "new", "--seed", "7", "--debug", "--timeout", "90")
    assert (end.code, end.out) == (client.ExitCode.SAVED, "output/a.png\n")
    assert folder.saved() == {"a.png": b"picture"}
    assert asked(folder) == ["POST run", "GET status/j1"]
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
    told = ['1 "In" (LoadImage).image = "in.png"', '6 (CLIPTextEncode).text = "new"', "3 (KSampler).seed = 7", "job j1"]
    assert [line for line in told if line not in end.err.splitlines()] == []
    assert "delayTime: 12" in end.err


def test_what_is_not_asked_for_is_not_sent(folder: Folder) -> None:
    folder.job()
    assert folder.sent().keys() == {"input", "policy"}
    assert folder.sent()["input"].keys() == {"workflow", "images"}
    assert folder.sent()["policy"] == {"executionTimeout": 1_800_000}


def test_the_wanted_format_is_sent(folder: Folder) -> None:
    assert folder.job("--format", "webp", "--quality", "80").code == 0
    sent = folder.sent()["input"]
    assert (sent["output_format"], sent["output_quality"]) == ("webp", 80)
    assert sent.keys() == {"workflow", "images", "output_format", "output_quality"}


@pytest.mark.parametrize("wish", [("--quality", "80"), ("--quality", "80", "--format", "png"), ("--quality", "101")])
def test_a_quality_that_means_nothing_is_refused(folder: Folder, wish: tuple[str, ...]) -> None:
    assert_one_error(folder.job(*wish), client.ExitCode.BAD_INPUT, "quality")
    assert folder.server.requests == []


def test_sync_hands_over_by_runsync(folder: Folder) -> None:
    assert folder.job("--sync").code == client.ExitCode.SAVED
    assert asked(folder) == ["POST runsync?wait=1000", "GET status/j1"]


def test_debug_tells_times_and_where_to_look(folder: Folder) -> None:
    debug = {"prompt_id": "p-1", "files": ["/dev/shm/comfyui/output/a.png"]}
    script = completed(
        {**SAVED, "timings_ms": {"run": 7.5}, "debug": debug}, delayTime=5, executionTime=6, workerId="w"
    )
    told = {
        *("timings_ms.run: 7.5", "debug.prompt_id: p-1", 'debug.files: ["/dev/shm/comfyui/output/a.png"]'),
        *("delayTime: 5", "executionTime: 6", "workerId: w"),
    }
    folder.server.script = list(script)
    assert told <= set(folder.job("--debug").err.splitlines())
    folder.server.script = list(script)
    assert not told & set(folder.job().err.splitlines())


def test_debug_tells_the_details_of_a_failure(folder: Folder) -> None:
    output = {"error_code": "PROMPT_REJECTED", "details": {"node": "3"}, "debug": {"prompt_id": "p-1"}}
    folder.server.script = [QUEUED, answer(200, {"status": "FAILED", "error": "No.", "output": output})]
    assert {"details.node: 3", "debug.prompt_id: p-1"} <= set(folder.job("--debug").err.splitlines())


def test_seeds_are_random_and_printed_unless_kept(folder: Folder) -> None:
    seeds = set()
    for number in range(2):
        folder.server.script = completed(SAVED)
        end = folder.job()
        seed = folder.sent(number)["input"]["workflow"]["3"]["inputs"]["seed"]
        assert 0 <= seed < 2**32
        assert f"3 (KSampler).seed = {seed}\n" in end.err
        seeds.add(seed)
    assert len(seeds) == 2
    folder.server.script = completed(SAVED)
    folder.job("--keep-seeds")
    changed = client.apply_changes(WORKFLOW, [client.Change(client.Place("1", "image"), "in.png")])
    assert folder.sent(2)["input"]["workflow"] == changed
    assert sorted(folder.saved()) == ["a.png", "a_1.png", "a_2.png"]


def test_two_pictures_of_one_name_are_both_sent(folder: Folder) -> None:
    (folder.path / "other").mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder.path / "other/in.png")
    loaders = {key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("10", "9")}
    (folder.path / "two.json").write_text(json.dumps(loaders))
    arguments = ("--workflow", "two.json", "--img", "in.png", "other/in.png", "--url", folder.server.url)
    assert folder.run(*arguments).code == client.ExitCode.SAVED
    sent = folder.sent()["input"]
    assert sent["workflow"]["9"]["inputs"]["image"] == "in.png"
    assert sent["workflow"]["10"]["inputs"]["image"] == "in_1.png"
    assert base64.b64decode(sent["images"]["in_1.png"]) == (folder.path / "other/in.png").read_bytes()


def test_a_url_is_sent_as_it_is(folder: Folder) -> None:
    url = "https://pictures.example//a/photo.png?sig=x%2Fy"
    loaders = {key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("1", "2")}
    (folder.path / "two.json").write_text(json.dumps(loaders))
    assert folder.run("--workflow", "two.json", "--img", url, "in.png", "--url", folder.server.url).code == 0
    sent = folder.sent()["input"]
    assert [sent["workflow"][key]["inputs"]["image"] for key in ("1", "2")] == ["photo.png", "in.png"]
    assert sent["images"]["photo.png"] == url


def test_texts_go_to_stdout_and_warnings_to_stderr(folder: Folder) -> None:
    output = {"images": [], "texts": [{"node_id": "7", "text": "a caption"}, "another"], "warnings": ["half\n\x1b[31m"]}
    folder.server.script = completed({**output, "errors": ["b.png was too large"]})
    end = folder.job()
    assert (end.code, end.out) == (client.ExitCode.SAVED, "a caption\nanother\n")
    assert "warning: half ?[31m\nwarning: b.png was too large\n" in end.err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_any_text_can_be_printed_anywhere(folder: Folder, encoding: str, options: tuple[str, ...]) -> None:
    text = "é \x81 \ud83d\ude00 猫"
    folder.server.script = completed({"texts": [text]})
    end = folder.process(*folder.picture_job(), *options, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert end.code == client.ExitCode.SAVED
    if options:
        assert end.told()["texts"] == ["é \x81 😀 猫"]


@pytest.mark.parametrize("sink", ["> /dev/full", ">&-", "| true", "2>&-", "2> /dev/full"])
def test_nobody_listening_costs_no_picture(folder: Folder, sink: str) -> None:
    """`| head`, a full disk, a closed terminal: what was paid for is saved all the same."""
    folder.server.script = completed({"images": [picture(b"1"), picture(b"2"), picture(b"3")]})
    environment = {"PATH": os.environ["PATH"], "RUNPOD_API_KEY": "secret", "RUNPOD_ENDPOINT_ID": "ep"}
    command = f'{{ "$0" "$@"; echo $? > code; }} {sink}'
    line = ["sh", "-c", command, sys.executable, str(CLIENT), *folder.picture_job()]
    shell = subprocess.run(line, cwd=folder.path, env=environment, capture_output=True, text=True, timeout=60)
    assert sorted(folder.saved().values()) == [b"1", b"2", b"3"]
    assert (folder.path / "code").read_text() == "0\n"
    assert "defect" not in shell.stderr
    assert "Exception ignored" not in shell.stderr


def test_a_large_request_is_told_before_it_is_sent(folder: Folder) -> None:
    noise = Image.frombytes("RGB", (1700, 1700), os.urandom(1700 * 1700 * 3))
    noise.save(folder.path / "in.png", compress_level=0)
    warning = "warning: the request has 11.6 MB (in.png 11.6 MB) and RunPod takes 10 MB; what helps: --max-side N"
    said = folder.job("--dry-run")
    assert warning in said.err
    assert "--sync" in said.err
    told_by_then: list[bool] = []
    lines: list[str] = []
    warned = threading.Event()

    def refused(handler: BaseHTTPRequestHandler) -> None:
        told_by_then.append(warned.wait(20))
        answer(400, "exceeded max body size of 10MiB")(handler)

    folder.server.script = [refused]
    process = folder.start(*folder.picture_job(), "--quiet")
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if warning in line:
            warned.set()
    end = folder.end_of(process)
    assert end.code == client.ExitCode.PLATFORM
    assert told_by_then == [True]
    assert "exceeded max body size" in lines[-1]
    assert folder.job("--sync", "--dry-run").err.count("warning") == 0
    assert folder.job("--max-side", "64", "--dry-run").err.count("warning") == 0


# --- what is printed where -------------------------------------------------------------------------------------------


def test_quiet_leaves_warnings_and_errors(folder: Folder) -> None:
    folder.server.script = completed({**SAVED, "warnings": ["one branch failed"]})
    end = folder.job("--quiet", "--debug")
    assert (end.out, end.err) == ("output/a.png\n", "warning: one branch failed\n")
    folder.server.script = [QUEUED, answer(200, {"status": "FAILED", "error": "boom"})]
    end = folder.job("--quiet")
    assert (end.code, end.out, end.err) == (1, "", "error: the job failed: boom\n")


def test_json_tells_all_of_a_success(folder: Folder) -> None:
    output = {**SAVED, "texts": ["a caption"], "warnings": ["slow"], "debug": {"prompt_id": "p-1"}}
    folder.server.script = completed(output, delayTime=1200, executionTime=3400.4)
    told = folder.job("--json", "--seed", "7", "--prompt", "new").told()
    assert isinstance(told["timings_ms"].pop("all"), int)
    assert told == {
        "ok": True,
        "exit_code": 0,
        "job_id": "j1",
        "state": "COMPLETED",
        "saved": ["output/a.png"],
        "texts": ["a caption"],
        "warnings": ["slow"],
        "errors": [],
        "changes": {"1.image": "in.png", "6.text": "new", "3.seed": 7},
        "seeds": {"3.seed": 7},
        "timings_ms": {"queue": 1200, "run": 3400},
        "debug": {"prompt_id": "p-1"},
    }


FAILURES: list[tuple[Answer, int, str]] = [
    (answer(200, {"status": "FAILED", "error": "[NO_OUTPUT] Nothing."}), 1, "the job failed: [NO_OUTPUT] Nothing."),
    (answer(200, {"status": "FAILED", "error": '{"error_message": "raised"}'}), 1, "the job failed: raised"),
    (answer(200, {"status": "COMPLETED"}), 1, "completed without a result"),
    (answer(200, {"status": "CANCELLED"}), 1, "was cancelled"),
    (answer(200, {"status": "COMPLETED", "output": {"images": [{"filename": "a"}]}}), 1, "a is not saved"),
    (answer(200, {"status": "COMPLETED", "output": {"images": []}}), 1, "made nothing to save"),
    (answer(404, ""), 3, "no longer knows job j1"),
    (answer(401, ""), 3, "key was refused"),
    (answer(400, "\x1b[31mno"), 3, "HTTP 400, ?[31mno"),
    (answer(200, {"status": "TIMED_OUT"}), 4, "ran out of time"),
    (answer(200, {"status": "FAILED", "error": "executionTimeout exceeded"}), 4, "ran out of time"),
]


@pytest.mark.parametrize(("last", "code", "message"), FAILURES)
def test_the_exit_code_tells_how_the_job_ended(folder: Folder, last: Answer, code: int, message: str) -> None:
    folder.server.script = [QUEUED, last]
    assert_one_error(folder.job(), code, message)
    folder.server.script = [QUEUED, last]
    end = folder.job("--json")
    told = end.told()
    assert (end.code, told["job_id"], told["saved"]) == (code, "j1", [])
    assert message in told["errors"][0]


def test_one_of_several_items_that_fails_fails_the_job_and_names_what_is_saved(folder: Folder) -> None:
    folder.server.script = completed({"images": [picture(b"1"), {"filename": "b.png"}, picture(b"3")]})
    end = folder.job("--json")
    assert end.code == client.ExitCode.JOB_FAILED
    assert end.told()["saved"] == ["output/a.png", "output/a_1.png"]
    assert end.told()["errors"] == ["b.png is not saved: it has no data"]


def test_numbers_that_are_none_make_no_defect(folder: Folder) -> None:
    status = {"status": "COMPLETED", "output": {**SAVED, "debug": {"x": 0}}, "delayTime": 0, "executionTime": 0}
    for odd in ("NaN", "1e999", "1" + "0" * 400):
        body = json.dumps(status).replace(": 0", f": {odd}")
        progress = body.replace("COMPLETED", "IN_PROGRESS")
        folder.server.script = [QUEUED, answer(200, progress), answer(200, body)]
        assert folder.job("--json", "--debug").told()["state"] == "COMPLETED"


def assert_one_error(end: End, code: int, message: str) -> None:
    assert (end.code, end.out, len(end.errors())) == (code, "", 1), end.err
    assert message in end.errors()[0]


BAD_INPUT: list[tuple[list[str], str]] = [
    (["--workflow", "missing.json"], "there is no workflow missing.json"),
    (["--workflow", ""], "cannot be read: Is a directory"),
    (["--workflow", "in.png"], "is not JSON"),
    (["--workflow", "ui.json"], "Export (API)"),
    (["--img", "missing.png"], "there is no image missing.png"),
    (["--img", "workflow.json"], "workflow.json is not an image"),
    (["--img", "cut.png"], "cut.png is not an image"),
    (["--img", "https://[::1/a.png"], "https://[::1/a.png"),
    (["--file", "missing.mp4"], "there is no file missing.mp4"),
    (["--prompt", "new", "--workflow", "bare.json"], "no text encoder"),
    (["--seed", "-1"], "a seed is a whole number"),
    (["--seed", "18446744073709551616"], "a seed is a whole number"),
    (["--timeout", "nan"], "the timeout is a number"),
    (["--timeout", "0"], "the timeout is a number"),
    (["--max-side", "0"], "a side is a whole number"),
    (["--format", "gif"], "invalid choice: 'gif'"),
    (["--seed", "1", "--keep-seeds"], "not allowed with"),
    (["--seed", "1", "--workflow", "bare.json"], "has no seed"),
    (["--set", "3.sed=5"], "did you mean seed?"),
    (["--workflow", "infinite.json"], "cannot be sent as JSON"),
    (["--url", "ftp://host"], "--url has the form"),
    (["--url", "http://[::1"], "http://[::1 is no URL"),
    (["--out", "workflow.json"], "--out workflow.json cannot be made"),
    (["--resume", "../x"], "a job's id has"),
    (["--resume", "j1", "--detach"], "not allowed with"),
    (["--api-key-file", "missing"], "there is no key file missing"),
    (["--api-key-file", "empty"], "--api-key-file"),
    (["--api-key-file", "."], "Is a directory"),
    (["--api-key", "k"], "unrecognized arguments"),
    (["--imgs", "in.png"], "unrecognized arguments"),
    (["--repeat", "2", "--detach"], "are for one job"),
    (["--batch", "missing.jsonl"], "there is no file missing.jsonl"),
    (["--batch", "empty"], "has no job"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_ends_before_anything_is_sent(folder: Folder, arguments: list[str], message: str) -> None:
    (folder.path / "bare.json").write_text(json.dumps({"1": WORKFLOW["1"]}))
    (folder.path / "infinite.json").write_text('{"1": {"class_type": "LoadImage", "inputs": {"x": 1e999}}}')
    (folder.path / "ui.json").write_text('{"nodes": [], "links": []}')
    (folder.path / "empty").write_text(" \n")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 9).save(whole, "PNG")
    (folder.path / "cut.png").write_bytes(whole.getvalue()[:-400])
    common = {"--workflow": "workflow.json", "--img": "in.png", "--url": folder.server.url}
    common |= dict(zip(arguments[::2], arguments[1::2], strict=False))
    flags = arguments[-1:] if len(arguments) % 2 else []
    line = [*(word for pair in common.items() for word in pair), *flags]
    assert_one_error(folder.run(*line), client.ExitCode.BAD_INPUT, message)
    end = folder.run(*line, "--json")
    assert end.code == client.ExitCode.BAD_INPUT
    assert message in end.told()["errors"][0]
    assert folder.server.requests == []


@pytest.mark.parametrize("options", [(), ("--quiet",), ("--json",)])
def test_without_a_workflow_the_examples_are_named(folder: Folder, options: tuple[str, ...]) -> None:
    end = folder.process(*options)
    assert (end.code, len(end.errors())) == (client.ExitCode.BAD_INPUT, 1)
    assert "--help" in end.errors()[0]
    assert end.out == "" or end.told()["errors"]


def test_without_an_endpoint_nothing_is_sent(folder: Folder) -> None:
    end = folder.job(RUNPOD_ENDPOINT_ID="")
    assert_one_error(end, client.ExitCode.BAD_INPUT, "name the endpoint with --endpoint or RUNPOD_ENDPOINT_ID")
    assert folder.server.requests == []


def test_a_server_that_is_not_there_is_a_platform_failure(folder: Folder) -> None:
    end = folder.job("--url", "http://127.0.0.1:1/v2")
    assert_one_error(end, client.ExitCode.PLATFORM, "Connection refused")


def test_progress_is_told_in_lines(folder: Folder) -> None:
    update = {"stage": "running", "node": "3", "node_class": "KSampler", "value": 3, "max": 20}
    running = answer(200, {"status": "IN_PROGRESS", "output": update})
    folder.server.script = [QUEUED, QUEUED, QUEUED, running, running, *completed(SAVED)[1:]]
    lines = folder.job().err.splitlines()
    assert [line for line in lines if line in ("waiting in the queue", "running KSampler (node 3) 3/20")] == [
        "waiting in the queue",
        "running KSampler (node 3) 3/20",
    ]


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_tells_the_exit_codes(folder: Folder) -> None:
    end = folder.process("--help", COLUMNS="120")
    assert (end.code, end.err) == (0, "")
    assert len(end.out.splitlines()) <= 52
    assert max(map(len, end.out.splitlines())) <= 120
    assert end.out.count("  client.py --workflow ") >= 3
    codes = end.out.partition("exit codes: ")[2].replace("\n", " ").split(";")
    assert [int(code.split()[0]) for code in codes] == sorted(client.ExitCode)


def test_the_examples_of_the_help_are_command_lines() -> None:
    parser = client.build_parser()
    lines = [line for line in parser.format_help().splitlines() if line.startswith("  client.py ")]
    for line in lines:
        parser.parse_args(client_arguments(line))
    assert len(lines) >= 3


def client_arguments(line: str) -> list[str]:
    import shlex

    return shlex.split(line.partition("     (")[0])[1:]


def test_help_imports_none_of_the_packages() -> None:
    script = (
        "import sys, client; client.build_parser().format_help(); print({'requests', 'PIL', 'tqdm'} & {*sys.modules})"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=CLIENT.parent, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout == "set()\n", shown.stderr


@pytest.mark.parametrize(("options", "package"), [((), "requests"), (("--dry-run",), "Pillow")])
def test_a_missing_package_is_named_with_the_ways_to_have_it(
    folder: Folder, options: tuple[str, ...], package: str
) -> None:
    line = [sys.executable, "-S", str(CLIENT), *folder.picture_job(), *options, "--json"]  # -S: no installed packages
    environment = {"RUNPOD_API_KEY": "secret", "RUNPOD_ENDPOINT_ID": "ep"}
    ended = subprocess.run(line, cwd=folder.path, env=environment, capture_output=True, text=True, timeout=60)
    end = End(ended.returncode, ended.stdout, ended.stderr)
    assert_one_error(end._replace(out=""), client.ExitCode.BAD_INPUT, "uv run client.py")
    assert package in end.told()["errors"][0]
    assert folder.server.requests == []


# --- key and endpoint ------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_sent(folder: Folder) -> None:
    assert_one_error(folder.job(RUNPOD_API_KEY=""), client.ExitCode.BAD_INPUT, "RUNPOD_API_KEY")
    assert folder.server.requests == []


@pytest.mark.parametrize("content", [b"secret file\n", b"\xef\xbb\xbfsecret file\r\n", b"\n  secret file"])
def test_the_key_can_stand_in_a_file_and_goes_before_the_environment(folder: Folder, content: bytes) -> None:
    (folder.path / "key").write_bytes(content)
    assert folder.job("--api-key-file", "key", RUNPOD_API_KEY="secret other").code == client.ExitCode.SAVED
    assert {authorization for _, _, authorization, _ in folder.server.requests} == {"Bearer secret file"}


def test_a_file_that_is_no_key_is_not_printed(folder: Folder) -> None:
    for content in (b"secret\nsecret", b"secret \xff", b"\xff\xfes\0e\0c\0r\0e\0t\0"):
        (folder.path / "key").write_bytes(content)
        assert folder.job("--api-key-file", "key").code == client.ExitCode.BAD_INPUT
    assert folder.server.requests == []


def test_the_endpoint_of_the_command_line_goes_before_the_environment(folder: Folder) -> None:
    assert folder.job("--endpoint", "other/../x").code == client.ExitCode.SAVED
    assert folder.server.requests[0][1] == "/v2/other%2F..%2Fx/run"


def test_an_entry_in_netrc_does_not_replace_the_key(folder: Folder) -> None:
    (folder.path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (folder.path / ".netrc").chmod(0o600)
    assert folder.job(HOME=str(folder.path)).code == client.ExitCode.SAVED
    assert {authorization for _, _, authorization, _ in folder.server.requests} == {"Bearer secret"}


def test_the_key_is_in_no_file_and_on_no_command_line(folder: Folder) -> None:
    waits = Signal(QUEUED)
    folder.server.script = [QUEUED, waits]
    process = folder.start(*folder.picture_job(), "--save-run", "--debug", "--json")
    waits.wait()
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    folder.server.script = completed({**SAVED, "debug": {"prompt_id": "p"}})[1:]
    assert folder.end_of(process).code == client.ExitCode.SAVED
    assert b"client.py" in command
    assert b"secret" not in command
    assert folder.saved().keys() == {"a.png", "run.json"}
    assert not any(b"secret" in content for content in folder.saved().values())


# --- nothing is sent -------------------------------------------------------------------------------------------------


def test_a_dry_run_needs_no_key_sends_nothing_and_leaves_nothing(folder: Folder) -> None:
    end = folder.job("--dry-run", "--prompt", "new", "--seed", "7", RUNPOD_API_KEY="", RUNPOD_ENDPOINT_ID="")
    assert (end.code, end.out) == (0, "")
    assert end.err.splitlines() == [
        '1 "In" (LoadImage).image = "in.png"',
        '6 (CLIPTextEncode).text = "new"',
        "3 (KSampler).seed = 7",
    ]
    assert folder.server.requests == []
    assert not (folder.path / "output").exists()


def test_a_dry_run_with_json_prints_the_workflow_that_would_be_sent(folder: Folder) -> None:
    options = ("--prompt", "new", "--seed", "7", "--set", "7.text=worse")
    told = folder.job("--dry-run", "--json", *options).told()
    folder.job(*options)
    assert told["workflow"] == folder.sent()["input"]["workflow"]
    assert told["changes"] == {"1.image": "in.png", "3.seed": 7, "6.text": "new", "7.text": "worse"}
    assert told["seeds"] == {"3.seed": 7}


@pytest.mark.parametrize("option", [("--resume", "j1"), ("--cancel", "j1")])
def test_a_dry_run_of_a_job_that_was_sent_is_refused(folder: Folder, option: tuple[str, ...]) -> None:
    assert_one_error(folder.job("--dry-run", *option), client.ExitCode.BAD_INPUT, "--dry-run")
    assert folder.server.requests == []


def test_pictures_that_are_not_given_are_an_error_unless_kept_on_purpose(folder: Folder) -> None:
    end = folder.run(*folder.picture_job()[:2], "--url", folder.server.url)
    assert_one_error(end, client.ExitCode.BAD_INPUT, '1 "In" (LoadImage).image = "old.png"; --keep-images')
    assert folder.server.requests == []
    assert folder.run("--workflow", "workflow.json", "--url", folder.server.url, "--keep-images").code == 0
    sent = folder.sent()["input"]
    assert "images" not in sent
    assert sent["workflow"]["1"] == WORKFLOW["1"]


# --- detach, resume, cancel ------------------------------------------------------------------------------------------


def test_detach_prints_the_id_and_resume_fetches(folder: Folder) -> None:
    end = folder.job("--detach", "--quiet")
    assert (end.code, end.out, end.err) == (0, "j1\n", "")
    assert asked(folder) == ["POST run"]
    end = folder.run("--resume", "j1", "--url", folder.server.url)
    assert (end.code, end.out) == (0, "output/a.png\n")
    assert asked(folder) == ["POST run", "GET status/j1"]
    assert folder.saved() == {"a.png": b"picture"}


def test_detach_and_resume_with_json(folder: Folder) -> None:
    told = folder.job("--detach", "--json").told()
    assert (told["job_id"], told["state"], told["saved"]) == ("j1", "IN_QUEUE", [])
    told = folder.run("--resume", "j1", "--url", folder.server.url, "--json").told()
    assert (told["job_id"], told["state"], told["saved"]) == ("j1", "COMPLETED", ["output/a.png"])


def test_resume_of_a_job_that_runpod_has_forgotten_says_so(folder: Folder) -> None:
    folder.server.script = [answer(404, "")]
    end = folder.run("--resume", "j9", "--url", folder.server.url)
    assert_one_error(end, client.ExitCode.PLATFORM, "no longer knows job j9")


def test_cancel_cancels(folder: Folder) -> None:
    folder.server.script = [answer(200, {"id": "j7", "status": "CANCELLED"})]
    end = folder.run("--cancel", "j7", "--url", folder.server.url)
    assert (end.code, end.out, end.err) == (0, "", "job j7 is cancelled\n")
    assert asked(folder) == ["POST cancel/j7"]
    told = folder.run("--cancel", "j7", "--url", folder.server.url, "--json").told()
    assert (told["job_id"], told["state"]) == ("j7", "CANCELLED")


def test_cancel_of_a_job_that_was_done_says_so(folder: Folder) -> None:
    folder.server.script = [answer(200, {"id": "j7", "status": "COMPLETED"})]
    end = folder.run("--cancel", "j7", "--url", folder.server.url)
    assert (end.code, end.err) == (0, "job j7 was already COMPLETED\n")


@pytest.mark.parametrize("reply", [answer(404, ""), answer(400, "no"), answer(500, "<html>")])
def test_a_cancel_that_fails_says_so(folder: Folder, reply: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CANCEL_TIMEOUT_S", 0.2)
    folder.server.script = [reply]
    assert_one_error(folder.run("--cancel", "j7", "--url", folder.server.url), client.ExitCode.PLATFORM, "j7")
    assert folder.run("--cancel", "j7", "--url", folder.server.url, "--json").told()["errors"]


# --- how it is stopped -----------------------------------------------------------------------------------------------

CANCELLED = answer(200, {"id": "j1", "status": "CANCELLED"})


def by_path(status: Answer, cancel: Answer) -> Answer:
    """Takes a job, and answers /status and /cancel as told."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        call = handler.path.split("/")[3]
        {"run": QUEUED, "status": status, "cancel": cancel}[call](handler)

    return send


def test_the_timeout_cancels_the_job(folder: Folder) -> None:
    folder.server.script = [by_path(QUEUED, CANCELLED)]
    end = folder.job("--timeout", "1")
    assert_one_error(end, client.ExitCode.TIMED_OUT, "--timeout")
    assert asked(folder)[-1] == "POST cancel/j1"
    assert "job j1 is cancelled\n" in end.err
    assert folder.sent()["policy"] == {"executionTimeout": 5_000}
    told = folder.job("--timeout", "1", "--json").told()
    assert (told["job_id"], told["exit_code"]) == ("j1", client.ExitCode.TIMED_OUT)


def test_a_job_that_cannot_be_cancelled_is_told(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CANCEL_TIMEOUT_S", 0.2)
    folder.server.script = [by_path(QUEUED, answer(500, "<html>"))]
    end = folder.job("--timeout", "1", "--quiet")
    assert "warning: job j1 could not be cancelled and may still run: " in end.err
    assert asked(folder)[-1] == "POST cancel/j1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_cancels_the_job(folder: Folder, number: signal.Signals, options: tuple[str, ...]) -> None:
    status = Signal(QUEUED)
    folder.server.script = [by_path(status, CANCELLED)]
    process = folder.start(*folder.picture_job(), *options)
    status.wait()
    process.send_signal(number)
    end = folder.end_of(process)
    assert end.code == client.ExitCode.INTERRUPTED
    assert asked(folder)[-1] == "POST cancel/j1"
    assert asked(folder).count("POST cancel/j1") == 1
    assert end.err.endswith("job j1 is cancelled\ninterrupted\n")
    if options:
        told = end.told()
        assert (told["job_id"], told["state"], told["errors"]) == ("j1", "CANCELLED", ["interrupted"])
    else:
        assert end.out == ""


class Trickle:
    """An answer that never ends, and never pauses for long enough to time out."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not self.over.wait(0.2):
            handler.wfile.write(b"x")
            handler.wfile.flush()
        handler.close_connection = True


@pytest.mark.parametrize("options", [("--quiet",), ("--json",)])
def test_a_second_ctrl_c_leaves_at_once_and_says_what_may_run_on(folder: Folder, options: tuple[str, ...]) -> None:
    trickle = Trickle()
    status, cancel = Signal(QUEUED), Signal(trickle)
    folder.server.script = [by_path(status, cancel)]
    process = folder.start(*folder.picture_job(), *options)
    try:
        status.wait()
        process.send_signal(signal.SIGINT)
        cancel.wait()
        process.send_signal(signal.SIGINT)
        end = folder.end_of(process)
    finally:
        trickle.over.set()
    assert end.code == client.ExitCode.INTERRUPTED
    assert "warning: job j1 may still run; --cancel j1 ends it\n" in end.err
    assert end.out == "" or end.told()["job_id"] == "j1"


def test_ctrl_c_while_the_job_is_handed_over_says_that_it_may_run(folder: Folder) -> None:
    trickle = Trickle()
    taken = Signal(trickle)
    folder.server.script = [taken]
    process = folder.start(*folder.picture_job(), "--json")
    try:
        taken.wait()
        process.send_signal(signal.SIGINT)
        end = folder.end_of(process)
    finally:
        trickle.over.set()
    assert end.code == client.ExitCode.INTERRUPTED
    assert "warning: if the job was taken before this, it runs to its end" in end.err
    assert end.told()["errors"] == ["interrupted"]


def test_ctrl_c_while_the_platform_takes_no_job_is_no_cause_for_alarm(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    def ctrl_c(pause_s: float) -> None:
        if pause_s:
            raise KeyboardInterrupt

    folder.server.script = [answer(429, Retry_After="30")]
    arguments = ["--workflow", str(folder.path / "text.json"), "--out", str(folder.path / "output")]
    run = client.Run(client.build_parser().parse_args(arguments), client.Console())
    report = run.attempt(lambda **clock: client.Endpoint(folder.server.url, "ep", "secret", **clock), sleep=ctrl_c)
    assert report.exit_code == client.ExitCode.INTERRUPTED
    assert "warning" not in capsys.readouterr().err


def test_ctrl_c_while_files_are_read_sends_nothing(folder: Folder) -> None:
    os.mkfifo(folder.path / "slow.json")
    process = folder.start("--workflow", "slow.json", "--url", folder.server.url)
    with (folder.path / "slow.json").open("w"):  # opens once the client reads
        process.send_signal(signal.SIGINT)
        end = folder.end_of(process)
    assert (end.code, end.out, end.err) == (client.ExitCode.INTERRUPTED, "", "interrupted\n")
    assert folder.server.requests == []


# --- a run made again ------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(folder: Folder) -> Folder:
    """A folder in which a job was run with --save-run, with pictures that were changed on the way."""
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (0, 0, 20, 20))
    exif = wide.getexif()
    exif[0x0112] = 6
    (folder.path / "other").mkdir()
    wide.save(folder.path / "other/in.jpg", exif=exif)
    wide.save(folder.path / "in.jpg")
    (folder.path / "talk.wav").write_bytes(b"RIFF")
    loaders = {key: {"class_type": "LoadImage", "inputs": {"image": "x"}} for key in ("9", "10", "11")}
    sound = {"12": {"class_type": "LoadAudio", "inputs": {"audio": "x.wav"}}}
    folder.server.script = completed(SAVED, delayTime=5)
    (folder.path / "all.json").write_text(json.dumps({**loaders, **sound, **{key: WORKFLOW[key] for key in "367"}}))
    images = ("--img", "in.jpg", "other/in.jpg", "https://host/far.png?x=1", "--file", "talk.wav")
    changes = ("--max-side", "16", "--prompt", "new é猫", "--set", "7.text=\ud800")
    end = folder.run("--workflow", "all.json", "--url", folder.server.url, *images, *changes, "--save-run")
    assert end.out == "output/a.png\noutput/run.json\n"
    assert len(folder.sent()["input"]["images"]) == 3
    return folder


def again(folder: Folder, *options: str) -> End:
    folder.server.script = completed(SAVED)
    return folder.run("--workflow", "output/run.json", "--url", folder.server.url, *options)


def test_a_run_is_stored_with_what_was_sent_and_what_came(finished: Folder) -> None:
    run = json.loads((finished.path / "output/run.json").read_text())
    assert run["workflow"] == finished.sent()["input"]["workflow"]
    assert run["seeds"] == {"3.seed": run["workflow"]["3"]["inputs"]["seed"]}
    assert (run["ok"], run["job_id"], run["saved"]) == (True, "j1", ["output/a.png"])
    assert run["timings_ms"]["queue"] == 5


def test_a_stored_run_is_sent_again_to_the_byte(finished: Folder) -> None:
    assert again(finished, "--keep-seeds").code == client.ExitCode.SAVED
    first, second = (body for _, path, _, body in finished.server.requests if path.endswith("/run"))
    assert first == second


def test_a_stored_run_is_sent_again_from_anywhere_and_again_from_its_own_store(finished: Folder) -> None:
    elsewhere = finished.path / "elsewhere"
    elsewhere.mkdir()
    there = Folder(elsewhere, finished.server, client.main)
    for run in ("../output/run.json", "output/run.json"):
        finished.server.script = completed(SAVED)
        options = ("--url", finished.server.url, "--keep-seeds", "--save-run")
        assert there.run("--workflow", run, *options).code == client.ExitCode.SAVED
    bodies = {body for _, path, _, body in finished.server.requests if path.endswith("/run")}
    assert len(bodies) == 1


def test_a_stored_run_gets_new_seeds_unless_told_otherwise(finished: Folder) -> None:
    assert again(finished).code == client.ExitCode.SAVED
    first, second = finished.sent(0)["input"], finished.sent(1)["input"]
    assert first["images"] == second["images"]
    assert first["workflow"]["3"]["inputs"].pop("seed") != second["workflow"]["3"]["inputs"].pop("seed")
    assert first["workflow"] == second["workflow"]


@pytest.mark.parametrize(("node_id", "other", "kept"), [("10", "9", "in.jpg"), ("9", "10", "in_1.jpg")])
@pytest.mark.parametrize("name", ["new.png", "in.jpg", "in_1.jpg"])
def test_a_stored_run_takes_another_picture(finished: Folder, node_id: str, other: str, kept: str, name: str) -> None:
    (finished.path / "new").mkdir()
    Image.new("RGB", (8, 8), "green").save(finished.path / "new" / name)
    assert again(finished, "--keep-seeds", "--img", f"{node_id}=new/{name}").code == client.ExitCode.SAVED
    first, second = finished.sent(0)["input"], finished.sent(1)["input"]
    names = {key: second["workflow"][key]["inputs"]["image"] for key in (node_id, other)}
    assert base64.b64decode(second["images"][names[node_id]]) == (finished.path / "new" / name).read_bytes()
    assert second["images"][names[other]] == first["images"][kept]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other/in.jpg", None, "there is no image "),
        ("talk.wav", None, "there is no file "),
        ("talk.wav", b"RIFX", "is not what it was in that run"),
        ("in.jpg", "in.png", "is not what it was in that run"),
        ("in.jpg", b"text", "is not an image"),
    ],
)
def test_a_stored_run_whose_file_is_gone_or_changed_is_an_error(
    finished: Folder, name: str, content: bytes | str | None, message: str
) -> None:
    path = finished.path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else (finished.path / content).read_bytes())
    assert_one_error(again(finished, "--keep-seeds"), client.ExitCode.BAD_INPUT, message)
    assert str(path) in again(finished, "--keep-seeds").err
    assert len(finished.server.requests) == 2
