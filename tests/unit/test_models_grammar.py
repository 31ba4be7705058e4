"""The MODELS grammar: what each form means, and that no text breaks out of the checkout or raises."""

from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from worker.models import ModelError
from worker.models.grammar import ModelEntry, parse_models

COMFYUI = Path("/srv/ComfyUI")
MODELS = COMFYUI / "models"


def entries_of(text: str) -> list[ModelEntry]:
    entries, errors = parse_models(text, COMFYUI)
    assert errors == []
    return entries


def error_of(text: str) -> str:
    entries, errors = parse_models(text, COMFYUI)
    assert entries == []
    assert len(errors) == 1
    return str(errors[0])


def test_an_entry_is_a_file_of_a_repository_and_its_place() -> None:
    assert entries_of("org/name:unet/model.safetensors:checkpoints") == [
        ModelEntry("org/name", None, "unet/model.safetensors", MODELS / "checkpoints/model.safetensors")
    ]


@pytest.mark.parametrize(
    ("target", "folder"),
    [
        ("vae", "models/vae"),
        ("models/vae", "models/vae"),
        ("vae/", "models/vae"),
        ("loras/sdxl/detail", "models/loras/sdxl/detail"),
        ("unet", "models/diffusion_models"),
        ("clip", "models/text_encoders"),
        ("models/unet/flux", "models/diffusion_models/flux"),
        ("loras/unet", "models/loras/unet"),
        ("/srv/ComfyUI/models/vae", "models/vae"),
        ("/srv/ComfyUI/models/clip", "models/text_encoders"),
        ("/srv/ComfyUI/custom_nodes/x/weights", "custom_nodes/x/weights"),
    ],
)
def test_target(target: str, folder: str) -> None:
    assert entries_of(f"org/name:a.pth:{target}")[0].path == COMFYUI / folder / "a.pth"


def test_local_name() -> None:
    [entry] = entries_of("org/name:diffusion_pytorch_model.safetensors:vae:flux_vae.safetensors")
    assert entry.path == MODELS / "vae/flux_vae.safetensors"
    assert entry.filename == "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "0123456789abcdef0123456789abcdef01234567"])
def test_revision(revision: str) -> None:
    [entry] = entries_of(f"org/name@{revision}:a.pth:vae")
    assert (entry.repo_id, entry.revision) == ("org/name", revision)
    assert entry.source == f"org/name@{revision}:a.pth"


def test_spaces_newlines_and_empty_entries_are_tolerated() -> None:
    text = "\n ,, org/a : x.pth : vae ,\r\n\n  gpt2:y.pth:loras:z.pth\n,"
    assert [(entry.repo_id, entry.path.name) for entry in entries_of(text)] == [("org/a", "x.pth"), ("gpt2", "z.pth")]


@pytest.mark.parametrize("text", ["", " ", "\n,,\n ,"])
def test_nothing_is_no_entries(text: str) -> None:
    assert entries_of(text) == []


