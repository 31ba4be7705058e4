"""client.py as a process against ComfyUI itself, as behind a tunnel: the same jobs without a worker in between."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import threading
import wave
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from comfyui_client import ComfyUI, Workflow, boot, command, directory, empty, free_port, post, save
from PIL import Image, ImageChops, ImageOps

from tests.client_process import CLIENT, IMPATIENT, ClientProcess, Ended
from tests.process.stack import wait_until

SAVED, JOB_FAILED, BAD_INPUT, PLATFORM, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 4, 130


class Folder:
    """A folder in which clients run against one server; what they save lies in its ``output``."""

    def __init__(self, path: Path, url: str) -> None:
        self.path = path
        self.url = url

    def start(self, *arguments: str, program: tuple[str, ...] = (CLIENT,)) -> ClientProcess:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("RUNPOD_")}
        return ClientProcess(self.path, program, ("--url", self.url, *arguments), environ)

    def run(self, *arguments: str) -> Ended:
        return self.start(*arguments).end()

    def start_job(self, workflow: Workflow, *arguments: str, program: tuple[str, ...] = (CLIENT,)) -> ClientProcess:
        (self.path / "workflow.json").write_text(json.dumps(workflow))
        return self.start("--workflow", "workflow.json", *arguments, program=program)

    def job(self, workflow: Workflow, *arguments: str) -> Ended:
        return self.start_job(workflow, *arguments).end()

    def picture(self, path: str) -> Image.Image:
        with Image.open(self.path / path) as picture:
            return picture.convert("RGB")

    def saved(self) -> list[str]:
        output = self.path / "output"
        return sorted(path.name for path in output.iterdir()) if output.exists() else []


@pytest.fixture
def folder(fresh: ComfyUI, tmp_path: Path) -> Folder:
    return Folder(tmp_path, fresh.base_url)


@pytest.fixture(scope="module")
def old_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """One from before /api/jobs: a real checkout is as old as it is."""
    if "COMFYUI_DIR" in os.environ:
        pytest.skip("the stand-in plays the old version; a real checkout is run by the other tests")
    with boot(tmp_path_factory.mktemp("old"), "--like", "0.3.64") as server:
        yield server


@pytest.fixture(params=["comfyui", "old_comfyui"])
def any_age(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ComfyUI, Folder]:
    server: ComfyUI = request.getfixturevalue(request.param)
    server.forget_everything()
    return server, Folder(tmp_path, server.base_url)


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def photo(shift: int = 0) -> Image.Image:
    picture = Image.new("RGB", (23, 17))
    picture.putdata([((x * 11 + shift) % 256, (y * 15) % 256, (x * y) % 256) for y in range(17) for x in range(23)])
    return picture


def load_and_save(*prefixes: str) -> Workflow:
    """A LoadImage and a SaveImage for each."""
    workflow = {}
    for number, prefix in enumerate(prefixes, 1):
        workflow[f"{number}"] = node("LoadImage", image="")
        workflow[f"{number}0"] = save(f"{number}", prefix)
    return workflow


def slow(color: int = 1, seconds: float = 60.0) -> Workflow:
    sleep = node("StandinSleep", image=["1", 0], seconds=seconds, steps=max(1, round(seconds * 20)))
    return {"1": empty(color=color), "2": sleep, "9": save("2", "slow")}


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def is_color(picture: Image.Image, color: int) -> bool:
    return same(picture, Image.new("RGB", picture.size, tuple(color.to_bytes(3))))


def is_idle(server: ComfyUI) -> bool:
    return not any(server.get("/queue").json().values())


def running(server: ComfyUI) -> list[str]:
    return [item[1] for item in server.get("/queue").json()["queue_running"]]


def assert_one_error(ended: Ended, code: int, *said: str) -> None:
    assert (ended.code, len(ended.errors)) == (code, 1), ended
    assert [text for text in said if text not in ended.errors[0]] == [], ended.errors[0]


# --- which server it is ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def site(status: int, body: str) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Something that answers everything alike: its URL, and what it was asked with which Authorization."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((f"{self.command} {self.path}", self.headers["Authorization"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_comfyui_is_recognised_by_what_it_answers_and_needs_no_key(folder: Folder) -> None:
    folder.url += "/"
    ended = folder.job({"1": empty(5, 3, color=0x0A80FE), "2": save("1", "out")})
    assert (ended.code, ended.out) == (SAVED, "output/out_00001_.png\n"), ended.err
    assert same(folder.picture("output/out_00001_.png"), Image.new("RGB", (5, 3), (0x0A, 0x80, 0xFE)))


@pytest.mark.parametrize(("status", "body"), [(404, ""), (200, "{}"), (405, "not allowed")])
def test_another_server_is_taken_for_an_endpoint_api(tmp_path: Path, status: int, body: str) -> None:
    with site(status, body) as (url, asked):
        ended = Folder(tmp_path, url).job({"1": empty(), "2": save("1")})
    assert_one_error(ended, BAD_INPUT, "name the endpoint with --endpoint")
    assert asked == [("GET /system_stats", None)]


def test_a_page_where_comfyui_should_be_is_told(tmp_path: Path) -> None:
    with site(200, "<!DOCTYPE html><title>Log in</title>") as (url, asked):
        ended = Folder(tmp_path, url).job({"1": empty(), "2": save("1")})
    assert_one_error(ended, PLATFORM, "no ComfyUI answers", "not JSON", "tunnel")
    assert len(asked) == 1


def test_nothing_at_the_address_is_told_with_the_tunnel(tmp_path: Path) -> None:
    ended = Folder(tmp_path, f"http://127.0.0.1:{free_port()}").job({"1": empty(), "2": save("1")})
    assert_one_error(ended, PLATFORM, "Connection refused", "is the tunnel up")
    assert ended.out == ""


@pytest.mark.parametrize("option", [("--format", "webp"), ("--sync",), ("--format", "jpeg", "--quality", "80")])
def test_wishes_that_only_a_worker_can_fulfil_are_refused(folder: Folder, option: tuple[str, ...]) -> None:
    assert_one_error(folder.job({"1": empty(), "2": save("1")}, *option), BAD_INPUT, option[0], "ComfyUI itself")


def test_a_named_endpoint_is_never_comfyui(folder: Folder, comfyui: ComfyUI) -> None:
    ended = folder.job({"1": empty(), "2": save("1")}, "--endpoint", "abc")
    assert_one_error(ended, BAD_INPUT, "RUNPOD_API_KEY")
    assert comfyui.get("/history").json().keys() == set()


# --- pictures and files that go in -----------------------------------------------------------------------------------


def test_two_pictures_of_one_name_beside_a_third_that_is_there_already(folder: Folder, comfyui: ComfyUI) -> None:
    photo(99).save(comfyui.input / "in.png")
    before = (comfyui.input / "in.png").read_bytes()
    (folder.path / "other").mkdir()
    photo(1).save(folder.path / "in.png")
    photo(2).save(folder.path / "other" / "in.png")
    listing = []
    for _ in range(2):
        ended = folder.job(load_and_save("first", "second"), "--img", "in.png", "other/in.png")
        assert ended.code == SAVED, ended.err
        first, second = sorted(ended.out.splitlines())
        assert same(folder.picture(first), photo(1))
        assert same(folder.picture(second), photo(2))
        assert (comfyui.input / "in.png").read_bytes() == before
        listing.append(sorted(path.name for path in comfyui.input.iterdir()))
    assert len(listing[0]) == 3
    assert listing[0] == listing[1], "what is there already was stored once more"


@pytest.mark.parametrize("name", ["mit Leerzeichen & ü+#%.png", "[output].png", "a'b.PNG", "semi;colon.png"])
def test_a_picture_of_any_name_arrives(folder: Folder, name: str) -> None:
    photo(3).save(folder.path / name, "PNG")
    ended = folder.job(load_and_save("out"), "--img", name)
    assert ended.code == SAVED, ended.err
    assert same(folder.picture(ended.out.strip()), photo(3))


def test_a_mask_and_a_turned_photograph_arrive_upright(folder: Folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(folder.path / "turned.png", exif=exif)
    workflow = load_and_save("out")
    workflow["1"] = node("LoadImageMask", image="", channel="red")
    workflow["2"] = node("MaskToImage", mask=["1", 0])
    workflow["10"] = save("2")
    ended = folder.job(workflow, "--img", "turned.png")
    assert (ended.code, "turned.png: upright" in ended.err) == (SAVED, True), ended.err
    red = ImageOps.exif_transpose(Image.open(folder.path / "turned.png")).getchannel("R")
    difference = ImageChops.difference(folder.picture(ended.out.strip()).getchannel("R"), red)
    assert difference.size == (17, 23)
    assert difference.getextrema()[1] <= 1  # type: ignore[operator]


def test_a_picture_that_comfyui_has_is_used_when_it_is_kept_on_purpose(folder: Folder, comfyui: ComfyUI) -> None:
    photo(5).save(comfyui.input / "theirs.png")
    workflow = load_and_save("out")
    workflow["1"]["inputs"]["image"] = "theirs.png"
    assert_one_error(folder.job(workflow), BAD_INPUT, "theirs.png", "--keep-images")
    ended = folder.job(workflow, "--keep-images")
    assert same(folder.picture(ended.out.strip()), photo(5))


def test_sound_and_video_go_in_by_file_and_come_back(folder: Folder) -> None:
    with wave.open(str(folder.path / "tone.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    frames = {"1": empty(64, 64, batch_size=3), "2": node("CreateVideo", images=["1", 0], fps=8.0)}
    video = node("SaveVideo", video=["2", 0], filename_prefix="clip", format="auto", codec="auto")
    made = folder.job({**frames, "3": video})
    assert made.code == SAVED, made.err
    clip = made.out.strip()
    assert (clip.endswith(".mp4"), (folder.path / clip).read_bytes()[4:8]) == (True, b"ftyp")
    workflow = {
        "1": node("LoadAudio", audio=""),
        "2": node("LoadVideo", file=""),
        "3": node("SaveAudio", audio=["1", 0], filename_prefix="tone"),
        "4": node("SaveVideo", video=["2", 0], filename_prefix="again", format="auto", codec="auto"),
    }
    ended = folder.job(workflow, "--file", clip, "tone.wav")  # each to the loader of its kind
    assert ended.code == SAVED, ended.err
    contents = {Path(line).name[:4]: (folder.path / line).read_bytes() for line in ended.out.splitlines()}
    assert (contents["tone"][:4], contents["agai"][4:8]) == (b"fLaC", b"ftyp")


def test_an_address_instead_of_a_file_is_refused(folder: Folder) -> None:
    ended = folder.job(load_and_save("out"), "--img", "https://pictures.example/a.png")
    assert_one_error(ended, BAD_INPUT, "takes no URLs", "a.png")


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_same_workflow_gives_its_picture_each_time_also_when_its_files_are_gone(
    any_age: tuple[ComfyUI, Folder],
) -> None:
    server, folder = any_age
    photo(4).save(folder.path / "in.png")
    workflow = load_and_save("out") | {"2": node("ImageInvert", image=["1", 0]), "3": save("1", "out")}
    workflow["10"]["inputs"]["images"] = ["2", 0]
    for number in range(3):
        ended = folder.job(workflow, "--img", "in.png", "--keep-seeds")
        assert ended.code == SAVED, ended.err
        paths = ended.out.splitlines()
        assert len(paths) == 2
        found = [folder.picture(path) for path in paths]
        assert [same(picture, photo(4)) for picture in found].count(True) == 1
        if number:
            for path in server.output.iterdir():
                path.unlink()
    assert len(folder.saved()) == 6, "none was saved over another"


def test_a_picture_is_made_again_from_run_json(folder: Folder, comfyui: ComfyUI) -> None:
    photo(6).save(folder.path / "in.png")
    workflow = load_and_save("out")
    workflow["1"]["inputs"]["seed"] = 5
    first = folder.job(workflow, "--img", "in.png", "--save-run", "--json").told
    assert first["seeds"]["1.seed"] != 5
    run = next(path for path in first["saved"] if path.endswith("run.json"))
    photo(98).save(comfyui.input / "in.png")
    again = folder.run("--workflow", run, "--keep-seeds", "--json").told
    assert (again["ok"], again["seeds"]) == (True, first["seeds"])
    assert same(folder.picture(again["saved"][0]), photo(6))


def test_saved_pictures_of_every_node_come_in_order_and_previews_do_not(folder: Folder) -> None:
    colors = {"first": 0x10, "second": 0x2000, "third": 0x300000}
    workflow: Workflow = {"1": node("PreviewImage", images=["30", 0])}
    for number, (prefix, color) in enumerate(colors.items(), 3):
        workflow[f"{number}0"] = empty(color=color, batch_size=2)
        workflow[f"{number}"] = save(f"{number}0", f"a b/ü+&#'{prefix}")
    ended = folder.job(workflow)
    assert ended.code == SAVED, ended.err
    names = [f"output/ü+&#'{prefix}_0000{number}_.png" for prefix in colors for number in (1, 2)]
    assert sorted(ended.out.splitlines()) == sorted(names)
    for name in names:
        assert is_color(folder.picture(name), next(color for prefix, color in colors.items() if prefix in name))


def test_previews_are_saved_where_nothing_else_is(folder: Folder) -> None:
    ended = folder.job({"1": empty(color=0x123456), "2": node("PreviewImage", images=["1", 0])})
    assert (ended.code, len(folder.saved())) == (SAVED, 1), ended.err
    assert is_color(folder.picture(ended.out.strip()), 0x123456)


def test_texts_are_printed_and_are_enough(folder: Folder) -> None:
    words = {"1": node("PrimitiveString", value="a cat, ü"), "2": node("PreviewAny", source=["1", 0])}
    for _ in range(2):
        ended = folder.job(words)
        assert (ended.code, ended.out) == (SAVED, "a cat, ü\n"), ended.err


def test_files_of_every_kind_come_back_and_texts_as_the_worker_gives_them(folder: Folder) -> None:
    files = {"mesh/a.glb": b"glTF", "b.csv": b"1,2", "c.webm": b"\x1aE", "d.txt": b"d"}
    said = {
        "3d": [{"filename": "a.glb", "subfolder": "mesh", "type": "output"}],
        "gifs": [{"filename": "c.webm", "subfolder": "", "type": "output"}, {"filename": "c.webm", "type": "output"}],
        "files": [{"filename": "b.csv", "type": "output"}],
        "text": ["two", 2, ["nested", 2.5]],
        "string": ["alone"],
        "bytes": [1, None, {"filename": "", "type": "output"}, {"other": 5}],
    }
    contents = {name: base64.b64encode(content).decode() for name, content in files.items()}
    ended = folder.job({"1": node("StandinFiles", files=json.dumps(contents), ui=json.dumps(said))}, "--json")
    assert ended.code == SAVED, ended.err
    assert {path: (folder.path / path).read_bytes() for path in ended.told["saved"]} == {
        "output/a.glb": b"glTF",
        "output/b.csv": b"1,2",
        "output/c.webm": b"\x1aE",
    }
    assert ended.told["texts"] == ["two", "2", "nested", "2.5", "alone"]


def test_a_saved_file_that_is_gone_is_told_and_the_others_are_kept(folder: Folder, comfyui: ComfyUI) -> None:
    assert comfyui.post("/_fault", {"kind": "file_missing"}).status_code == 200
    assert comfyui.post("/_fault", {"kind": "file_empty"}).status_code == 200
    ended = folder.job({"1": empty(color=7, batch_size=3), "2": save("1", "out")})
    assert (ended.code != SAVED, len(ended.errors), ended.out.count("\n")) == (True, 2, 1), ended
    assert is_color(folder.picture(ended.out.strip()), 7)


def test_debug_says_where_to_look(folder: Folder, comfyui: ComfyUI) -> None:
    ended = folder.job({"1": empty(), "2": save("1")}, "--debug")
    (prompt_id,) = comfyui.get("/history").json()
    assert f"debug.prompt_id: {prompt_id}" in ended.err.splitlines()
    assert any(line.startswith("executionTime: ") for line in ended.err.splitlines())


def test_repeated_jobs_have_seeds_of_their_own(folder: Folder) -> None:
    workflow = {"1": empty(), "2": save("1")}
    workflow["1"]["inputs"]["seed"] = 0
    counted = folder.job(workflow, "--repeat", "3", "--seed", "7", "--json")
    drawn = folder.job(workflow, "--repeat", "3", "--json")
    assert (counted.code, drawn.code) == (SAVED, SAVED), counted.err + drawn.err
    seeds = []
    for told in counted.told["jobs"] + drawn.told["jobs"]:
        (path,) = told["saved"]
        with Image.open(folder.path / path) as picture:
            seeds.append(json.loads(picture.info["prompt"])["1"]["inputs"]["seed"])
        assert told["seeds"] == {"1.seed": seeds[-1]}
    assert (seeds[:3], len(set(seeds)), len(folder.saved())) == ([7, 8, 9], 6, 6)


def checkpoint(server: ComfyUI) -> dict[str, Any]:
    """The node that loads one: of the stand-in without a file, of a real checkout the first that it has."""
    if server.get("/system_stats").json()["system"].get("stand_in"):
        return node("StandinCheckpoint")
    described = server.get("/object_info/CheckpointLoaderSimple").json()["CheckpointLoaderSimple"]
    names = described["input"]["required"]["ckpt_name"][0]
    if not names:
        pytest.skip("the checkout has no checkpoint")
    return node("CheckpointLoaderSimple", ckpt_name=names[0])


def test_words_and_seed_make_the_picture_and_the_same_ones_make_it_again(folder: Folder, comfyui: ComfyUI) -> None:
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    sampler = {"seed": 1, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    workflow = {
        "3": node("KSampler", **sampler, **links),
        "4": checkpoint(comfyui),
        "5": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "6": node("CLIPTextEncode", text="", clip=["4", 1]),
        "7": node("CLIPTextEncode", text="", clip=["4", 1]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": save("8"),
    }

    def pictures(*arguments: str) -> list[bytes]:
        ended = folder.job(workflow, *arguments, "--json")
        assert ended.code == SAVED, ended.err
        told = ended.told.get("jobs", [ended.told])
        return [folder.picture(path).tobytes() for job in told for path in job["saved"]]

    words = ("--prompt", "a cat", "--negative", "blurry")
    (first,) = pictures(*words, "--seed", "7")
    assert pictures(*words, "--seed", "7") == [first]
    others = [
        *pictures("--prompt", "a dog", "--negative", "blurry", "--seed", "7"),
        *pictures("--prompt", "a cat", "--negative", "sharp", "--seed", "7"),
        *pictures(*words, "--repeat", "3"),
    ]
    assert len({first, *others}) == 6


def test_a_node_that_takes_no_further_input_gets_none(any_age: tuple[ComfyUI, Folder]) -> None:
    server, folder = any_age
    workflow = {"1": empty(color=0x654321), "2": node("StandinStrict", images=["1", 0], filename_prefix="strict")}
    for _ in range(2):
        ended = folder.job(workflow, "--json")
        assert (ended.code, "__job_nonce" in ended.err) == (SAVED, False), ended.err
        (path,) = ended.told["saved"]
        assert is_color(folder.picture(path), 0x654321)
        assert server.history(ended.told["job_id"])["status"]["completed"] is True, "the id is that of another prompt"
        for file in server.output.iterdir():
            file.unlink()


def test_a_node_that_takes_no_further_input_can_be_detached(folder: Folder) -> None:
    workflow = {"1": empty(color=0x654321), "2": node("StandinStrict", images=["1", 0], filename_prefix="strict")}
    job_id = folder.job(workflow, "--detach").out.strip()
    ended = folder.run("--resume", job_id)
    assert ended.code == SAVED, ended.err
    assert is_color(folder.picture(ended.out.strip()), 0x654321)


def test_a_node_that_takes_no_further_input_gives_its_picture_again_with_a_larger_cache(tmp_path: Path) -> None:
    if "COMFYUI_DIR" not in os.environ:
        pytest.skip("the stand-in has one kind of cache; a real checkout has this one")
    workflow = {"1": empty(color=0x456789), "2": node("StandinStrict", images=["1", 0], filename_prefix="strict")}
    with boot(tmp_path, "--cache-lru", "20") as server:
        for _ in range(2):
            folder = Folder(tmp_path, server.base_url)
            ended = folder.job(workflow, "--out", "saved")
            assert ended.code == SAVED, ended.err
            assert is_color(folder.picture(ended.out.strip()), 0x456789)
            for path in server.output.iterdir():
                path.unlink()


def test_a_saving_node_that_others_link_from_gives_its_picture_again(folder: Folder, comfyui: ComfyUI) -> None:
    tee = node("StandinTee", images=["1", 0], filename_prefix="tee")
    workflow = {"1": empty(color=0x112233), "2": tee, "3": save("2", "end")}
    for _ in range(2):
        ended = folder.job(workflow)
        assert (ended.code, ended.out.count("\n")) == (SAVED, 2), ended.err
        for path in comfyui.output.iterdir():
            path.unlink()


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_node_that_raises_is_named_with_the_reason(any_age: tuple[ComfyUI, Folder]) -> None:
    server, folder = any_age
    workflow = {"1": empty(), "2": save("1"), "9": save("1", "../evil")}
    assert_one_error(folder.job(workflow), JOB_FAILED, "[EXECUTION_FAILED]", "node 9 (SaveImage)", "output folder")
    server.post("/_fault", {"kind": "out_of_memory"})
    assert_one_error(
        folder.job({"5": empty(color=9), "9": save("5")}), JOB_FAILED, "node 5 (EmptyImage)", "OutOfMemory"
    )
    assert folder.saved() == []


def test_a_refused_workflow_names_the_node(any_age: tuple[ComfyUI, Folder]) -> None:
    _, folder = any_age
    unknown = {"1": node("NoSuchNode"), "2": save("1")}
    assert_one_error(folder.job(unknown), JOB_FAILED, "[PROMPT_REJECTED]", "NoSuchNode")
    wrong = {
        "1": empty(),
        "2": node("ImageScaleBy", image=["1", 0], upscale_method="magic", scale_by=2),
        "3": save("2"),
    }
    assert_one_error(folder.job(wrong), JOB_FAILED, "Node 2 (ImageScaleBy)", "upscale_method: 'magic' not in")
    assert_one_error(folder.job({"1": empty()}), JOB_FAILED, "[PROMPT_REJECTED]", "no outputs")
    loop = {"1": node("ImageInvert", image=["2", 0]), "2": node("ImageInvert", image=["1", 0]), "3": save("2")}
    assert_one_error(folder.job(loop), JOB_FAILED, "[PROMPT_REJECTED]")


def test_one_bad_branch_is_a_warning_and_the_other_is_saved(folder: Folder) -> None:
    workflow = {"1": empty(color=3), "2": save("1", "good"), "3": empty(width=-1), "4": save("3", "bad")}
    ended = folder.job(workflow, "--json")
    assert (ended.code, ended.told["saved"]) == (SAVED, ["output/good_00001_.png"]), ended.err
    (warning,) = ended.told["warnings"]
    assert "Node 3 (EmptyImage)" in warning
    assert f"warning: {warning}" in ended.err.splitlines()


def test_a_workflow_that_gives_nothing_has_failed(folder: Folder) -> None:
    ended = folder.job({"1": node("StandinFiles", files="{}", ui='{"images": []}')})
    assert_one_error(ended, JOB_FAILED, "[NO_OUTPUT]", "SaveImage")


def test_a_server_error_at_the_hand_over_is_told(folder: Folder, comfyui: ComfyUI) -> None:
    comfyui.post("/_fault", {"kind": "http_500", "path": "/prompt"})
    assert_one_error(folder.job({"1": empty(), "2": save("1")}), PLATFORM, "could not be handed over", "HTTP 500")
    assert comfyui.get("/history").json() == {}


def test_following_survives_server_errors(any_age: tuple[ComfyUI, Folder]) -> None:
    server, folder = any_age
    for path in ("/jobs", "/queue", "/history"):
        server.post("/_fault", {"kind": "http_500", "path": path, "times": 2})
    ended = folder.job(slow(4, seconds=0.5))
    assert (ended.code, ended.errors) == (SAVED, []), ended.err


# --- control ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def occupied(server: ComfyUI, color: int) -> Iterator[str]:
    """Another one's prompt that runs until the block ends, and is not disturbed by what happens in it."""
    prompt_id = post(server, slow(color), "another")
    wait_until(lambda: running(server) == [prompt_id], "the other prompt runs")
    yield prompt_id
    assert running(server) == [prompt_id]
    server.post("/interrupt", {"prompt_id": prompt_id})
    wait_until(lambda: is_idle(server), "ComfyUI is idle")


