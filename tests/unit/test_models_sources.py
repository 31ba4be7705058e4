"""Where a model already lies: whole or broken, and in which snapshot of the host cache. Real files, no network."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.models.grammar import ModelEntry
from worker.models.sources import (
    Places,
    Plan,
    Source,
    expand_in_cache,
    find_flaw,
    find_in_cache,
    find_on_volumes,
    link,
    plan,
)


def safetensors(data: bytes = b"\0" * 16, header: bytes | None = None) -> bytes:
    if header is None:
        tensor = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
        header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + data


def cache_file(cache: Path, folder: str, commit: str, filename: str, content: bytes) -> Path:
    """A blob and its snapshot link, as huggingface_hub makes them; returns the blob."""
    blob = cache / folder / "blobs" / f"{commit}-{filename.replace('/', '-')}"
    pointer = cache / folder / "snapshots" / commit / filename
    for path in (blob, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return blob


def set_ref(cache: Path, folder: str, ref: str, commit: str) -> None:
    path = cache / folder / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "models" / "vae" / "a.safetensors"


def entry_for(path: Path, *, repo_id: str = "org/name", revision: str | None = None) -> ModelEntry:
    return ModelEntry(repo_id, revision, "sub/a.safetensors", path)


# -- a file that is whole


@pytest.mark.parametrize(
    ("content", "flaw"),
    [
        (safetensors(), None),
        (safetensors(b"", header=b"{}"), None),
        (safetensors()[:-1], "its header says"),
        (safetensors() + b"\0", "its header says"),
        (safetensors()[:20], "ends within its header"),
        (b"", "ends within its header"),
        (b"1234567", "ends within its header"),
        (b"\xff" * 64, "ends within its header"),
        (b"<html>" * 40, "ends within its header"),
        (safetensors(header=b"[1, 2]"), "not of the safetensors format"),
        (safetensors(header=b'{"w": {}}'), "not of the safetensors format"),
        (safetensors(header=b'{"w": {"data_offsets": [0, "x"]}}'), "not of the safetensors format"),
        (safetensors(header=b"[" * 100_000), "not of the safetensors format"),
    ],
)
def test_safetensors_are_held_against_their_header(tmp_path: Path, content: bytes, flaw: str | None) -> None:
    file = tmp_path / "a.SafeTensors"
    file.write_bytes(content)
    found = find_flaw(file)
    assert found is None if flaw is None else flaw in (found or "")


def test_other_formats_do_not_say_their_length(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    file.write_bytes(b"anything")
    assert find_flaw(file) is None


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_no_header_makes_it_raise(tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.safetensors"
    file.write_bytes(safetensors(data, header=header))
    assert isinstance(find_flaw(file), str) or json.loads(header) == {}


OFFSETS = st.lists(st.integers(min_value=0, max_value=40), min_size=2, max_size=2)


@given(tensors=st.lists(OFFSETS, min_size=1, max_size=5), data=st.binary(max_size=40))
def test_whole_means_to_the_highest_offset(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[list[int]], data: bytes
) -> None:
    header = json.dumps({f"w{number}": {"data_offsets": offsets} for number, offsets in enumerate(tensors)})
    file = tmp_path_factory.getbasetemp() / "offsets.safetensors"
    file.write_bytes(safetensors(data, header=header.encode()))
    assert (find_flaw(file) is None) == (len(data) == max(end for _, end in tensors))


@given(data=st.binary(min_size=1, max_size=64), cut=st.integers(min_value=0, max_value=200))
def test_every_cut_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    file = tmp_path_factory.getbasetemp() / "cut.safetensors"
    whole = safetensors(data)
    file.write_bytes(whole[: min(cut, len(whole) - 1)])
    assert find_flaw(file) is not None


# -- the host cache


def test_refs_main_names_the_snapshot(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors(b"old"))
    blob = cache_file(cache, "models--org--name", "bbbb", "sub/a.safetensors", safetensors(b"new"))
    set_ref(cache, "models--org--name", "main", "bbbb\n")
    assert find_in_cache(entry_for(place), cache) == blob


@pytest.mark.parametrize("ref", [None, "", "cccc", "../../..", "\0", "ä"])
def test_without_a_usable_ref_it_is_the_first_snapshot_by_name(cache: Path, place: Path, ref: str | None) -> None:
    cache_file(cache, "models--org--name", "bbbb", "sub/a.safetensors", safetensors(b"second"))
    blob = cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors(b"first"))
    if ref is not None:
        set_ref(cache, "models--org--name", "main", ref)
    assert find_in_cache(entry_for(place), cache) == blob


def test_a_snapshot_without_the_file_is_passed_over(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "other.safetensors", safetensors())
    set_ref(cache, "models--org--name", "main", "aaaa")
    blob = cache_file(cache, "models--org--name", "bbbb", "sub/a.safetensors", safetensors())
    assert find_in_cache(entry_for(place), cache) == blob


def test_a_revision_is_a_ref_or_a_commit(cache: Path, place: Path) -> None:
    old = cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors(b"old"))
    new = cache_file(cache, "models--org--name", "bbbb", "sub/a.safetensors", safetensors(b"new"))
    set_ref(cache, "models--org--name", "main", "bbbb")
    set_ref(cache, "models--org--name", "refs/pr/1", "aaaa")
    assert find_in_cache(entry_for(place, revision="refs/pr/1"), cache) == old
    assert find_in_cache(entry_for(place, revision="aaaa"), cache) == old
    assert find_in_cache(entry_for(place, revision="bbbb"), cache) == new


def test_a_revision_that_is_not_cached_is_not_replaced_by_another(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors())
    set_ref(cache, "models--org--name", "main", "aaaa")
    assert find_in_cache(entry_for(place, revision="v2"), cache) is None


def test_the_lower_cased_folder_of_some_hosts(cache: Path, place: Path) -> None:
    blob = cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors())
    assert find_in_cache(entry_for(place, repo_id="Org/Name"), cache) == blob


def test_a_broken_blob_is_not_used(cache: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors()[:-1])
    assert find_in_cache(entry_for(place), cache) is None
    assert "is not used" in caplog.text


def test_a_dangling_snapshot_is_not_used(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors()).unlink()
    assert find_in_cache(entry_for(place), cache) is None


def test_no_cache_at_all(cache: Path, place: Path) -> None:
    assert plan(entry_for(place), Places(place.parents[1], cache)) == Plan(Source.DOWNLOAD)


def test_a_cache_that_cannot_be_read_leaves_the_download(
    cache: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref = cache / "models--org--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.symlink_to(ref)
    assert plan(entry_for(place), Places(place.parents[1], cache)) == Plan(Source.DOWNLOAD)
    assert "the host cache cannot be read" in caplog.text


# -- patterns


def pattern_for(place: Path, filename: str, revision: str | None = None) -> ModelEntry:
    return ModelEntry("Org/Name", revision, filename, place.with_name(filename.rpartition("/")[2]))


def test_a_pattern_is_expanded_by_the_best_snapshot(cache: Path, place: Path) -> None:
    for commit, names in (("aaaa", "12"), ("bbbb", "345")):
        for name in names:
            cache_file(cache, "models--org--name", commit, f"s/{name}.pth", b"x")
    set_ref(cache, "models--org--name", "main", "bbbb")
    names = [entry.filename for entry in expand_in_cache(pattern_for(place, "s/*.pth"), cache)]
    assert names == ["s/3.pth", "s/4.pth", "s/5.pth"]
    names = [entry.path.name for entry in expand_in_cache(pattern_for(place, "s/?.pth", "aaaa"), cache)]
    assert names == ["1.pth", "2.pth"]
    assert expand_in_cache(pattern_for(place, "s/*.pth", "v2"), cache) == []
    assert [entry.filename for entry in expand_in_cache(pattern_for(place, "?/1.pth"), cache)] == ["s/1.pth"]


def test_a_dangling_snapshot_is_no_match(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "1.pth", b"x").unlink()
    cache_file(cache, "models--org--name", "aaaa", "2.pth", b"x")
    assert [entry.filename for entry in expand_in_cache(pattern_for(place, "*.pth"), cache)] == ["2.pth"]


# -- a network volume


def volumes_for(place: Path, *volumes: Path) -> Places:
    return Places(place.parents[1], place.parents[2] / "no-cache", volumes)


def test_a_volume_has_the_folders_of_comfyui(tmp_path: Path, place: Path) -> None:
    volume = tmp_path / "volume/models"
    file = volume / "vae/a.safetensors"
    file.parent.mkdir(parents=True)
    real = tmp_path / "elsewhere.safetensors"
    real.write_bytes(safetensors())
    file.symlink_to(os.path.relpath(real, file.parent))
    assert find_on_volumes(entry_for(place), volumes_for(place, volume)) == real
    assert plan(entry_for(place), volumes_for(place, volume)) == Plan(Source.VOLUME, real)
    outside = entry_for(tmp_path / "custom_nodes/vae/a.safetensors")
    assert find_on_volumes(outside, volumes_for(place, volume)) is None


def test_a_broken_file_on_a_volume_is_not_used(tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "volume/models/vae/a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(safetensors()[:-1])
    assert plan(entry_for(place), volumes_for(place, tmp_path / "volume/models")) == Plan(Source.DOWNLOAD)
    assert "is not used" in caplog.text


# -- the destination


def test_a_whole_file_in_place_is_kept_even_with_a_cache(cache: Path, place: Path) -> None:
    cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors(b"cached"))
    place.parent.mkdir(parents=True)
    place.write_bytes(safetensors(b"mine"))
    assert plan(entry_for(place), Places(place.parents[1], cache)) == Plan(Source.IN_PLACE)


@pytest.mark.parametrize("before", ["nothing", "dangling link", "broken file"])
def test_a_link_is_made_or_repaired(cache: Path, place: Path, before: str) -> None:
    blob = cache_file(cache, "models--org--name", "aaaa", "sub/a.safetensors", safetensors())
    if before != "nothing":
        place.parent.mkdir(parents=True)
    if before == "dangling link":
        place.symlink_to(cache / "gone")
    if before == "broken file":
        place.write_bytes(safetensors()[:-1])
    step = plan(entry_for(place), Places(place.parents[1], cache))
    assert step == Plan(Source.HOST_CACHE, blob)
    assert step.file is not None
    link(step.file, place)
    assert place.readlink() == blob
    assert [path.name for path in place.parent.iterdir()] == ["a.safetensors"]
    assert plan(entry_for(place), Places(place.parents[1], cache)) == Plan(Source.HOST_CACHE, blob)  # as it is linked
    assert plan(entry_for(place), Places(place.parents[1], cache / "other")) == Plan(Source.IN_PLACE)


def test_the_leftover_of_a_killed_run_is_no_obstacle(cache: Path, place: Path) -> None:
    place.parent.mkdir(parents=True)
    with mock.patch.object(Path, "replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        link(cache, place)
    assert len(list(place.parent.iterdir())) == 1
    link(cache, place)
    assert [path.name for path in place.parent.iterdir()] == ["a.safetensors"]


def test_links_made_at_once_do_not_mix_up(tmp_path: Path) -> None:
    for _ in range(50):
        start = threading.Barrier(4)

        def make(name: str, start: threading.Barrier = start) -> None:
            start.wait()
            link(tmp_path / "real" / name, tmp_path / "vae" / name)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, "abcd"))
        for path in (tmp_path / "vae").iterdir():
            assert path.readlink() == tmp_path / "real" / path.name
            path.unlink()


def test_a_link_to_itself_is_never_made(tmp_path: Path) -> None:
    file = tmp_path / "volume/a.pth"
    file.parent.mkdir()
    file.write_bytes(b"mine")
    (tmp_path / "vae").symlink_to(file.parent)
    for path in (file, tmp_path / "vae/a.pth"):
        link(file, path)
        assert not file.is_symlink()
    assert file.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["x" * 251 + ".pth", "ä" * 125 + ".pth"])
def test_a_link_with_a_long_name(cache: Path, place: Path, name: str) -> None:
    link(cache, place.with_name(name))
    assert [path.name for path in place.parent.iterdir()] == [name]


def test_a_folder_in_the_way_is_left_alone(cache: Path, place: Path) -> None:
    place.mkdir(parents=True)
    cache.write_bytes(b"a model")
    with pytest.raises(IsADirectoryError):
        link(cache, place)
    assert [path.name for path in place.parent.iterdir()] == ["a.safetensors"]
