"""The examples and tables of the documents against jobs that run."""

from itertools import pairwise
from typing import Any

import pytest

from tests.documents import first_names, json_blocks, section, text_of
from tests.process.stack import ROOT, Driver, base64_of, invert_job, job, picture_bytes, slow_job, wait_until
from tests.process.test_faults_outputs import every_kind

PHOTO = ROOT / "workflows" / "photos" / "coffee.jpg"
OWN_TO_EACH_JOB = ("id", "workerId", "data")


def api(title: str) -> str:
    return section(text_of("docs/api.md"), title)


def table_of(title: str) -> set[str]:
    return set(first_names(api(title).partition("\n### ")[0]))


def examples(document: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each request with the answer that comes next."""
    return [(one, other) for one, other in pairwise(json_blocks(text_of(document))) if "input" in one]


def with_photo(request: dict[str, Any]) -> dict[str, Any]:
    """The input with a photograph where the document has the beginning of its Base64."""
    job_input = dict(request["input"])
    content = {"jpg": PHOTO.read_bytes(), "png": picture_bytes()}
    sent = {name: base64_of(content[name.rpartition(".")[2]]) for name in job_input["images"]}
    for name, shown in job_input["images"].items():
        assert sent[name].startswith(shown.removesuffix("...")), "the Base64 of another kind of picture"
    return {**job_input, "images": sent}


def assert_alike(shown: Any, found: Any, where: str) -> None:
    """The same but for numbers, ids and what the document has cut short."""
    if isinstance(shown, dict):
        assert isinstance(found, dict), where
        assert shown.keys() == found.keys(), where
        for key, value in shown.items():
            if key not in OWN_TO_EACH_JOB:
                assert_alike(value, found[key], f"{where}.{key}")
    elif isinstance(shown, list):
        assert isinstance(found, list), where
        assert len(shown) == len(found), where
        for position, (one, other) in enumerate(zip(shown, found, strict=True)):
            assert_alike(one, other, f"{where}[{position}]")
    elif isinstance(shown, int | float) and not isinstance(shown, bool):
        assert isinstance(found, int | float), where
    else:
        assert shown == found, where


@pytest.mark.parametrize(("document", "number"), [("README.md", 1), ("docs/api.md", 2)])
def test_the_requests_of_the_documents_have_the_answers_that_follow_them(
    worker: Driver, document: str, number: int
) -> None:
    pairs = examples(document)
    assert len(pairs) == number
    for request, shown in pairs:
        answer = worker.run(with_photo(request))
        assert_alike(shown, answer, f"{document}: {shown['status']}")
        for item in answer["output"].get("images", []):
            (documented,) = shown["output"]["images"]
            assert item["data"].startswith(documented["data"].removesuffix("..."))


def test_a_result_has_the_keys_of_the_contract(worker: Driver) -> None:
    everything = worker.run(job(every_kind(), debug=True))["output"]
    assert set(everything) == table_of("Result")
    lists = [everything[name] for name in ("images", "videos", "audio", "files")]
    assert {key for items in lists for item in items for key in item} == table_of("Items")
    assert {key for text in everything["texts"] for key in text} == {"node_id", "text"}
    assert set(everything["debug"]) == table_of("debug")
    assert everything["debug"]["kept_until"] in api("debug")
    assert everything["debug"]["models"], "the stack names one in MODELS"
    without = worker.run(invert_job())["output"]
    assert set(without) == table_of("Result") - {"videos", "audio", "files", "texts", "debug"}


def test_a_failure_has_the_keys_of_the_contract(worker: Driver) -> None:
    job_id = worker.start_job({"workflow": {"1": {"class_type": "NoSuchNode", "inputs": {}}}, "debug": True})
    answer = worker.finish(job_id)
    assert set(answer["output"]) | {"error"} == table_of("Failure")
    assert answer["output"]["details"]["debug"].keys() == table_of("debug") - {"prompt_id"}


def test_progress_has_the_keys_of_the_contract(worker: Driver) -> None:
    (shown,) = [block for block in json_blocks(api("Progress")) if block["status"] == "IN_PROGRESS"]
    job_id = worker.start_job(slow_job(20))

    def told() -> dict[str, Any] | None:
        update = worker.status(job_id).get("output", {})
        return update if "value" in update else None

    update = wait_until(told, "a node tells its step")
    worker.cancel(job_id)
    assert set(update) == table_of("Progress") == set(shown["output"])
    assert f"| `stage` | `{update['stage']}`" in api("Progress")
