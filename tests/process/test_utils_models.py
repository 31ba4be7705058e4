"""utils.py: where a model is found and linked, what --check and --prefetch do, what is noted, what is refused."""

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_bench import (
    ALL_THERE,
    BAD_CONFIGURATION,
    SOME_MISSING,
    Bench,
    files_below,
    running_bench,
    safetensors,
)

import utils
from tests.process.hub_server import sha256
from worker.models import prefetch


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with running_bench(tmp_path, monkeypatch) as bench:
        yield bench


# -- linking


def test_all_that_can_be_linked_needs_no_request_and_no_library(bench: Bench) -> None:
    bench.hub.add("Org/Name", {"split/a.safetensors": safetensors(1), "split/b.safetensors": safetensors(2)})
    bench.hub.add("org/local", {"c.safetensors": safetensors(3)})
    blobs = [bench.cache_by_library("Org/Name", f"split/{name}.safetensors") for name in "ab"]
    local = bench.cache_by_library("org/local", "c.safetensors", bench.local_cache)
    by_hand = bench.put(bench.volume / "loras/d.safetensors", safetensors(4))
    bench.put(bench.models / "loras/e.safetensors", safetensors(5))
    models = (
        "Org/Name:split/*.safetensors:unet,org/local:c.safetensors:vae,"
        "org/none:d.safetensors:loras,org/none:e.safetensors:loras"
    )
    run = bench.process(models, python=("-X", "importtime"))
    assert (run.code, list(run.sources.values())) == (
        ALL_THERE,
        ["host cache", "host cache", "local cache", "network volume", "in place"],
    )
    links = {name: (bench.models / name).readlink() for name in bench.files_below_models() if "e." not in name}
    assert links == {
        "diffusion_models/a.safetensors": blobs[0],
        "diffusion_models/b.safetensors": blobs[1],
        "vae/c.safetensors": local,
        "loras/d.safetensors": by_hand,
    }
    assert not any(blob.is_symlink() for blob in links.values())
    assert bench.hub.requests == []
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "worker.models.sources" in imported
    assert imported.isdisjoint({"huggingface_hub", "httpx2", "asyncio", "ssl", "worker.models.download"})


def test_the_order_of_the_sources(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)})
    place = bench.put(bench.models / "vae/a.safetensors", safetensors(5))
    copies = {
        "host cache": bench.cache_by_library("org/name", "a.safetensors"),
        "network volume": bench.put(bench.volume / "vae/a.safetensors", safetensors(6)),
        "local cache": bench.cache_by_library("org/name", "a.safetensors", bench.local_cache),
    }
    assert bench.utils("org/name:a.safetensors:vae").columns[0][1] == "in place"
    for source, copy in copies.items():
        place.unlink()
        run = bench.utils("org/name:a.safetensors:vae")
        assert (run.code, run.columns[0][1], place.readlink()) == (ALL_THERE, source, copy)
        assert bench.hub.requests == []
        copy.unlink()  # the link dangles now; what comes next repairs it
    assert bench.utils("org/name:a.safetensors:vae").columns[0][1] == "download"
    assert not place.is_symlink()


def test_each_revision_links_to_its_own_blob(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)}, revision="v1")
    commit = bench.hub.add("org/name", {"a.safetensors": safetensors(2)})
    first = bench.cache_by_library("org/name", "a.safetensors", revision="v1")
    second = bench.cache_by_library("org/name", "a.safetensors")
    models = "org/name@v1:a.safetensors:vae:one.safetensors, org/name:a.safetensors:vae:two.safetensors,"
    run = bench.utils(models + f"org/name@{commit}:a.safetensors:vae:three.safetensors")
    assert run.code == ALL_THERE
    assert (bench.models / "vae/one.safetensors").readlink() == first
    assert (bench.models / "vae/two.safetensors").readlink() == second
    assert (bench.models / "vae/three.safetensors").readlink() == second
    assert first != second
    assert bench.hub.requests == []