@pytest.mark.parametrize("ending", ["ctrl-c", "timeout"])
def test_a_running_prompt_ends_with_the_client(any_age: tuple[ComfyUI, Folder], ending: str) -> None:
    server, folder = any_age
    timeout = ("--timeout", "1.5") if ending == "timeout" else ()
    client = folder.start_job(slow(5), *timeout)
    if ending == "ctrl-c":
        client.until("in progress")
        client.interrupt()
    ended = client.end()
    assert (ended.code, len(ended.errors)) == ((TIMED_OUT, 1) if timeout else (INTERRUPTED, 0)), ended.err
    assert (is_idle(server), "is cancelled\n" in ended.err) == (True, True)
    ends = [entry["status"]["messages"][-1][0] for entry in server.get("/history").json().values()]
    # A busy machine may not have begun with it at the end of the time.
    assert ends == ["execution_interrupted"] or (ends == [] and timeout)


@pytest.mark.parametrize("ending", ["ctrl-c", "timeout"])
def test_a_waiting_prompt_is_taken_back_and_the_one_before_it_goes_on(
    any_age: tuple[ComfyUI, Folder], ending: str
) -> None:
    server, folder = any_age
    timeout = ("--timeout", "1.5") if ending == "timeout" else ()
    with occupied(server, 6):
        client = folder.start_job(slow(7), *timeout)
        client.until("waiting in the queue")
        if ending == "ctrl-c":
            client.interrupt()
        ended = client.end()
        assert ended.code == (TIMED_OUT if timeout else INTERRUPTED)
        assert "is cancelled\n" in ended.err
        assert server.get("/queue").json()["queue_pending"] == []


