"""What goes in: both request forms, every way to get it wrong. What comes out: always something that can be posted.

PARSER_EXAMPLES=10000 makes more random inputs, `--hypothesis-show-statistics` counts the answers.
"""

import base64
import io
import json
import math
import os
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from worker.errors import InputInvalid, MediaInvalid, WorkerError, WorkflowInvalid
from worker.https_url import HttpsUrl
from worker.input_files import InputFile, UrlInput
from worker.payload import OutputFormat, json_safe, parse_job_input


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(stream, "PNG")
    return stream.getvalue()


PNG = png()
CODED = base64.b64encode(PNG).decode()
WORKFLOW = {"1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}}}
EXAMPLES = int(os.environ.get("PARSER_EXAMPLES", "400"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)

GRAPHS = st.dictionaries(
    st.text(),
    st.fixed_dictionaries({"class_type": st.text(min_size=1), "inputs": st.dictionaries(st.text(), JSON, max_size=2)}),
    min_size=1,
    max_size=3,
)
NAMES = st.sampled_from(["a.png", "sub/a.png", "../a.png"]) | st.text()


def nested(levels: int, innermost: object = 1) -> object:
    value = innermost
    for _ in range(levels):
        value = [value]
    return value


def saver(prefix: object) -> dict[str, Any]:
    return {"3": {"class_type": "SaveImage", "inputs": {"filename_prefix": prefix}}}


def job(**more: Any) -> dict[str, Any]:
    return {"workflow": WORKFLOW, **more}


@pytest.mark.parametrize(
    "images",
    [
        {"a.png": CODED},
        [{"name": "a.png", "image": CODED}],
        {"a.png": f"data:image/png;base64,{CODED}"},
        [{"name": "a.png", "image": f"DATA:image/png;base64,{CODED}"}],
        {"a.png": "\n".join(CODED[start : start + 20] for start in range(0, len(CODED), 20))},
        {"a.png": base64.urlsafe_b64encode(PNG).decode()},
        {"a.png": CODED.rstrip("=")},
    ],
)
def test_all_forms_of_an_image_are_one_thing(images: object) -> None:
    assert parse_job_input(job(images=images)).files == (InputFile("a.png", PNG),)


def test_the_url_safe_alphabet_is_the_other_one_with_two_letters_changed() -> None:
    content = b"\xfb\xff\xbe\xfb"  # "+/+++w=="
    for coded in (base64.b64encode(content), base64.urlsafe_b64encode(content)):
        assert parse_job_input(job(files={"a": coded.decode()})).files == (InputFile("a", content),)


def test_files_are_decoded_and_not_looked_into() -> None:
    request = parse_job_input(job(images={"a.png": CODED}, files={"clip.mp4": base64.b64encode(b"video").decode()}))
    assert request.files == (InputFile("a.png", PNG), InputFile("clip.mp4", b"video"))


def test_urls_are_kept_beside_the_files_where_they_are_allowed() -> None:
    url = "https://pictures.example/a.png?sig=1"
    images = [{"name": "a.png", "image": url}, {"name": "b.png", "image": CODED}]
    request = parse_job_input(job(images=images, files={"c.mp4": url.upper()}), allow_urls=True)
    assert request.files == (InputFile("b.png", PNG),)
    assert request.urls == (
        UrlInput("a.png", HttpsUrl("pictures.example", 443, "/a.png?sig=1"), is_image=True),
        UrlInput("c.mp4", HttpsUrl("pictures.example", 443, "/A.PNG?SIG=1"), is_image=False),
    )
    for clash in ({"a.png": url}, {"b.png": url}, {"a.png/x": url}):
        with pytest.raises(InputInvalid):
            parse_job_input(job(images=images, files=clash), allow_urls=True)


def test_the_rest_of_the_input_is_read() -> None:
    request = parse_job_input(job(debug=True, timeout_s=2, comfy_org_api_key="k"))
    assert (request.debug, request.timeout_s, request.comfy_org_api_key) == (True, 2.0, "k")
    plain = parse_job_input(job())
    assert (plain.debug, plain.timeout_s, plain.comfy_org_api_key, plain.warnings) == (False, None, None, ())


@pytest.mark.parametrize("wrapper", ["prompt", "workflow"])
def test_a_wrapped_workflow_is_unwrapped(wrapper: str) -> None:
    assert parse_job_input({"workflow": {wrapper: WORKFLOW, "client_id": "x"}}).workflow == WORKFLOW


def test_an_unknown_key_is_a_warning_with_the_nearest_one() -> None:
    (warning,) = parse_job_input(job(debgu=True)).warnings
    assert "'debgu'" in warning
    assert "'debug'" in warning


def test_a_flood_of_unknown_keys_does_not_flood_the_result() -> None:
    warnings = parse_job_input(job(**{f"key-{number}": 1 for number in range(50_000)})).warnings
    assert warnings[-1].startswith(f"{50_000 - (len(warnings) - 1)} more unknown")
    assert sum(map(len, warnings)) < 10_000


@pytest.mark.parametrize(
    ("job_input", "error", "said"),
    [
        (None, InputInvalid, "must be an object"),
        ([], InputInvalid, "must be an object"),
        ({}, WorkflowInvalid, "no 'workflow'"),
        ({"worklfow": WORKFLOW}, InputInvalid, "did you mean 'workflow'?"),
        ({"workflow": None}, WorkflowInvalid, "no 'workflow'"),
        ({"workflow": {}}, WorkflowInvalid, "empty"),
        ({"workflow": []}, WorkflowInvalid, "not a list"),
        ({"workflow": 5}, WorkflowInvalid, "not a single value"),
        ({"workflow": json.dumps(WORKFLOW)}, WorkflowInvalid, "is a string; send the JSON object itself"),
        ({"workflow": {"input": {"workflow": WORKFLOW}}}, WorkflowInvalid, "holds a whole request"),
        ({"input": {"workflow": WORKFLOW}}, WorkflowInvalid, "holds another 'input'"),
        ({"prompt": WORKFLOW, "client_id": "x"}, WorkflowInvalid, "send the graph under 'workflow'"),
        ({"nodes": [], "links": []}, WorkflowInvalid, "UI format"),
        (WORKFLOW, WorkflowInvalid, "The input is the workflow itself"),
        (job(deep=nested(100_000)), InputInvalid, "may have 100 levels"),
        (job(deep=nested(99, {})), InputInvalid, "may have 100 levels"),
        (job(deep=json.loads('{"a":' * 500 + "1" + "}" * 500)), InputInvalid, "may have 100 levels"),
        ({"workflow": {str(n): {"class_type": f"C{n}", "inputs": {}} for n in range(1001)}}, WorkflowInvalid, "1001"),
        ({"workflow": saver("../../outside")}, WorkflowInvalid, "leaves the output directory"),
        ({"workflow": {"nodes": [], "links": [], "version": 0.4}}, WorkflowInvalid, "Export (API)"),
        ({"workflow": {"workflow": {"nodes": [], "links": []}}}, WorkflowInvalid, "Export (API)"),
        ({"workflow": {"7": {"inputs": {}}}}, WorkflowInvalid, "'7'"),
        ({"workflow": {"7": {"class_type": "", "inputs": {}}}}, WorkflowInvalid, "'7'"),
        ({"workflow": {"7": {"class_type": "X", "inputs": None}}}, WorkflowInvalid, "'inputs'"),
        ({"workflow": {"7" * 201: {"class_type": "X", "inputs": {}}}}, WorkflowInvalid, "more than 200 characters"),
        ({"workflow": {"7": {"class_type": "X" * 201, "inputs": {}}}}, WorkflowInvalid, "more than 200 characters"),
        (job(images="a.png"), InputInvalid, "'images' must be"),
        (job(images=[CODED]), InputInvalid, "Item 0 of 'images'"),
        (job(images=[{"name": "a.png"}]), InputInvalid, "must be a Base64 string"),
        (job(images={"a.png": None}), InputInvalid, "must be a Base64 string"),
        (job(images={"a.png": "https://example.org/a.png"}), InputInvalid, "ALLOW_URL_INPUTS=1"),
        (job(images={"a.png": "not base64!"}), MediaInvalid, "not valid Base64"),
        (job(files={"a.txt": "data:text/plain,hello"}), MediaInvalid, "not valid Base64"),
        (job(files={"a/../../b": "AAAA"}), InputInvalid, "stay inside"),
        (job(files={"a.bin": "AAA!A"}), MediaInvalid, "not valid Base64"),
        (job(images={"a.png": CODED[:-8]}), MediaInvalid, "'a.png'"),
        (job(images={"a.txt": base64.b64encode(b"words").decode()}), MediaInvalid, "under 'files'"),
        (job(debug="yes"), InputInvalid, "'debug' must be true or false"),
        (job(timeout_s="5"), InputInvalid, "'timeout_s' must be a number"),
        (job(timeout_s=True), InputInvalid, "'timeout_s' must be a number"),
        (job(timeout_s=math.nan), InputInvalid, "above 0"),
        (job(timeout_s=math.inf), InputInvalid, "at most 604800"),
        (job(timeout_s=0), InputInvalid, "above 0"),
        (job(timeout_s=-1), InputInvalid, "above 0"),
        (job(timeout_s=604_801), InputInvalid, "at most 604800"),
        (job(timeout_s=10**400), InputInvalid, "at most 604800"),  # no float can hold it
        (job(comfy_org_api_key=5), InputInvalid, "must be a string"),
        (job(files={"a.png": "AAAA"}, images={"a.png": CODED}), InputInvalid, "Two files are named 'a.png'"),
        (job(files={"e\u0301": "AAAA", "\xe9": "AAAA"}), InputInvalid, "Two files are named"),
        (job(files={"a": "AAAA", "a/b": "AAAA"}), InputInvalid, "used as the folder"),
        (job(files={"e\u0301": "AAAA", "\xe9/deep/b": "AAAA"}), InputInvalid, "used as the folder"),
    ],
)
def test_a_wrong_input_is_one_sentence(job_input: object, error: type[WorkerError], said: str) -> None:
    with pytest.raises(error) as caught:
        parse_job_input(job_input)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "../a.png", "a/../../b", "/etc/passwd", "a//b", "a/", ".", "./a", ".hidden", "a/.b"),
        *("a\\b", "a\0b", "a\nb", "\ud800", "x" * 256, "ä" * 128, "/".join("abcdefghi")),
    ],
)
def test_a_name_that_could_leave_the_input_directory_is_refused(name: str) -> None:
    with pytest.raises(InputInvalid):
        parse_job_input(job(files={name: "AAAA"}))