def test_a_host_cache_without_refs_and_in_lower_case(bench: Bench) -> None:
    bench.hub.add("Org/Name", {"a.safetensors": safetensors(1)}, revision="v1")
    bench.hub.add("Org/Name", {"a.safetensors": safetensors(2)})
    bench.cache_by_library("Org/Name", "a.safetensors", revision="v1")
    bench.cache_by_library("Org/Name", "a.safetensors")
    repository = (bench.cache / "models--Org--Name").rename(bench.cache / "models--org--name")
    shutil.rmtree(repository / "refs")
    first, second = sorted((repository / "snapshots").iterdir())
    models = "Org/Name:a.safetensors:vae"
    assert bench.utils(models).columns[0][1] == "host cache"
    assert (bench.models / "vae/a.safetensors").readlink() == (first / "a.safetensors").resolve()
    assert first.resolve() != second.resolve()
    assert bench.utils(models.replace(":a", f"@{second.name}:a").replace("vae", "loras")).code == ALL_THERE
    assert (bench.models / "loras/a.safetensors").readlink() == (second / "a.safetensors").resolve()
    assert bench.hub.requests == []


def test_a_volume_is_searched_in_the_folders_of_the_old_names_too(bench: Bench) -> None:
    old = bench.put(bench.volume / "clip/t5/a.safetensors", safetensors(1))
    bench.put(bench.volume / "unet/b.safetensors", safetensors(2))
    new = bench.put(bench.volume / "diffusion_models/b.safetensors", safetensors(3))
    run = bench.utils("org/name:a.safetensors:clip/t5,org/name:b.safetensors:unet")
    assert (run.code, set(run.sources.values())) == (ALL_THERE, {"network volume"})
    assert (bench.models / "text_encoders/t5/a.safetensors").readlink() == old
    assert (bench.models / "diffusion_models/b.safetensors").readlink() == new
    assert bench.hub.requests == []


def test_several_volumes_in_their_order_and_a_broken_file_on_the_first(bench: Bench) -> None:
    broken = bench.put(bench.folder / "pod/models/vae/a.safetensors", safetensors(1)[:-1])
    whole = bench.put(bench.volume / "vae/a.safetensors", safetensors(1))
    first = bench.put(bench.folder / "pod/models/vae/b.safetensors", safetensors(2))
    bench.put(bench.volume / "vae/b.safetensors", safetensors(2))
    volumes = f"{bench.folder}/not-mounted:{bench.folder}/pod:{bench.volume.parent}"
    run = bench.utils("org/name:a.safetensors:vae,org/name:b.safetensors:vae", VOLUME_DIRS=volumes)
    assert run.code == ALL_THERE
    assert (bench.models / "vae/a.safetensors").readlink() == whole
    assert (bench.models / "vae/b.safetensors").readlink() == first
    assert f"{broken} is not used" in run.stderr


def test_a_target_outside_the_models_folder_is_not_looked_for_on_a_volume(bench: Bench) -> None:
    bench.put(bench.volume / "a.pth", b"a")
    weights = bench.folder / "ComfyUI/custom_nodes/x/weights"
    run = bench.utils(f"org/name:a.pth:{weights}", "--link-only")
    assert (run.code, run.columns[0][:3]) == (ALL_THERE, ["org/name:a.pth", "to download", f"{weights}/a.pth"])


def test_places_that_cannot_be_read_are_warnings(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    unreadable = bench.folder / ("x" * 300)  # the file system refuses to look it up, as a stale mount does
    run = bench.utils(
        "org/name:a.pth:vae,org/name:*.pth:loras",
        HOST_CACHE_DIR=str(unreadable),
        VOLUME_DIRS=str(unreadable),
        HF_HUB_CACHE=str(unreadable),
    )
    assert run.code == ALL_THERE, run.stderr
    assert set(run.sources.values()) == {"download"}
    for source in ("host cache", "network volume", "local cache"):
        assert f"the {source} cannot be read" in run.stderr
    assert run.complaints == []


def test_link_only_leaves_the_rest_and_says_so(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)})
    bench.cache_by_library("org/name", "a.safetensors")
    run = bench.process("org/name:b.safetensors:vae,org/name:a.safetensors:vae,org/name:c/*:vae", "--link-only")
    assert run.code == ALL_THERE
    assert run.sources == {
        "org/name:a.safetensors": "host cache",
        "org/name:b.safetensors": "to download",
        "org/name:c/*": "to download",
    }
    assert bench.files_below_models() == ["vae/a.safetensors"]
    assert bench.hub.requests == []


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_in_the_way_of_a_folder_is_one_sentence(bench: Bench, cached: bool) -> None:
    bench.hub.add("org/name", {"a.pth": b"a", "b.pth": b"b"})
    if cached:
        bench.cache_by_library("org/name", "a.pth")
    bench.models.mkdir()
    (bench.models / "vae").write_text("a file")
    run = bench.utils("org/name:a.pth:vae,org/name:b.pth:loras")
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert str(bench.models / "vae") in run.complaints[0]
    assert bench.files_below_models() == ["loras/b.pth", "vae"]