def test_a_node_that_hears_no_interrupt_is_waited_for(folder: Folder, comfyui: ComfyUI) -> None:
    comfyui.post("/_fault", {"kind": "hang", "seconds": 1.5, "after": 1})
    client = folder.start_job(slow(8))
    client.until("in progress")
    wait_until(lambda: any(fault["fired"] for fault in comfyui.get("/_fault").json()["armed"]), "the node hangs")
    client.interrupt()
    assert "is cancelled\n" in client.end().err
    assert is_idle(comfyui)


def test_a_node_that_does_not_let_go_is_told(folder: Folder, comfyui: ComfyUI) -> None:
    comfyui.post("/_fault", {"kind": "hang", "seconds": 3, "after": 1})
    client = folder.start_job(slow(8), program=("-c", IMPATIENT))
    client.until("in progress")
    wait_until(lambda: any(fault["fired"] for fault in comfyui.get("/_fault").json()["armed"]), "the node hangs")
    client.interrupt()
    ended = client.end()
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert "could not be cancelled and may still run" in warning
    assert "--timeout" not in warning, "that is not what has run out"
    comfyui.wait_idle()


def test_ctrl_c_ends_every_job_of_a_repetition(folder: Folder, comfyui: ComfyUI) -> None:
    client = folder.start_job(slow(9), "--repeat", "3", "--json")
    wait_until(lambda: [len(items) for items in comfyui.get("/queue").json().values()] == [1, 2], "one runs, two wait")
    client.interrupt()
    ended = client.end()
    assert (ended.code, len(ended.told["jobs"])) == (INTERRUPTED, 3)
    assert is_idle(comfyui)
    assert [told["state"] for told in ended.told["jobs"]] == ["CANCELLED"] * 3