@pytest.mark.parametrize("name", ["a.png", "Bild äöü.png", "写真.jpg", "clipspace/clipspace-mask-1.png", "x" * 255])
def test_ordinary_names_are_taken(name: str) -> None:
    assert parse_job_input(job(files={name: "AAAA"})).files[0].name == name


def test_a_name_is_kept_as_the_workflow_spells_it() -> None:
    """macOS sends NFD names: written as NFC, ComfyUI would not find what its LoadImage asks for."""
    name = "Cafe\u0301.png"
    assert parse_job_input(job(files={name: "AAAA"})).files[0].name == name


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({}, None),
        ({"output_format": None, "output_quality": None}, None),
        ({"output_format": "png"}, OutputFormat("png")),
        ({"output_format": "webp", "output_quality": 1}, OutputFormat("webp", 1)),
        ({"output_format": "jpeg", "output_quality": 100}, OutputFormat("jpeg", 100)),
    ],
)
def test_the_format_of_the_pictures_is_asked_for(wish: dict[str, Any], expected: OutputFormat | None) -> None:
    assert parse_job_input(job(**wish)).output_format == expected


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"output_format": "gif"}, "'output_format' must be one of png, webp, jpeg"),
        ({"output_format": ["png"]}, "'output_format' must be one of png, webp, jpeg"),
        ({"output_format": "webp", "output_quality": 0}, "whole number from 1 to 100"),
        ({"output_format": "webp", "output_quality": 101}, "whole number from 1 to 100"),
        ({"output_format": "webp", "output_quality": True}, "whole number from 1 to 100"),
        ({"output_format": "webp", "output_quality": 80.5}, "whole number from 1 to 100"),
        ({"output_format": "webp", "output_quality": "80"}, "whole number from 1 to 100"),
        ({"output_format": "png", "output_quality": 80}, "PNG loses nothing"),
        ({"output_quality": 80}, "webp or jpeg only"),
    ],
)
def test_a_format_that_cannot_be_is_refused(wish: dict[str, Any], words: str) -> None:
    with pytest.raises(InputInvalid, match=words):
        parse_job_input(job(**wish))