# -- patterns


@pytest.mark.parametrize("source", ["host cache", "local cache"])
def test_a_pattern_is_expanded_by_a_cache(bench: Bench, source: str) -> None:
    names = ["s/1.safetensors", "s/2.safetensors", "s/3.txt", "t/4.safetensors", "s/deep/5.safetensors"]
    bench.hub.add("org/name", {name: safetensors(number) for number, name in enumerate(names)})
    for name in names:
        bench.cache_by_library("org/name", name, bench.cache if source == "host cache" else bench.local_cache)
    run = bench.utils("org/name:s/*.safetensors:loras")
    assert run.code == ALL_THERE
    assert run.sources == {"org/name:s/1.safetensors": source, "org/name:s/2.safetensors": source}
    assert bench.files_below_models() == ["loras/1.safetensors", "loras/2.safetensors"]
    # RunPod caches whole repositories; the local cache may lack some of the files, which the hub knows.
    assert len(bench.hub.requests) == (source == "local cache")


def test_a_pattern_of_which_the_local_cache_has_a_part(bench: Bench) -> None:
    bench.hub.add("org/name", {"1.pth": b"1", "2.pth": b"2"})
    bench.cache_by_library("org/name", "1.pth", bench.local_cache)
    offline = bench.process("org/name:?.pth:vae", HF_HUB_OFFLINE="1")
    assert (offline.code, offline.sources) == (ALL_THERE, {"org/name:1.pth": "local cache"})
    assert "taking the 1 that are there" in offline.complaints[0]
    run = bench.utils("org/name:?.pth:vae")
    assert (run.code, run.sources) == (ALL_THERE, {"org/name:1.pth": "local cache", "org/name:2.pth": "download"})


def test_a_pattern_takes_the_revision_that_was_asked_for(bench: Bench) -> None:
    bench.hub.add("org/name", {"old.pth": b"old"}, revision="v1")
    bench.hub.add("org/name", {"new.pth": b"new"})
    bench.cache_by_library("org/name", "old.pth", revision="v1")
    bench.cache_by_library("org/name", "new.pth")
    run = bench.utils("org/name@v1:*.pth:vae")
    assert (run.code, run.sources) == (ALL_THERE, {"org/name@v1:old.pth": "host cache"})


@pytest.mark.parametrize("where", ["network volume", "in place"])
def test_a_pattern_is_found_on_the_volume_and_in_place_without_the_hub(bench: Bench, where: str) -> None:
    folder = bench.volume if where == "network volume" else bench.models
    for name in ("1.safetensors", "2.safetensors", "other.pth"):
        bench.put(folder / "loras" / name, safetensors(1))
    bench.hub.refusals = [503] * 30
    assert bench.utils("org/name:split/?.safetensors:loras", "--link-only").code == ALL_THERE
    assert {"loras/1.safetensors", "loras/2.safetensors"} <= set(bench.files_below_models())
    run = bench.process("org/name:split/?.safetensors:loras", HF_HUB_OFFLINE="1")
    assert run.code == ALL_THERE, run.stderr


def test_files_of_a_pattern_that_share_a_name(bench: Bench) -> None:
    bench.hub.add("org/name", {"a/x.pth": b"a", "b/x.pth": b"b", "c.pth": b"c"})
    run = bench.utils("org/name:*/x.pth:vae,org/name:c.pth:vae")
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert "org/name:*/x.pth" in run.complaints[0]
    assert "org/name:a/x.pth" in run.complaints[0]
    assert "give it a LocalName" not in run.complaints[0]  # a pattern cannot have one
    assert "c.pth" in "".join(bench.files_below_models())