def test_an_entry_said_twice_is_one_entry() -> None:
    assert len(entries_of("org/a:x.pth:vae, org/a:x.pth:models/vae/")) == 1


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("org/name:a.pth", "2 of the parts"),
        ("org/name:a.pth:vae:b.pth:c", "5 of the parts"),
        ("https://huggingface.co/org/name:a.pth:vae", "is a URL"),
        (":a.pth:vae", "RepoID ''"),
        ("org/name/more:a.pth:vae", "not of the form org/name"),
        ("../name:a.pth:vae", "not of the form org/name"),
        ("org/na..me:a.pth:vae", "not of the form org/name"),
        ("org/na--me:a.pth:vae", "not of the form org/name"),
        ("org/name.git:a.pth:vae", "not of the form org/name"),
        ("org/name@:a.pth:vae", "empty part in its revision"),
        ("org/name@../x:a.pth:vae", ".. in its revision"),
        ("org/name::vae", "empty part in its Filename"),
        ("org/name:/a.pth:vae", "empty part in its Filename"),
        ("org/name:../a.pth:vae", ".. in its Filename"),
        ("org/name:*.pth:vae", "wildcard"),
        ("org/name:a\0.pth:vae", "control character"),
        ("org/name:\ud800.pth:vae", "control character or a broken one"),
        (f"org/name:{'ä' * 128}:vae", "more than 255 bytes"),
        ("org/name:a.pth:", "empty part in its Target"),
        ("org/name:a.pth:vae/../../custom_nodes", ".. in its Target"),
        ("org/name:a.pth:models", "names no folder"),
        ("org/name:a.pth:/srv/ComfyUI/models", "names no folder"),
        ("org/name:a.pth:/etc", "not below /srv/ComfyUI"),
        ("org/name:a.pth:/srv/ComfyUI", "not below /srv/ComfyUI"),
        ("org/name:a.pth:/srv/ComfyUI-other/models", "not below /srv/ComfyUI"),
        ("org/name:a.pth:vae:", "empty part in its LocalName"),
        ("org/name:a.pth:vae:sub/b.pth", "folder in its LocalName"),
        ("org/name:a.pth:vae:b", "does not end in .pth"),
    ],
)
def test_a_bad_entry_is_named_and_the_good_ones_go_on(entry: str, reason: str) -> None:
    entries, errors = parse_models(f"org/a:x.pth:vae, ,{entry},org/b:y.pth:vae", COMFYUI)
    assert [entry.repo_id for entry in entries] == ["org/a", "org/b"]
    assert len(errors) == 1
    assert str(errors[0]).startswith("MODELS entry 2 (")
    assert reason in str(errors[0])


def test_two_models_for_one_file_are_an_error() -> None:
    entries, [error] = parse_models("org/a:x.pth:vae,org/b:x.pth:vae", COMFYUI)
    assert [entry.repo_id for entry in entries] == ["org/a"]
    assert "entry 2" in str(error)
    assert "would overwrite org/a:x.pth" in str(error)


def test_a_long_entry_is_shown_in_part() -> None:
    assert len(error_of("x" * 10_000)) < 300


PARTS = st.sampled_from(["org/name", "name", "vae", "models", "..", ".", "", "/", "/srv/ComfyUI", "a.pth", "@", "x@y"])
NEAR_MISSES = st.lists(st.one_of(PARTS, st.text(max_size=8), st.sampled_from(list(":/,@\n"))), max_size=24).map("".join)


@given(st.one_of(st.text(), NEAR_MISSES))
def test_any_text_gives_entries_inside_the_checkout_or_named_errors(text: str) -> None:
    entries, errors = parse_models(text, COMFYUI)
    for error in errors:
        assert isinstance(error, ModelError)
        assert str(error).startswith("MODELS entry ")
        assert str(error).isprintable()
    for entry in entries:
        assert ".." not in entry.path.parts
        assert entry.path.is_relative_to(COMFYUI)
        assert entry.path.parent not in (COMFYUI, MODELS)
        assert ".." not in entry.filename.split("/")
        assert not entry.filename.startswith("/")
        assert entry.source.isprintable()
        validate_repo_id(entry.repo_id)  # huggingface_hub will take it


SAFE_NAME = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,20}[a-z0-9_]", fullmatch=True)


@given(
    repo=SAFE_NAME.filter(lambda name: ".." not in name and "--" not in name and not name.endswith(".git")),
    folders=st.lists(SAFE_NAME, max_size=3),
    name=SAFE_NAME,
    target=st.lists(SAFE_NAME, min_size=1, max_size=3).filter(lambda parts: parts[0] not in ("unet", "clip", "models")),
)
def test_what_is_written_is_what_is_read(repo: str, folders: list[str], name: str, target: list[str]) -> None:
    filename = "/".join([*folders, name])
    [entry] = entries_of(f"org/{repo}:{filename}:{'/'.join(target)}")
    assert entry == ModelEntry(f"org/{repo}", None, filename, MODELS.joinpath(*target, name))
