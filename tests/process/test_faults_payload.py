"""Inputs that are wrong, odd or large: rows L of FAULTS.md.

Of each row one job goes through the whole stack, further cases through the same handler in this process, on the same
RAM disk and ComfyUI: the SDK waits a second between two jobs.
"""

import base64
import io
import json
import struct
import time
import unicodedata
import urllib.error
import urllib.request
import wave
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from local.__main__ import ENDPOINT
from tests.process.fault_rows import EVERY, Row
from tests.process.in_process import InProcess, handler_of
from tests.process.stack import Driver, base64_of, invert_job, invert_workflow, job, picture_bytes

PHOTO = picture_bytes()
CODED = base64_of(PHOTO)
NODES = 100_000
NESTING = 1000


@pytest.fixture
def handler(worker: Driver) -> Iterator[InProcess]:
    with handler_of(worker) as handler:
        yield handler


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    picture = Image.effect_noise((64, 48), 80)
    return Image.merge("RGB", [picture, picture.rotate(90), picture.rotate(180)]).convert(mode)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def status_of(driver: Driver, body: str) -> tuple[int, str]:
    """HTTP status and job id with which the platform answers a request to run a job."""
    url = f"{driver.platform.api_url}/{ENDPOINT}/run"
    headers = {"Authorization": f"Bearer {driver.platform.api_key}", "Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers), timeout=60) as answer:
            return 200, json.load(answer)["id"]
    except urllib.error.HTTPError as error:
        return error.code, ""


def images(content: bytes | str, name: str = "a.png") -> dict[str, Any]:
    """A job whose one picture is sent as ``content`` (bytes, or Base64)."""
    coded = content if isinstance(content, str) else base64_of(content)
    return {"workflow": invert_workflow(name), "images": {name: coded}}


# --- the form of the input ---


@pytest.mark.fault("L1")
def test_an_input_that_is_no_object_is_refused(row: Row, worker: Driver, handler: InProcess) -> None:
    for job_input in (None, [], [invert_job()], "text", 5, True):
        row.fails(handler.run(job_input), "INPUT_INVALID", 'must be an object such as {"workflow": {...}}')
        assert status_of(worker, json.dumps({"input": job_input}))[0] == 400
    row.next_job_runs(worker)


@pytest.mark.fault("L2")
def test_a_workflow_in_another_wrapping_is_unwrapped_or_refused_by_name(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    workflow = invert_workflow()
    ui_format = {"nodes": [{"id": 1, "type": "LoadImage"}], "links": [], "version": 0.4}
    row.fails(worker.run(job(ui_format)), "WORKFLOW_INVALID", "UI format", "Export (API)")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"images": {}}, "has no 'workflow'; send the graph"),
        (job(None), "has no 'workflow'; send the graph"),  # type: ignore[arg-type]
        (job({}), "must hold at least one node"),
        (job([workflow]), "not a list; send the graph"),  # type: ignore[arg-type]
        (job(json.dumps(workflow)), "send the JSON object itself, not its text"),  # type: ignore[arg-type]
        (job({"workflow": ui_format}), "export it with Workflow > Export (API)"),
        (job({"input": {"workflow": workflow}}), "send what stands under its 'input'"),
        ({"input": job(workflow)}, "send what stands under it"),
        ({"prompt": workflow}, "send the graph under 'workflow'"),
        (workflow, 'send it as {"workflow": {...}}'),
        (ui_format, "send it under 'workflow'"),
    ]
    for job_input, words in refused:
        row.fails(handler.run(job_input), "WORKFLOW_INVALID", words)
    for wrapper in ("prompt", "workflow"):
        row.succeeds(handler.run(job({wrapper: workflow, "client_id": "x"})))
    row.next_job_runs(worker)