def test_a_file_named_alone_and_by_a_pattern_is_one_file(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a", "b.pth": b"b"})
    run = bench.utils("org/name:a.pth:vae,org/name:*.pth:vae")
    assert (run.code, run.sources) == (ALL_THERE, {"org/name:a.pth": "download", "org/name:b.pth": "download"})
    assert len(bench.hub.fetched()) == 2


# -- MODELS_FILE


def test_a_list_in_a_file(bench: Bench) -> None:
    bench.hub.add("org/name", {f"{name}.pth": name.encode() for name in "abc"})
    lines = [
        "# mine",
        "org/name:a.pth:vae # a, b",
        "",
        "  # org/name:x.pth:vae, org/name:y.pth:vae",
        "org/name:b.pth:vae,",
    ]
    listed = bench.put(bench.folder / "models.txt", ("\ufeff" + "\r\n".join(lines)).encode())
    run = bench.utils("org/name:c.pth:vae", MODELS_FILE=str(listed))
    assert run.code == ALL_THERE, run.stderr
    assert bench.files_below_models() == ["vae/a.pth", "vae/b.pth", "vae/c.pth"]
    bench.put(listed, b"# one\norg/name:a.pth:vae\n\xff\xfe:bad\norg/name:c.pth:vae\n")
    run = bench.utils("no", "--link-only", MODELS_FILE=str(listed))
    assert run.code == BAD_CONFIGURATION
    assert [complaint.partition(" (")[0] for complaint in run.complaints] == ["MODELS entry 1", "MODELS_FILE entry 2"]
    assert set(run.sources.values()) == {"in place"}


@pytest.mark.parametrize("there", [False, True])
def test_a_list_that_cannot_be_read_is_one_sentence_and_models_go_on(bench: Bench, there: bool) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    path = bench.folder if there else bench.folder / "nowhere.txt"
    run = bench.utils("org/name:a.pth:vae", MODELS_FILE=str(path))
    assert (run.code, bench.files_below_models()) == (BAD_CONFIGURATION, ["vae/a.pth"])
    reason = "Is a directory" if there else "No such file or directory"
    assert run.complaints == [f"MODELS_FILE={path} cannot be read: {reason}"]


# -- check


def test_check_says_it_and_does_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = {f"{name}.safetensors": safetensors(number) for number, name in enumerate("abcd")}
    bench.hub.add("org/name", contents)
    for name, size_bytes in (("c", 3_210_000_000), ("d", 40_000_000)):
        bench.hub.blob(contents[f"{name}.safetensors"]).claimed_size_bytes = size_bytes
    bench.cache_by_library("org/name", "a.safetensors")
    bench.put(bench.volume / "vae/b.safetensors", contents["b.safetensors"])
    (bench.ramdisk / "run").mkdir(parents=True)
    before = files_below(bench.folder)
    usage = shutil.disk_usage(bench.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1_500_000_000))

    run = bench.utils("org/name:a.safetensors:vae,org/name:b.safetensors:vae", "--check")
    assert (run.code, bench.hub.requests) == (ALL_THERE, [])

    run = bench.utils("org/name:?.safetensors:vae", "--check", DOWNLOAD_TO="nonsense")
    assert run.code == BAD_CONFIGURATION
    run = bench.utils(",".join(f"org/name:{name}:vae" for name in contents), "--check")
    assert run.code == SOME_MISSING
    assert run.columns[:4] == [
        ["org/name:a.safetensors", "host cache", f"{bench.models}/vae/a.safetensors", "0.1 MB", "0.00 s"],
        ["org/name:b.safetensors", "network volume", f"{bench.models}/vae/b.safetensors", "0.1 MB", "0.00 s"],
        ["org/name:c.safetensors", "to download", f"{bench.models}/vae/c.safetensors", "3210.0 MB"],
        ["org/name:d.safetensors", "to download", f"{bench.models}/vae/d.safetensors", "40.0 MB"],
    ]
    summary = f"0.00 GB are there, 3.25 GB to download; {bench.folder}/ComfyUI has 1.50 GB free"
    assert run.stdout.splitlines()[4:] == [summary]
    assert files_below(bench.folder) == before
    assert not bench.models.exists()
    assert {request.method for request in bench.hub.requests if "/api/" not in request.path} == {"HEAD"}


def test_check_says_what_cannot_be_had(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"a"}, gated=True)
    run = bench.process("org/gated:a.pth:vae", "--check")
    assert (run.code, run.columns[0][1]) == (SOME_MISSING, "missing")
    assert "the repository is gated" in run.complaints[0]
    assert not bench.models.exists()


