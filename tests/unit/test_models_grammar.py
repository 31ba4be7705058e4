"""The MODELS grammar: what each form means, and that no text breaks out of the checkout or raises."""

import re
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from worker.models import ModelError
from worker.models.grammar import ModelEntry, each_once, parse_models

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
    assert len(entries_of("org/a:*.pth:vae, org/a:*.pth:models/vae/")) == 1


@pytest.mark.parametrize(
    "comment", ["# one line", "  # indented, with a comma: org/b:y.pth:vae", "#", "#org/b:y.pth:vae"]
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_line_may_be_a_comment(comment: str, newline: str) -> None:
    lines = [comment, "org/a:x.pth:vae,", comment, "", "org/c:z.pth:vae", comment]
    assert [entry.repo_id for entry in entries_of(newline.join(lines))] == ["org/a", "org/c"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_comment_may_stand_behind_an_entry(newline: str) -> None:
    lines = ["org/a:x.pth:vae  # the decoder, or so", "org/b:y.pth:vae,\t# and this", "org/c:z#1.pth:vae#old"]
    assert [entry.path for entry in entries_of(newline.join(lines))] == [
        MODELS / "vae/x.pth",
        MODELS / "vae/y.pth",
        MODELS / "vae#old/z#1.pth",
    ]


# -- patterns


def names_matching(pattern: str, *names: str) -> list[str]:
    [entry] = entries_of(f"org/name@v1:{pattern}:loras/sdxl")
    assert entry.is_pattern
    found = entry.matching(names)
    for one in found:
        assert one == ModelEntry(
            "org/name", "v1", one.filename, MODELS / "loras/sdxl" / one.filename.rpartition("/")[2]
        )
    return [one.filename for one in found]


def test_a_pattern_matches_part_by_part() -> None:
    files = ("b.safetensors", "a.safetensors", "a.SAFETENSORS", "s/c.safetensors", "s/t/d.safetensors", "s/c.txt")
    assert names_matching("*.safetensors", *files) == ["a.safetensors", "b.safetensors"]
    assert names_matching("?.safetensors", *files) == ["a.safetensors", "b.safetensors"]
    assert names_matching("s/*.safetensors", *files) == ["s/c.safetensors"]
    assert names_matching("*/*.safetensors", *files) == ["s/c.safetensors"]
    assert names_matching("?/*/*", *files) == ["s/t/d.safetensors"]
    assert names_matching("none*", *files) == []


def test_only_star_and_question_mark_are_special() -> None:
    names = ("w[12]a.pth", "w1a.pth", "w[!3]b.pth", "w4b.pth", "{a,b}.pth", "w.pthx")
    assert names_matching("w[12]*.pth", *names) == ["w[12]a.pth"]
    assert names_matching("w[!3]?.pth", *names) == ["w[!3]b.pth"]
    assert names_matching("w*.pth", *names) == ["w1a.pth", "w4b.pth", "w[!3]b.pth", "w[12]a.pth"]
    [entry] = entries_of("org/name:w[12]a.pth:vae")
    assert not entry.is_pattern


def test_a_name_that_leaves_the_repository_matches_nothing() -> None:
    assert names_matching("*", ".", "..", "", "a") == ["a"]
    assert names_matching("*/x.pth", "../x.pth", "./x.pth", "/x.pth", "a/x.pth") == ["a/x.pth"]


def test_two_patterns_for_one_folder() -> None:
    assert len(entries_of("org/a:*.pth:vae,org/b:*.pth:vae,org/b:s/*.pth:vae,org/b@v1:*.pth:vae")) == 4


ALPHABET = "ab.*?[]!-\\"
PATTERN = st.lists(st.text(ALPHABET, min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)
PART = st.text(ALPHABET, min_size=1, max_size=5).filter(lambda part: part not in (".", ".."))
NAMES = st.lists(st.lists(PART, min_size=1, max_size=3).map("/".join), max_size=6)


@given(pattern=PATTERN, names=NAMES)
@example(pattern="a*", names=["a", "ab", "a/b", "ba"])
def test_a_pattern_means_what_it_says(pattern: str, names: list[str]) -> None:
    meaning = re.compile("".join({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)) for char in pattern))
    entry = ModelEntry("org/name", None, pattern, MODELS / "vae/x")
    assert [one.filename for one in entry.matching(names)] == sorted(name for name in names if meaning.fullmatch(name))


def test_each_file_once() -> None:
    one, two = (ModelEntry("org/name", None, name, MODELS / "vae" / name) for name in ("a.pth", "b.pth"))
    other = ModelEntry("org/other", None, "s/a.pth", MODELS / "vae/a.pth")
    assert each_once([two, one, two]) == ([two, one], [])
    entries, [clash] = each_once([one, other, two])
    assert entries == [one, two]
    assert "org/name:a.pth" in clash


# -- MODELS and MODELS_FILE


def test_both_variables_count_their_own_entries() -> None:
    listed = "# mine\r\norg/b:y.pth:vae\r\n\r\nbad\r\norg/a:x.pth:vae\r\norg/c:x.pth:vae"
    entries, errors = parse_models("worse,org/a:x.pth:vae", COMFYUI, listed)
    assert [entry.repo_id for entry in entries] == ["org/a", "org/b"]
    assert [str(error).partition(")")[0] for error in errors] == [
        "MODELS entry 1 ('worse'",
        "MODELS_FILE entry 2 ('bad'",
        "MODELS_FILE entry 4 ('org/c:x.pth:vae'",
    ]


SEPARATORS = st.lists(
    st.sampled_from([",", "\n", "\r\n", " , ", "\n# org/x:x.pth:vae, bad\n", ",\n,"]), min_size=1, max_size=3
).map("".join)


@given(st.data(), st.lists(st.booleans(), max_size=6), st.lists(st.booleans(), max_size=6))
def test_every_bad_entry_is_named_with_its_position(data: st.DataObject, text: list[bool], listed: list[bool]) -> None:
    def written(goods: list[bool], prefix: str) -> str:
        parts = [f"org/name:{prefix}{n}.pth:vae" if good else f"bad{n}" for n, good in enumerate(goods)]
        return "".join(part + data.draw(SEPARATORS) for part in parts)

    entries, errors = parse_models(written(text, "t"), COMFYUI, written(listed, "f"))
    assert len(entries) == sum(text) + sum(listed)
    assert [str(error).partition(" (")[0] for error in errors] == [
        *(f"MODELS entry {n}" for n, good in enumerate(text, start=1) if not good),
        *(f"MODELS_FILE entry {n}" for n, good in enumerate(listed, start=1) if not good),
    ]


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
        ("org/name:*.pth:vae:b.pth", "LocalName, but its Filename is a pattern"),
        ("org/name:s/?.pth:vae:b.pth", "LocalName, but its Filename is a pattern"),
        ("org/name:*/../*.pth:vae", ".. in its Filename"),
        ("*/name:a.pth:vae", "not of the form org/name"),
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


PARTS = st.sampled_from(
    ["org/name", "name", "vae", "models", "..", ".", "", "/", "/srv/ComfyUI", "a.pth", "@", "x@y", "*.pth", "?", "# x"]
)
NEAR_MISSES = st.lists(st.one_of(PARTS, st.text(max_size=8), st.sampled_from(list(":/,@\n\r#*"))), max_size=24).map(
    "".join
)


@given(st.one_of(st.text(), NEAR_MISSES), st.one_of(st.text(), NEAR_MISSES))
def test_any_text_gives_entries_inside_the_checkout_or_named_errors(text: str, listed: str) -> None:
    entries, errors = parse_models(text, COMFYUI, listed)
    for error in errors:
        assert isinstance(error, ModelError)
        assert re.match("MODELS(_FILE)? entry [1-9][0-9]* [(]", str(error))
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