def test_a_detached_prompt_is_resumed_and_cancelled_by_its_id(any_age: tuple[ComfyUI, Folder]) -> None:
    server, folder = any_age
    with occupied(server, 10):
        started = folder.job(slow(11), "--detach")
        job_id = started.out.strip()
        assert (started.code, [item[1] for item in server.get("/queue").json()["queue_pending"]]) == (SAVED, [job_id])
        cancelled = folder.run("--cancel", job_id)
        assert (cancelled.code, f"job {job_id} is cancelled\n" in cancelled.err) == (SAVED, True)
        assert server.get("/queue").json()["queue_pending"] == []
    assert_one_error(folder.run("--resume", job_id), PLATFORM, f"ComfyUI does not know job {job_id}")
    job_id = folder.job(slow(12), "--detach").out.strip()
    wait_until(lambda: running(server) == [job_id], "the prompt runs")
    assert folder.run("--cancel", job_id).code == SAVED
    assert is_idle(server)
    assert_one_error(folder.run("--resume", job_id), JOB_FAILED, "was cancelled")
    job_id = folder.job(slow(0x0C0D0E, seconds=0.5), "--detach").out.strip()
    resumed = folder.run("--resume", job_id)
    assert (resumed.code, is_color(folder.picture(resumed.out.strip()), 0x0C0D0E)) == (SAVED, True)
    late = folder.run("--cancel", job_id)
    assert (late.code, f"job {job_id} was already COMPLETED\n" in late.err) == (SAVED, True)
    assert_one_error(folder.run("--cancel", "no-such-prompt"), PLATFORM, "ComfyUI does not know job no-such-prompt")


def test_a_comfyui_that_dies_in_mid_job_is_told(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(boot(tmp_path))
        folder = Folder(tmp_path, server.base_url)
        impatient = folder.start_job(slow(13), program=("-c", IMPATIENT))
        impatient.until("in progress")
        patient = folder.start_job(slow(14))
        patient.until("waiting in the queue")
        server.process.send_signal(SIGKILL)
        server.process.wait()
        assert_one_error(impatient.end(), PLATFORM, "is out of sight and may still run", "Connection refused")
        port = int(server.base_url.rpartition(":")[2])
        with (tmp_path / "log").open("wb") as log:
            server.process = subprocess.Popen(command(tmp_path, port), cwd=directory(), stdout=log, stderr=log)
        assert_one_error(patient.end(), PLATFORM, "ComfyUI does not know job", "was it restarted")