def test_check_measures_the_disk_that_downloads_go_to(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.volume.mkdir(parents=True)
    run = bench.utils("org/name:a.pth:vae", "--check", DOWNLOAD_TO="volume")
    assert str(bench.volume.parent) in run.stdout.splitlines()[-1]
    assert files_below(bench.volume) == []


# -- what is noted for the handler


def test_the_manifest_names_source_path_size_and_sha256(bench: Bench) -> None:
    contents = {f"{name}.safetensors": safetensors(number) for number, name in enumerate("abc")}
    bench.hub.add("org/name", contents)
    bench.hub.add("org/small", {"e.pth": b"small"}, are_small=True)
    bench.cache_by_library("org/name", "a.safetensors")
    bench.put(bench.volume / "vae/b.safetensors", contents["b.safetensors"])
    (bench.ramdisk / "run").mkdir(parents=True)
    models = ",".join(f"org/name:{name}.safetensors:vae" for name in "abc")
    models += ",org/name@v9:d.pth:vae,org/small:e.pth:vae,bad"
    assert bench.utils(models, "--link-only").code == BAD_CONFIGURATION
    assert {name: record["source"] for name, record in bench.records().items()} == {
        "a.safetensors": "host cache",
        "b.safetensors": "network volume",
        "c.safetensors": None,
        "d.pth": None,
        "e.pth": None,
    }
    assert bench.utils(models).code == BAD_CONFIGURATION
    records = bench.records()
    assert {name: record["source"] for name, record in records.items()} == {
        "a.safetensors": "host cache",  # also of the link that is there already
        "b.safetensors": "network volume",
        "c.safetensors": "download",
        "d.pth": None,
        "e.pth": "download",
    }
    record = records["c.safetensors"]
    assert 0 < record.pop("seconds") < 60
    assert record == {
        "name": "c.safetensors",
        "entry": "org/name:c.safetensors",
        "path": f"{bench.models}/vae/c.safetensors",
        "source": "download",
        "size_bytes": len(contents["c.safetensors"]),
        "sha256": sha256(contents["c.safetensors"]),
        "error": None,
    }
    assert records["e.pth"]["sha256"] is None  # the hub names none for small files
    assert "has no revision v9" in records["d.pth"]["error"]


def test_the_manifest_knows_the_sha256_of_a_cached_file(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)})
    bench.cache_by_library("org/name", "a.safetensors")
    (bench.ramdisk / "run").mkdir(parents=True)
    for _ in range(2):  # linked, and found linked
        assert bench.utils("org/name:a.safetensors:vae", "--link-only").code == ALL_THERE
        assert bench.records()["a.safetensors"]["sha256"] == sha256(safetensors(1))


def test_a_manifest_that_cannot_be_written_is_a_sentence(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    (bench.ramdisk / "run" / "models.json").mkdir(parents=True)
    run = bench.utils("org/name:a.pth:vae")
    assert (run.code, bench.files_below_models()) == (ALL_THERE, ["vae/a.pth"])
    assert run.complaints == [f"{bench.ramdisk}/run/models.json cannot be written: Is a directory"]


# -- prefetch


def resident_bytes(path: Path) -> int:
    """How much of a file lies in the page cache (mincore)."""
    size_bytes, page = path.stat().st_size, mmap.PAGESIZE
    pages = -(-size_bytes // page)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size_bytes) as view:
        start = (ctypes.c_char * size_bytes).from_buffer(view)
        try:
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size_bytes), flags):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del start
    return sum(flag & 1 for flag in flags) * page


