"""Whatever is sent: no answer is INTERNAL, and none leaves anything behind.

Jobs of all kinds of nonsense through the whole handler, on a real RAM disk and a running ComfyUI. HANDLER_EXAMPLES=500
makes more of them, `--hypothesis-show-statistics` counts the answers.
"""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.process.in_process import InProcess, handler_of
from tests.process.stack import Driver, base64_of, invert_job, invert_workflow, picture_bytes

EXAMPLES = int(os.environ.get("HANDLER_EXAMPLES", "60"))
CODED = base64_of(picture_bytes())
CLASSES = ["LoadImage", "LoadImageMask", "ImageInvert", "ImageBatch", "SaveImage", "PreviewImage", "SaveAudio"]
CLASSES += [
    "PreviewAny",
    "PrimitiveString",
    "SaveAnimatedWEBP",
    "SaveImageWebsocket",
    "MaskToImage",
    "LoadVideo",
    "None",
]
INPUTS = [
    "image",
    "images",
    "filename_prefix",
    "image1",
    "image2",
    "source",
    "value",
    "mask",
    "channel",
    "file",
    "is_changed",
]

TEXTS = st.text(max_size=20) | st.text(st.characters(), max_size=5)  # the second with lone surrogates
NUMBERS = st.integers(-(2**70), 2**70) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    st.sampled_from(["a.png", "b.png", "sub/a.png", "../a.png", "/etc/hostname", "a.png [output]", "%width%/x"]) | TEXTS
)
NODE_IDS = st.sampled_from(["1", "2", "3", "4", "57:8", "n" * 200, "n" * 201])
LINKS = st.tuples(NODE_IDS, st.integers(-1, 2)).map(list)
NODES = st.fixed_dictionaries(
    {
        "class_type": st.sampled_from(CLASSES) | TEXTS,
        "inputs": st.dictionaries(st.sampled_from(INPUTS), LINKS | NAMES | VALUES, max_size=4),
    },
    optional={"_meta": VALUES | st.fixed_dictionaries({"title": VALUES})},
)


@st.composite
def damaged_workflows(draw: st.DrawFn) -> dict[str, Any]:
    """One that runs, with some of its inputs and nodes replaced."""
    workflow = invert_workflow()
    for node_id in draw(st.lists(st.sampled_from(["1", "2", "3"]), max_size=2)):
        inputs = workflow[node_id]["inputs"]
        inputs[draw(st.sampled_from([*inputs, *INPUTS]))] = draw(LINKS | NAMES | VALUES)
    return workflow | draw(st.dictionaries(NODE_IDS | TEXTS, NODES, max_size=2))


URLS = st.sampled_from(["https://127.0.0.1/a.png", "https://[::1]:9/", "http://x/", "https://a@b/c", "https://"])
CONTENTS = st.sampled_from([CODED, CODED[:-8], CODED[:40], f"data:image/png;base64,{CODED}"]) | URLS | TEXTS | VALUES
FILES = st.dictionaries(NAMES, CONTENTS, max_size=2) | VALUES
LISTED = st.lists(st.fixed_dictionaries({"name": NAMES, "image": CONTENTS}), max_size=2)
# One thing at a time is wrong, or the first that is hides the others; and sometimes all of it.
WORKFLOW_JOBS = st.fixed_dictionaries({"workflow": damaged_workflows(), "images": st.just({"a.png": CODED})})
FILE_JOBS = st.fixed_dictionaries(
    {"workflow": st.just(invert_workflow()), "images": FILES | LISTED}, optional={"files": FILES}
)
KEY_JOBS = st.fixed_dictionaries(
    {"workflow": st.just(invert_workflow()), "images": st.just({"a.png": CODED})},
    optional={
        "debug": st.booleans() | VALUES,
        "timeout_s": st.floats(0.5, 20) | VALUES,
        "comfy_org_api_key": TEXTS | VALUES,
        "output_format": st.sampled_from(["png", "webp", "jpeg", "gif"]) | VALUES,
        "output_quality": st.integers(0, 101) | VALUES,
        "filse": VALUES,
    },
)
GRAPH_JOBS = st.fixed_dictionaries({"workflow": st.dictionaries(NODE_IDS, NODES, max_size=4) | VALUES, "images": FILES})
INPUTS_OF_JOBS = WORKFLOW_JOBS | FILE_JOBS | KEY_JOBS | GRAPH_JOBS | VALUES


@pytest.fixture(scope="module")
def handler(shared_driver: Driver) -> Iterator[InProcess]:
    with handler_of(shared_driver) as handler:
        yield handler


@pytest.mark.timeout(600)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(job_input=INPUTS_OF_JOBS)
def test_no_input_ends_in_a_defect_or_leaves_anything(
    job_input: Any, handler: InProcess, shared_driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        answer = handler.run(job_input)
    json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()  # what the SDK posts
    code = answer["output"].get("error_code", answer["status"])
    event(code)
    assert code not in ("INTERNAL", "COMFYUI_CRASHED")
    assert "Traceback" not in caplog.text + answer.get("error", "")
    if isinstance(job_input, dict) and job_input.get("debug") is True:
        handler.run(invert_job())  # until then the files are kept
    assert shared_driver.job_files() == []


def test_and_then_a_plain_job_runs(handler: InProcess, driver: Driver) -> None:
    answer = handler.run(invert_job())
    assert answer["status"] == "COMPLETED", answer
    assert driver.job_files() == []