@settings(max_examples=EXAMPLES, deadline=None)
@given(JSON)
def test_any_json_is_understood_or_refused(job_input: object) -> None:
    assert_understood_or_refused(job_input)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.fixed_dictionaries(
        {"workflow": st.just(WORKFLOW) | GRAPHS | JSON},
        optional={
            "images": st.dictionaries(NAMES, st.just(CODED) | st.text(), max_size=3) | JSON,
            "files": st.dictionaries(NAMES, st.just(CODED), max_size=3),
            "debug": st.booleans() | JSON,
            "timeout_s": st.floats(1, 9) | st.floats() | JSON,
            "output_format": JSON | st.just("webp"),
            "output_quality": st.integers(1, 100) | JSON,
            "comfy_org_api_key": st.text() | JSON,
        },
    )
)
def test_any_value_under_a_known_key_is_understood_or_refused(job_input: object) -> None:
    assert_understood_or_refused(job_input)


def assert_understood_or_refused(job_input: object) -> None:
    try:
        request = parse_job_input(job_input)
    except WorkerError as error:
        event(error.code)
        json.dumps(json_safe(error.as_result()), ensure_ascii=False, allow_nan=False).encode()
    else:
        event("understood")
        assert request.workflow
        for file in request.files:
            assert not file.name.startswith("/")
            assert ".." not in file.name.split("/")


SURROGATES = st.text(st.characters(categories=["Cs", "L"]))


@settings(max_examples=300, deadline=None)
@given(JSON | SURROGATES | st.dictionaries(SURROGATES, SURROGATES | st.floats()))
def test_whatever_comes_out_can_be_posted(value: object) -> None:
    text = json.dumps(json_safe(value), ensure_ascii=False, allow_nan=False)
    assert json.loads(text.encode()) == json_safe(value)