@pytest.mark.fault("L3")
def test_a_name_that_could_lead_elsewhere_is_refused_and_any_script_is_taken(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    names = ["../a.png", "a/../../b.png", "/etc/a.png", "a\0.png", "a\\b.png", ".a.png", "a" * 256, "/".join("a" * 9)]
    row.fails(worker.run(invert_job(files={names[0]: CODED})), "INPUT_INVALID", "stay inside")
    for name in names[1:]:
        row.fails(handler.run(invert_job(files={name: CODED})), "INPUT_INVALID", "The file name")
    composed, decomposed = (unicodedata.normalize(form, "Bücher.png") for form in ("NFC", "NFD"))
    same = invert_job(files={composed: CODED, decomposed: CODED})
    row.fails(handler.run(same), "INPUT_INVALID", "Two files are named")
    for name in (composed, decomposed, "写真/фото 1.png", "a" * 251 + ".png"):
        row.succeeds(handler.run(images(PHOTO, name)))
    row.next_job_runs(worker)


# --- the content of files ---


@pytest.mark.fault("L4")
def test_every_spelling_of_base64_is_taken_and_anything_else_refused(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    row.fails(worker.run(images(CODED[:-7] + "!" + CODED[-6:])), "MEDIA_INVALID", "not valid Base64")
    row.fails(handler.run(images("data:text/plain,hello")), "MEDIA_INVALID", "not valid Base64")
    row.fails(handler.run(images(CODED[: len(CODED) // 8 * 4 + 1])), "MEDIA_INVALID", "may have been cut")
    lines = "\r\n".join(CODED[start : start + 76] for start in range(0, len(CODED), 76))
    url_safe = base64.urlsafe_b64encode(PHOTO).decode()
    assert set(url_safe) & {"-", "_"}
    for spelling in (f"data:image/png;base64,{CODED}", lines, url_safe, f"  {CODED}\n", CODED.rstrip("=")):
        row.succeeds(handler.run(images(spelling)))
    row.next_job_runs(worker)


@pytest.mark.fault("L5")
def test_what_is_no_picture_is_refused(row: Row, worker: Driver, handler: InProcess) -> None:
    row.fails(worker.run(images(b"<svg></svg>")), "MEDIA_INVALID", "'a.png' is not an image", "under 'files'")
    for content in (b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\x04\0\0\0WEBP", b"GIF89a"):
        row.fails(handler.run(images(content)), "MEDIA_INVALID", "'a.png'")
    row.fails(handler.run(images("")), "MEDIA_INVALID", "is empty")
    row.next_job_runs(worker)


@pytest.mark.fault("L6")
def test_a_picture_that_was_cut_is_refused(row: Row, worker: Driver, handler: InProcess) -> None:
    forms: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
    ]
    row.fails(worker.run(images(PHOTO[:-1])), "MEDIA_INVALID", "'a.png' is damaged or cut short")
    for form, options in forms:
        whole = encoded(noise(), form, **options)
        for kept in (len(whole) // 2, len(whole) * 99 // 100, len(whole) - 2, len(whole) - 1):
            row.fails(handler.run(images(whole[:kept])), "MEDIA_INVALID", f"({kept} bytes arrived)")
    row.next_job_runs(worker)


@pytest.mark.fault("L7")
def test_a_flipped_byte_in_a_png_is_found(row: Row, worker: Driver) -> None:
    damaged = bytearray(PHOTO)
    damaged[len(PHOTO) // 2] ^= 1
    row.fails(worker.run(images(bytes(damaged))), "MEDIA_INVALID", "'a.png' is damaged or cut short")
    row.next_job_runs(worker)


@pytest.mark.fault("L8")
def test_a_decompression_bomb_is_refused_by_its_header(row: Row, worker: Driver) -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1_000_000))
    bomb = PHOTO[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    row.fails(worker.run(images(bomb)), "MEDIA_INVALID", "has more than 178956970 pixels")
    row.next_job_runs(worker)


@pytest.mark.fault("L9")
def test_pictures_of_every_kind_reach_comfyui_byte_for_byte(row: Row, worker: Driver, handler: InProcess) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # EXIF: turn it a quarter clockwise
    more = {"save_all": True, "append_images": [noise()]}
    odd = {
        "animated.gif": encoded(noise("P"), "GIF", save_all=True, append_images=[noise("P")]),
        "animated.png": encoded(noise(), "PNG", **more),
        "animated.webp": encoded(noise(), "WEBP", **more),
        "several.jpg": encoded(noise(), "MPO", **more),
        "deep.png": encoded(Image.frombytes("I;16", (64, 48), bytes(range(256)) * 24), "PNG"),
        "print.jpg": encoded(noise("CMYK"), "JPEG"),
        "turned.jpg": encoded(noise(), "JPEG", exif=turned),
        "trailing.jpg": encoded(noise(), "JPEG") + b"appended by a phone",
    }
    every = invert_job(debug=True)
    every["images"] |= {name: base64_of(content) for name, content in odd.items()}
    row.succeeds(worker.run(every))
    assert {name: (worker.ramdisk / "input" / name).read_bytes() for name in odd} == odd
    for name, content in odd.items():
        answer = handler.run(images(content, name))
        assert answer["status"] == "COMPLETED", answer
        assert answer["output"]["images"]
    row.next_job_runs(worker)


@pytest.mark.fault("L10")
def test_a_picture_of_50_mb_is_taken(row: Row, worker: Driver, handler: InProcess) -> None:
    start = PHOTO.index(b"IDAT") - 4
    large = PHOTO[:start] + png_chunk(b"prVt", bytes(50_000_000)) + PHOTO[start:]
    row.succeeds(handler.run({**images(large), "debug": True}))
    assert (worker.ramdisk / "input" / "a.png").read_bytes() == large
    answer = handler.run(images(large))
    row.succeeds(answer)
    row.seconds = sum(answer["output"]["timings_ms"].values()) / 1000
    row.next_job_runs(worker)


# --- files that the workflow names ---


@pytest.mark.fault("L11")
def test_a_loader_of_a_file_that_was_not_sent_is_refused_before_comfyui_is_asked(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    worker.fault("http_hang", path="/prompt", seconds=0, times=EVERY)  # counts the requests
    mistyped = {"workflow": invert_workflow("foto.png"), "images": {"photo.png": CODED, "z.png": CODED}}
    mistyped["workflow"]["1"]["_meta"] = {"title": "The room"}
    words = (
        """Node 1 "The room" (LoadImage): image names 'foto.png', which was not sent; sent were 'photo.png', 'z.png'."""
    )
    row.fails(worker.run(mistyped), "WORKFLOW_INVALID", words)
    for name in ("../output/a.png", "/etc/hostname", "sub/../../a.png", "../run/comfyui [output]"):
        row.fails(handler.run(job(invert_workflow(name))), "WORKFLOW_INVALID", "outside the input directory")
    wrapped = job(invert_workflow())
    wrapped["workflow"]["1"]["inputs"]["image"] = {"__value__": "/etc/hostname"}
    row.fails(handler.run(wrapped), "WORKFLOW_INVALID", "outside the input directory")
    row.fails(handler.run(job(invert_workflow("a.png [output]"))), "WORKFLOW_INVALID", "output directory is empty")
    row.fails(handler.run({"workflow": invert_workflow()}), "WORKFLOW_INVALID", "no file was sent")
    linked = invert_workflow()
    linked["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "/etc/hostname"}}
    linked["1"]["inputs"]["image"] = ["text", 0]
    row.fails(handler.run(job(linked)), "WORKFLOW_INVALID", "'/etc/hostname', which is outside the input directory")
    for class_type, name in (("LoadImageMask", "image"), ("LoadAudio", "audio"), ("LoadVideo", "file")):
        loads = invert_workflow()
        loads["4"] = {"class_type": class_type, "inputs": {name: "b", "channel": "red"}}
        loads["5"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}}
        row.fails(handler.run(job(loads)), "WORKFLOW_INVALID", f"Node 4 ({class_type}): {name} names 'b'")
    assert worker.strikes("http_hang") == 0
    row.next_job_runs(worker)


@pytest.mark.fault("L11")
def test_a_loader_that_nothing_needs_fails_no_job(row: Row, worker: Driver, handler: InProcess) -> None:
    workflow = invert_workflow("./a.png [input]")
    workflow["4"] = {"class_type": "LoadImage", "inputs": {"image": "b.png"}}
    workflow["5"] = {"class_type": "ImageInvert", "inputs": {"image": ["4", 0]}}
    (warning,) = row.succeeds(worker.run(job(workflow)))["warnings"]
    assert warning.startswith("Node 4 (LoadImage): image names 'b.png', which was not sent")
    workflow["4"]["inputs"]["image"] = "../b.png"
    row.fails(handler.run(job(workflow)), "WORKFLOW_INVALID", "outside the input directory")
    row.next_job_runs(worker)


@pytest.mark.fault("L12")
def test_a_prefix_that_leaves_the_output_directory_is_refused_before_the_run(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    worker.fault("http_hang", path="/prompt", seconds=0, times=EVERY)  # counts the requests
    answer = worker.run(job(invert_workflow(prefix="../../outside")))
    row.fails(answer, "WORKFLOW_INVALID", "Node 3 (SaveImage): filename_prefix is '../../outside'")
    for prefix in ("/tmp/x", "a/../../x", "%year%/../../x", f"{worker.ramdisk}/output/x", "//x"):
        row.fails(handler.run(job(invert_workflow(prefix=prefix))), "WORKFLOW_INVALID", "leaves the output directory")
    linked = invert_workflow()
    linked["text"] = {"class_type": "PrimitiveString", "inputs": {"value": "../x"}}
    linked["4"] = {"class_type": "SaveImageDataSetToFolder", "inputs": {"images": ["2", 0], "folder_name": ["text", 0]}}
    row.fails(handler.run(job(linked)), "WORKFLOW_INVALID", "folder_name is '../x', which leaves the output directory")
    assert worker.strikes("http_hang") == 0
    for prefix in ("a/../x", "./x", "%width%/x", "a b/ü"):
        row.succeeds(handler.run(job(invert_workflow(prefix=prefix))))
    row.next_job_runs(worker)


# --- size and depth ---


@pytest.mark.fault("L13")
def test_an_input_of_a_thousand_levels_is_refused_in_a_sentence(row: Row, worker: Driver, handler: InProcess) -> None:
    deep = invert_job(deep="HERE")
    deep["workflow"]["3"]["inputs"]["odd"] = "HERE"
    body = json.dumps({"input": deep})

    def nested(opening: str, levels: int, closing: str) -> str:
        return body.replace('"HERE"', opening * levels + "1" + closing * levels)

    for opening, closing in (("[", "]"), ('{"a":', "}")):
        assert status_of(worker, nested(opening, 100_000, closing))[0] == 400  # the platform itself
        row.succeeds(handler.run(json.loads(nested(opening, 90, closing))["input"]))
    status, job_id = status_of(worker, nested("[", NESTING, "]"))
    assert status == 200
    row.fails(worker.finish(job_id), "INPUT_INVALID", "nested too deeply")
    row.next_job_runs(worker)


@pytest.mark.fault("L13")
def test_a_workflow_of_100_000_nodes_costs_no_seconds(row: Row, worker: Driver, handler: InProcess) -> None:
    few = {**invert_workflow(), "3": {"class_type": "SaveImageWebsocket", "inputs": {"images": ["2", 0]}}}
    wide = {str(number): few["2"] for number in range(4, NODES)}
    started = time.process_time()
    row.succeeds(handler.run(job({**few, **wide})))
    loaders = {str(number): {"class_type": "LoadImage", "inputs": {"image": "b"}} for number in range(4, NODES)}
    needs_all = {"class_type": "PreviewAny", "inputs": {number: [number, 0] for number in loaders}}
    answer = handler.run(job({**few, **loaders, "last": needs_all}))
    row.fails(answer, "WORKFLOW_INVALID", f"{len(loaders) - 5} more files")
    unknown = {str(number): {"class_type": f"C{number}", "inputs": {}} for number in range(NODES)}
    row.fails(handler.run(job(unknown)), "WORKFLOW_INVALID", f"nodes of {NODES} classes")
    row.seconds = time.process_time() - started
    row.next_job_runs(worker)


# --- the rest ---


@pytest.mark.fault("L14")
def test_an_unknown_key_is_a_warning_with_the_nearest_one(row: Row, worker: Driver) -> None:
    result = row.succeeds(worker.run(invert_job(debgu=True, webhook="x")))
    assert result["warnings"] == [
        "The input key 'debgu' is unknown and was ignored; did you mean 'debug'?",
        "The input key 'webhook' is unknown and was ignored.",
    ]
    assert "debug" not in result
    row.next_job_runs(worker)


@pytest.mark.fault("L15")
def test_video_and_audio_are_read_from_files(row: Row, worker: Driver, handler: InProcess) -> None:
    workflow = invert_workflow()
    saves = {"filename_prefix": "clip", "format": "auto", "codec": "auto"}
    workflow["4"] = {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 4}}
    workflow["8"] = {"class_type": "SaveVideo", "inputs": {"video": ["4", 0], **saves}}
    (video,) = handler.run(job(workflow))["output"]["videos"]
    sound = io.BytesIO()
    with wave.open(sound, "wb") as written:
        written.setparams((1, 2, 8000, 0, "NONE", ""))
        written.writeframes(bytes(8000))
    files = {"clip.mp4": video["data"], "sub/sound.wav": base64_of(sound.getvalue())}
    workflow["4"] = {"class_type": "LoadVideo", "inputs": {"file": "clip.mp4"}}
    workflow["5"] = {"class_type": "LoadAudio", "inputs": {"audio": "sub/sound.wav"}}
    workflow["9"] = {"class_type": "SaveAudio", "inputs": {"audio": ["5", 0], "filename_prefix": "sound"}}
    result = row.succeeds(worker.run(job(workflow, files=files)))
    assert [item["media_type"] for item in result["videos"] + result["audio"]] == ["video/mp4", "audio/flac"]
    row.fails(handler.run(invert_job(files={"../clip.mp4": "AAAA"})), "INPUT_INVALID", "stay inside")
    row.next_job_runs(worker)


# --- workflows that end ComfyUI's prompt worker ---


@pytest.mark.fault("L16")
def test_a_link_to_a_node_that_is_not_there_does_not_reach_comfyui(
    row: Row, worker: Driver, handler: InProcess
) -> None:
    pid = worker.comfyui_pid()
    workflow = invert_workflow()
    workflow["3"]["inputs"]["odd"] = ["4", 0]
    answer = worker.run(job(workflow))
    row.fails(
        answer, "WORKFLOW_INVALID", "Node 3 (SaveImage): 'odd' is linked to node '4', which the workflow does not"
    )
    workflow = invert_workflow()
    workflow["5"] = {"class_type": "ImageInvert", "inputs": {"image": ["4", 0]}}
    row.succeeds(handler.run(job(workflow)))  # no output node depends on it
    row.next_job_runs(worker)
    assert worker.comfyui_pid() == pid


@pytest.mark.fault("L17")
def test_a_chain_that_is_too_long_does_not_reach_comfyui(row: Row, worker: Driver, handler: InProcess) -> None:
    pid = worker.comfyui_pid()

    def chain(length: int) -> dict[str, Any]:
        links = {
            str(n): {"class_type": "ImageInvert", "inputs": {"image": [str(n - 1), 0]}} for n in range(5, length + 4)
        }
        first = {"4": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
        return job({**invert_workflow(), **first, **links})

    row.fails(worker.run(chain(1000)), "WORKFLOW_INVALID", "a chain of 1000 nodes", "500 at most")
    row.succeeds(handler.run(chain(500)))
    row.next_job_runs(worker)
    assert worker.comfyui_pid() == pid
