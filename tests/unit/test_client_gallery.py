"""client.py on the workflows of tests/workflows: what must be injected where, and that nothing else changes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import client

GALLERY = sorted((Path(__file__).parents[1] / "workflows").glob("*.json"))
DOCUMENTS = {path.stem: json.loads(path.read_text()) for path in GALLERY}
REFUSED = sorted(name for name, document in DOCUMENTS.items() if "refused" in document["expect"])
TAKEN = sorted(DOCUMENTS.keys() - set(REFUSED))


def opened(name: str) -> tuple[client.Workflow, dict[str, Any]]:
    return client.parse_workflow(DOCUMENTS[name]), DOCUMENTS[name]["expect"]


def assert_changed(workflow: client.Workflow, changes: list[client.Change], places: list[str], values: Any) -> None:
    """Exactly these places hold exactly these values now; all else is as it was."""
    before = json.dumps(workflow)
    changed = client.apply_changes(workflow, changes)
    assert json.dumps(workflow) == before
    told = {f"{node_id}.{name}": value for node_id, node in changed.items() for name, value in node["inputs"].items()}
    were = {f"{node_id}.{name}": value for node_id, node in workflow.items() for name, value in node["inputs"].items()}
    assert {place: told[place] for place in told if told[place] != were.get(place)} == dict(
        zip(places, values, strict=True)
    )
    assert [(key, node["class_type"]) for key, node in changed.items()] == [
        (key, node["class_type"]) for key, node in workflow.items()
    ]


def test_the_gallery_is_large_and_has_what_people_have() -> None:
    assert len(GALLERY) >= 30
    assert len(REFUSED) >= 3
    text = json.dumps([DOCUMENTS[name] for name in TAKEN])
    for class_type in ("BasicGuider", "CLIPTextEncodeFlux", "CLIPTextEncodeSD3", "TextEncodeQwenImageEditPlus"):
        assert f'"{class_type}"' in text
    for class_type in ("KSamplerAdvanced", "ControlNetApplyAdvanced", "VHS_LoadVideo", "LoadImageMask", "LoadAudio"):
        assert f'"{class_type}"' in text


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_api_workflow_is_refused_with_the_way_to_export_it(name: str) -> None:
    with pytest.raises(client.InputError, match=r"Export \(API\)") as refusal:
        client.parse_workflow(DOCUMENTS[name])
    assert DOCUMENTS[name]["expect"]["refused"] in str(refusal.value)


@pytest.mark.parametrize("role", ["positive", "negative"])
@pytest.mark.parametrize("name", TAKEN)
def test_prompt_text_goes_where_it_lives_or_the_error_names_the_candidates(name: str, role: str) -> None:
    workflow, expected = opened(name)
    places = expected[{"positive": "prompt", "negative": "negative"}[role]]
    if isinstance(places, str):
        with pytest.raises(client.InputError) as refusal:
            client.plan_text(workflow, "new words", role)
        assert places in str(refusal.value)
    else:
        assert_changed(workflow, client.plan_text(workflow, "new words", role), places, ["new words"] * len(places))


@pytest.mark.parametrize("name", TAKEN)
def test_files_go_to_the_loaders_in_order(name: str) -> None:
    workflow, expected = opened(name)
    for places, kind in ((expected.get("images", []), "image"), (expected.get("files", []), "file")):
        names = [f"new{number}" for number in range(len(places))]
        given = [client.GivenFile(file, kind) for file in names]
        assert_changed(workflow, client.plan_files(workflow, given), places, names)
        with pytest.raises(client.InputError):
            client.plan_files(workflow, [*given, client.GivenFile("more", kind)])
        for place, file in itertools.product(places[:1], names[:1]):
            node_id = place.rpartition(".")[0]
            named = client.plan_files(workflow, [client.GivenFile(file, kind, node_id)])
            assert_changed(workflow, named, [place], [file])


@pytest.mark.parametrize("name", TAKEN)
def test_seeds_are_drawn_once_for_each_node_that_holds_one(name: str) -> None:
    workflow, expected = opened(name)
    draws = itertools.count(1_000_001)
    draw: Callable[[], int] = lambda: next(draws)  # noqa: E731
    changes = client.plan_seeds(workflow, draw)
    assert_changed(workflow, changes, expected["seeds"], [1_000_001 + number for number in range(len(changes))])