def drop_pages(path: Path) -> None:
    """Have the kernel forget a file; skips the test where it does not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_bytes(path):
        pytest.skip(f"the file system of {path.parent} keeps its pages in memory")


CHUNK = 1 << 20


def cold_models(bench: Bench, size_bytes: int) -> list[Path]:
    """Three linked files whose pages are in no cache; their names are in another order than MODELS."""
    paths = []
    for name in ("c", "a", "b"):
        real = bench.put(bench.volume / "vae" / f"{name}.pth", name.encode() * size_bytes)
        (bench.models / "vae").mkdir(parents=True, exist_ok=True)
        (bench.models / "vae" / real.name).symlink_to(real)
        drop_pages(real)
        paths.append(real)
    return paths


COLD = "org/name:c.pth:vae,org/name:gone.pth:vae,org/name:[ab].pth:vae,org/name:?.pth:vae"


def test_prefetch_fills_the_page_cache(bench: Bench) -> None:
    paths = cold_models(bench, 2 * CHUNK)
    (bench.models / "vae/gone.pth").symlink_to("/gone")
    run = bench.process(COLD, "--prefetch")
    assert (run.code, run.stdout, bench.hub.requests) == (ALL_THERE, "", [])
    assert [resident_bytes(path) for path in paths] == [2 * CHUNK] * 3
    assert run.stderr.startswith("read 3 of 3 models into memory: 0.01 GB in ")
    assert not (bench.ramdisk / "run").exists()


def test_prefetch_reads_in_the_order_of_models_up_to_its_share(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    c, a, b = cold_models(bench, 8 * CHUNK)
    nices: list[None] = []
    monkeypatch.setattr(prefetch, "free_memory_bytes", lambda: 20 * CHUNK)
    monkeypatch.setattr(prefetch, "lower_priority", lambda: nices.append(None))
    run = bench.utils("org/name:c.pth:vae,org/name:a.pth:vae,org/name:b.pth:vae", "--prefetch")  # a share of 0.5
    assert (run.code, len(nices)) == (ALL_THERE, 1)
    assert "read 2 of 3 models into memory: 0.01 GB" in run.stderr
    assert resident_bytes(c) == 8 * CHUNK
    assert 2 * CHUNK <= resident_bytes(a) < 8 * CHUNK  # what the kernel reads ahead is beyond the share
    assert resident_bytes(b) == 0


@pytest.mark.parametrize(
    ("fraction", "code"), [("0", ALL_THERE), ("0.0", ALL_THERE), ("nan", 2), ("1.01", 2), ("-0.1", 2), ("half", 2)]
)
def test_no_share_and_no_number(bench: Bench, monkeypatch: pytest.MonkeyPatch, fraction: str, code: int) -> None:
    bench.put(bench.models / "vae/a.pth", b"a" * CHUNK)
    monkeypatch.setattr(prefetch, "lower_priority", lambda: None)
    run = bench.utils("org/name:a.pth:vae", "--prefetch", PREFETCH_FRACTION=fraction)
    assert (run.code, run.stdout) == (code, "")
    told = [] if code == ALL_THERE else [f"PREFETCH_FRACTION={fraction} is no number from 0 to 1"]
    assert (run.complaints, "into memory" in run.stderr) == (told, False)


# -- configuration


def test_a_bad_entry_is_reported_and_the_good_one_done(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    run = bench.process("org/name:a.pth,\n org/name:a.pth:vae")
    assert run.code == BAD_CONFIGURATION
    assert run.complaints[0].startswith("MODELS entry 1 ('org/name:a.pth')")
    assert bench.files_below_models() == ["vae/a.pth"]


@pytest.mark.parametrize("arguments", [[], ["--link-only"], ["--check"], ["--prefetch"]])
def test_a_checkout_that_is_not_there(bench: Bench, arguments: list[str]) -> None:
    run = bench.utils("org/name:a.pth:vae", *arguments, COMFYUI_DIR="/nowhere")
    assert run.code == BAD_CONFIGURATION
    assert run.complaints == ["COMFYUI_DIR=/nowhere is not a folder: set it to the ComfyUI checkout"]


@pytest.mark.parametrize("arguments", [[], ["--link-only"], ["--check"]])
def test_no_models_is_no_work(bench: Bench, arguments: list[str]) -> None:
    run = bench.process("", *arguments)
    assert (run.code, run.stdout, run.stderr) == (ALL_THERE, "", "")


@pytest.mark.parametrize("arguments", [["--check", "--prefetch"], ["--chek"], ["MODELS"]])
def test_arguments_that_make_no_sense(bench: Bench, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.utils("org/name:a.pth:vae", *arguments)
    assert caught.value.code == BAD_CONFIGURATION


@pytest.mark.parametrize("value", [None, ""])
def test_an_empty_variable_is_as_good_as_none(value: str | None) -> None:
    names = (
        "MODELS MODELS_FILE COMFYUI_DIR HOST_CACHE_DIR VOLUME_DIRS DOWNLOAD_TO PREFETCH_FRACTION HF_TOKEN HF_HOME"
        " HF_HUB_CACHE RAMDISK_DIR"
    )
    settings = utils.Settings.from_environment({} if value is None else dict.fromkeys(names.split(), value))
    assert (settings.models, settings.models_file, settings.token) == ("", None, None)
    assert (settings.download_to, settings.prefetch_fraction) == ("container", "0.5")
    assert settings.places.models_dir == Path("/ComfyUI/models")
    assert settings.places.host_cache_dir == Path("/runpod-volume/huggingface-cache/hub")
    assert settings.places.volume_dirs == (Path("/runpod-volume/models"), Path("/workspace/models"))
    assert settings.places.local_cache_dir == Path("/root/.cache/huggingface/hub")
