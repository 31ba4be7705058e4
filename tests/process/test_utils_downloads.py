"""utils.py downloads: a real huggingface_hub against the hub on 127.0.0.1, whole or absent, alone and beside others."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import MEMBER_TOKEN, STRANGER_TOKEN, running_hub, sha256
from huggingface_hub import constants
from model_bench import (
    ALL_THERE,
    BAD_CONFIGURATION,
    RUN_LIMIT_S,
    SOME_MISSING,
    UTILS,
    Bench,
    files_below,
    output_until,
    point_library_at,
    running_bench,
    safetensors,
)

from worker.models import ModelError, download
from worker.models.download import Download, remove_orphans, run_downloads
from worker.models.grammar import ModelEntry
from worker.models.hub import RETRY_WAITS_S, expand_on_hub, metadata_of
from worker.models.lease import STALE_S

MB = 1_000_000


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with running_bench(tmp_path, monkeypatch) as bench:
        yield bench


def entry_at(path: Path, repo_id: str = "org/name") -> ModelEntry:
    return ModelEntry(repo_id, None, path.name, path)


def downloads_of(bench: Bench, *names: str) -> list[Download]:
    places = [bench.models / "vae" / name for name in names]
    return [Download(entry_at(place), place, is_shared=False) for place in places]


def make_old(*paths: Path) -> None:
    """As if nobody had touched them for an hour."""
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


# -- what is there afterwards


def test_a_model_is_downloaded_once(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"split/a.safetensors": content})
    run = bench.process("org/name:split/a.safetensors:vae:b.safetensors")
    path = bench.models / "vae" / "b.safetensors"
    assert run.code == ALL_THERE, run.stderr
    assert run.columns[0][:4] == ["org/name:split/a.safetensors", "download", str(path), "0.1 MB"]
    assert len(run.stderr.splitlines()) == 1  # no bars
    assert path.read_bytes() == content
    assert not path.is_symlink()
    assert bench.files_below_models() == ["vae/b.safetensors"]
    assert {request.path.partition("/resolve/")[0] for request in bench.hub.requests if not request.by_storage} == {
        "/org/name"
    }
    bench.hub.requests.clear()
    again = bench.utils("org/name:split/a.safetensors:vae:b.safetensors")
    assert (again.code, again.columns[0][1]) == (ALL_THERE, "in place")
    assert bench.hub.requests == []


def test_a_broken_file_and_a_dangling_link_are_replaced(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)})
    bench.put(bench.models / "vae/a.safetensors", safetensors(1)[:-1])
    (bench.models / "vae/b.safetensors").symlink_to("/gone")
    run = bench.utils("org/name:a.safetensors:vae,org/name:b.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == safetensors(1)
    assert (bench.models / "vae/b.safetensors").read_bytes() == safetensors(2)


def test_a_broken_file_in_the_local_cache_is_downloaded_anew(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.safetensors": safetensors(1)})
    bench.cache_by_library("org/name", "a.safetensors", bench.local_cache).write_bytes(safetensors(1)[:-1])
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == safetensors(1)


def test_the_token_opens_gated_and_private_repositories_and_stays_with_the_hub(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.safetensors": safetensors(1)}, gated=True)
    bench.hub.add("org/private", {"b.safetensors": safetensors(2)}, private=True)
    models = "org/gated:a.safetensors:vae,org/private:*.safetensors:vae"
    run = bench.utils(models, token=f" {MEMBER_TOKEN}\n")
    assert run.code == ALL_THERE, run.stderr
    assert bench.files_below_models() == ["vae/a.safetensors", "vae/b.safetensors"]
    to_hub = {request.authorization for request in bench.hub.requests if not request.by_storage}
    to_storage = {request.authorization for request in bench.hub.requests if request.by_storage}
    assert (to_hub, to_storage) == ({f"Bearer {MEMBER_TOKEN}"}, {None})


def test_a_saved_login_is_not_used_by_halves(bench: Bench) -> None:
    """For HEAD, but not for GET: then --check would promise what cannot be had."""
    bench.hub.add("org/gated", {"a.pth": b"a"}, gated=True)
    bench.hub.add("org/open", {"b.pth": b"b", "c.pth": b"c"})
    (bench.folder / "token").write_text(MEMBER_TOKEN)
    models = "org/gated:a.pth:vae,org/open:b.pth:vae,org/open:c*:vae"
    assert [line[1] for line in bench.utils(models, "--check").columns[:3]] == ["missing", "to download", "to download"]
    assert list(bench.utils(models).sources.values()) == ["missing", "download", "download"]
    assert {request.authorization for request in bench.hub.requests} == {None}


def test_a_repository_that_was_renamed_is_followed(bench: Bench) -> None:
    bench.hub.add("org/new", {"a.pth": b"a"}, gated=True)
    bench.hub.renamed["org/old"] = "org/new"
    run = bench.utils("org/old:a.pth:vae", token=MEMBER_TOKEN)
    assert (run.code, bench.files_below_models()) == (ALL_THERE, ["vae/a.pth"]), run.stderr


def test_small_files_come_from_the_hub_itself(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"small"}, are_small=True)
    run = bench.utils("org/name:a.pth:vae")
    assert (run.code, (bench.models / "vae/a.pth").read_bytes()) == (ALL_THERE, b"small")
    assert bench.hub.fetched() == []


def test_a_pattern_is_expanded_by_the_hub(bench: Bench) -> None:
    names = [f"s/{number}.pth" for number in range(5)]
    bench.hub.add("org/name", {name: name.encode() for name in [*names, "s/x.txt", "5.pth"]}, revision="v1")
    bench.hub.add("org/name", {"s/other.pth": b"other"})
    run = bench.utils("org/name@v1:s/*.pth:vae")
    assert run.code == ALL_THERE, run.stderr
    assert run.sources == {f"org/name@v1:{name}": "download" for name in names}
    assert bench.files_below_models() == [f"vae/{number}.pth" for number in range(5)]


# -- several at once


def test_several_come_at_once(bench: Bench) -> None:
    contents = {f"{number}.pth": bytes([number]) * 1000 for number in range(3)}
    bench.hub.add("org/name", contents)
    bench.hub.meeting = threading.Barrier(3)  # nobody is answered until all three have asked
    run = bench.utils("org/name:*.pth:vae")
    assert run.code == ALL_THERE, run.stderr
    assert not bench.hub.meeting.broken
    assert len(bench.hub.fetched()) == 3


def test_the_biggest_comes_first(bench: Bench) -> None:
    contents = {f"{size}.pth": b"x" * size for size in (20, 50, 10, 40, 30)}
    bench.hub.add("org/name", contents)
    one_at_a_time = downloads_of(bench, *contents)
    run_downloads(one_at_a_time, token=None, say=lambda _: None, parallel=1)
    assert [one.error for one in one_at_a_time] == [None] * 5
    assert bench.hub.fetched() == [sha256(b"x" * size) for size in (50, 40, 30, 20, 10)]


def test_a_line_tells_every_few_seconds_how_far_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = b"small", b"\0" * 22 * MB  # the library writes pieces of 10.5 MB
    bench.hub.add("org/name", {"a.pth": large, "b.pth": small})
    bench.hub.blob(large).stalled = threading.Event()
    monkeypatch.setattr(download, "PROGRESS_EVERY_S", 0.1)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if re.fullmatch(r"1 of 2 models, 0\.01 of 0\.02 GB, \d+ MB/s, \d+ s left", line):
            bench.hub.blob(large).released.set()

    both = downloads_of(bench, "a.pth", "b.pth")
    run_downloads(both, token=None, say=say)
    assert [one.error for one in both] == [None, None], lines
    assert lines[0] == "downloading 2 models, 0.02 GB"


# -- the hub and the network have their moments


def test_a_cut_connection_is_resumed(bench: Bench) -> None:
    content = safetensors(1, 300_000)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.hub.blob(content).cut_after_bytes = 200_000
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == content
    ranges = [request.range for request in bench.hub.requests if request.by_storage]
    assert ranges[0] is None
    assert len(ranges) == 2


def test_a_large_file_goes_on_where_it_was_cut(bench: Bench) -> None:
    content = os.urandom(11 * MB)
    bench.hub.add("org/name", {"a.pth": content})
    bench.hub.blob(content).cut_after_bytes = 11 * MB - 1
    run = bench.utils("org/name:a.pth:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.pth").read_bytes() == content
    assert [request.range for request in bench.hub.requests if request.by_storage] == [None, f"bytes={10 << 20}-"]


def test_a_storage_that_falls_silent_is_asked_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.hub.blob(content).silent_answers = 1
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == ALL_THERE, run.stderr
    assert (bench.models / "vae/a.safetensors").read_bytes() == content
    assert len(bench.hub.fetched()) == 2


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_unwell_for_a_moment_is_asked_again(bench: Bench, status: int) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.hub.refusals = [status]
    waits_s: list[float] = []
    [one] = downloads_of(bench, "a.pth")
    run_downloads([one], token=None, say=lambda _: None, sleep=waits_s.append)
    assert (one.error, bench.hub.refusals, tuple(waits_s)) == (None, [], RETRY_WAITS_S[:1])


@pytest.mark.parametrize("refusals", [1, 9])
def test_a_storage_that_is_unwell_is_asked_again(bench: Bench, refusals: int) -> None:
    bench.hub.add("org/name", {"a.pth": b"a", "b.pth": b"b"})
    bench.hub.blob(b"a").refusals = [503] * refusals
    waits_s: list[float] = []
    one, other = downloads_of(bench, "a.pth", "b.pth")
    run_downloads([one, other], token=None, say=lambda _: None, sleep=waits_s.append)
    attempts = bench.hub.fetched().count(sha256(b"a"))
    if refusals == 1:
        assert (one.error, attempts, tuple(waits_s)) == (None, 2, RETRY_WAITS_S[:1])
    else:
        assert str(one.error) == "org/name:a.pth: Hugging Face answered with 503: try again later"
        assert (attempts, tuple(waits_s)) == (3, RETRY_WAITS_S)
    assert other.error is None
    assert bench.files_below_models() == ["vae/a.pth", "vae/b.pth"][refusals != 1 :]


def test_a_storage_that_limits_the_rate_is_asked_again(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.hub.blob(b"a").refusals = [429]
    assert bench.utils("org/name:a.pth:vae").code == ALL_THERE
    assert bench.hub.blob(b"a").refusals == []


@pytest.mark.parametrize(
    ("status", "attempts", "sentence"),
    [
        (400, 1, "answered with 400"),
        (401, 1, "access is refused (401)"),
        (403, 1, "access is refused (403)"),
        (429, 3, "limits the rate of requests (429)"),
        (503, 3, "answered with 503: try again later"),
    ],
)
@pytest.mark.parametrize("asked", ["a file", "a list"])
def test_only_what_may_pass_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, asked: str, status: int, attempts: int, sentence: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the library's own waits
    bench.hub.refusals = [status] * 30
    waits_s: list[float] = []
    place = bench.models / "vae/a.pth"
    with pytest.raises(ModelError, match=re.escape(sentence)) as caught:
        if asked == "a file":
            metadata_of(entry_at(place), None, waits_s.append)
        else:
            expand_on_hub(ModelEntry("org/name", None, "*.pth", place.with_name("*.pth")), None, waits_s.append)
    assert str(caught.value).startswith("org/name:")
    assert "\n" not in str(caught.value)
    assert len(bench.hub.requests) == attempts
    assert tuple(waits_s) == RETRY_WAITS_S[: attempts - 1]
    assert not bench.models.exists()


def test_a_hub_that_keeps_silent_about_a_repository_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.hub.silence = threading.Event()
    with pytest.raises(ModelError, match="no connection to"):
        expand_on_hub(ModelEntry("org/name", None, "*.pth", bench.models / "vae/*.pth"), None, lambda _: None)


def test_no_network_is_one_sentence_without_the_token(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as closed:
        address = closed.url.removeprefix("http://")
    point_library_at(f"http://mirror:{MEMBER_TOKEN}@{address}", monkeypatch)
    waits_s: list[float] = []
    with pytest.raises(ModelError) as caught:
        metadata_of(entry_at(bench.models / "vae/a.pth"), MEMBER_TOKEN, waits_s.append)
    assert tuple(waits_s) == RETRY_WAITS_S
    assert f"no connection to http://mirror:***@{address} (ConnectError: [Errno 111]" in str(caught.value)
    assert MEMBER_TOKEN not in str(caught.value)


# -- what cannot be had


def test_each_refusal_is_one_sentence_and_the_good_ones_go_on(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"gated"}, gated=True)
    bench.hub.add("org/private", {"b.pth": b"private"}, private=True)
    bench.hub.add("org/open", {"c.pth": b"open"})
    run = bench.process(
        "org/gated:a.pth:vae,org/private:b.pth:vae,org/none:a.pth:vae:n.pth,"
        "org/open:no.pth:vae,org/open@v9:c.pth:vae:v9.pth,org/open:c.pth:vae"
    )
    assert run.code == SOME_MISSING
    assert run.complaints == [
        f"org/gated:a.pth: the repository is gated: accept its terms at {bench.hub.url}/org/gated and set HF_TOKEN",
        "org/private:b.pth: there is no repository at "
        f"{bench.hub.url}/org/private, or it is private: check the RepoID, or set HF_TOKEN",
        "org/none:a.pth: there is no repository at "
        f"{bench.hub.url}/org/none, or it is private: check the RepoID, or set HF_TOKEN",
        f"org/open:no.pth: the repository has no such file: look at {bench.hub.url}/org/open/tree/main",
        f"org/open@v9:c.pth: the repository has no revision v9: look at {bench.hub.url}/org/open/tree/main",
    ]
    assert [line[1] for line in run.columns] == ["missing"] * 5 + ["download"]
    assert bench.files_below_models() == ["vae/c.pth"]


def test_the_same_refusals_for_patterns(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"gated"}, gated=True)
    bench.hub.add("org/private", {"b.pth": b"private"}, private=True)
    bench.hub.add("org/open", {"c.pth": b"open"})
    run = bench.utils(
        "org/gated:*.pth:vae,org/private:*.pth:vae,org/open:*.bin:vae,org/open@v9:*.pth:vae,org/open:c.pth:vae"
    )
    assert run.code == SOME_MISSING
    assert run.complaints == [
        f"org/gated:*.pth: the repository is gated: accept its terms at {bench.hub.url}/org/gated and set HF_TOKEN",
        "org/private:*.pth: there is no repository at "
        f"{bench.hub.url}/org/private, or it is private: check the RepoID, or set HF_TOKEN",
        f"org/open:*.bin: no file of the repository matches: look at {bench.hub.url}/org/open/tree/main",
        f"org/open@v9:*.pth: the repository has no revision v9: look at {bench.hub.url}/org/open/tree/main",
    ]
    assert bench.files_below_models() == ["vae/c.pth"]


def test_a_token_without_rights_is_told_what_it_lacks(bench: Bench) -> None:
    bench.hub.add("org/gated", {"a.pth": b"gated"}, gated=True)
    bench.hub.add("org/private", {"b.pth": b"private"}, private=True)
    run = bench.utils("org/gated:a.pth:vae,org/private:b.pth:vae", token=STRANGER_TOKEN)
    assert run.code == SOME_MISSING
    assert run.complaints[0].endswith("/org/gated with the account of HF_TOKEN")
    assert run.complaints[1].endswith("or let HF_TOKEN's account read it")


@pytest.mark.parametrize("filename", ["a.pth", "*.pth"])
@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("hf_that_has_expired_long_ago", "does not accept HF_TOKEN (401)"),
        ("hf_two\nlines", "characters that no token has"),
        ("hf_päste", "characters that no token has"),
    ],
    ids=["expired", "two lines", "not ASCII"],
)
def test_a_bad_token(bench: Bench, filename: str, token: str, sentence: str) -> None:
    bench.hub.add("org/open", {"a.pth": b"open"})
    run = bench.utils(f"org/open:{filename}:vae", token=token)
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert sentence in run.complaints[0]
    assert bench.files_below_models() == []


def test_offline_is_named(bench: Bench) -> None:
    run = bench.process("org/name:a.safetensors:vae,org/name:*.pth:vae", HF_HUB_OFFLINE="1")
    assert run.code == SOME_MISSING
    assert ["HF_HUB_OFFLINE forbids it" in complaint for complaint in run.complaints] == [True, True]
    assert bench.hub.requests == []


# -- whole or absent


@pytest.mark.parametrize("before", [None, b"broken"])
def test_wrong_bytes_of_the_right_length_are_tried_twice(bench: Bench, before: bytes | None) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    place = bench.models / "vae/a.safetensors"
    if before:
        bench.put(place, before)
    bench.hub.blob(content).wrong_answers = 2
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == SOME_MISSING
    assert run.complaints == [
        "org/name:a.safetensors: the file that came has not the content that the hub promises (sha256); run again, or"
        " ask the owner of the repository"
    ]
    assert len(bench.hub.fetched()) == 2
    assert bench.files_below_models() == (["vae/a.safetensors"] if before else [])
    assert not before or place.read_bytes() == before
    bench.hub.blob(content).wrong_answers = 1
    assert bench.utils("org/name:a.safetensors:vae").code == ALL_THERE
    assert place.read_bytes() == content
    assert len(bench.hub.fetched()) == 4


@pytest.mark.parametrize("fault", ["shorter than the hub said", "shorter than its header says"])
def test_a_file_that_is_not_whole_never_gets_its_name(bench: Bench, fault: str) -> None:
    content = safetensors(1)[:-1]
    bench.hub.add("org/name", {"a.safetensors": content})
    if fault == "shorter than the hub said":
        bench.hub.blob(content).claimed_size_bytes = len(content) + 1
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == SOME_MISSING
    assert len(run.complaints) == 1
    assert ("download failed" if "hub" in fault else "its header says") in run.complaints[0]
    assert bench.files_below_models() == []


def test_a_failed_replacement_leaves_the_old_file(bench: Bench) -> None:
    broken = bench.put(bench.models / "vae/a.safetensors", b"broken")
    assert bench.utils("org/none:a.safetensors:vae").code == SOME_MISSING
    assert broken.read_bytes() == b"broken"


# -- space


def test_no_space_is_noticed_before_the_first_byte(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.hub.blob(content).claimed_size_bytes = 10**18
    run = bench.utils("org/name:a.safetensors:vae")
    assert run.code == SOME_MISSING
    assert "no space: it has 1,000,000,000,000.0 MB" in run.complaints[0]
    assert [request.method for request in bench.hub.requests] == ["HEAD"]


def test_no_space_for_the_sum_is_noticed_before_the_first_byte(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [safetensors(number, 40_000) for number in range(3)]
    bench.hub.add("org/name", {f"{number}.safetensors": content for number, content in enumerate(contents)})
    usage = shutil.disk_usage(bench.folder)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    run = bench.utils("org/name:0.safetensors:vae,org/name:1.safetensors:loras,org/name:2.safetensors:vae")
    assert run.code == SOME_MISSING
    assert [line[1] for line in run.columns] == ["download", "download", "missing"]
    assert "2.safetensors: no space" in run.complaints[0]
    assert set(bench.hub.fetched()) == {sha256(content) for content in contents[:2]}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("download_to", ["container", "volume"])
def test_no_space_is_told_with_what_to_enlarge(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, download_to: str, number: int
) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.volume.parent.mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO=download_to)
    assert run.code == SOME_MISSING
    place = (bench.volume if download_to == "volume" else bench.models) / "vae"
    said, _, advice = run.complaints[0].partition(f"no space left at {place}")
    assert said == "org/name:a.pth: "
    assert download_to in advice
    assert files_below(bench.folder / "volume") == bench.files_below_models() == []


@pytest.mark.parametrize("download_to", ["container", "volume"])
def test_a_disk_that_runs_full_in_mid_download(bench: Bench, download_to: str) -> None:
    """A tmpfs of 1 MB in a namespace of its own; the hub does not say how large the file is."""
    content = b"a" * 2 * MB
    bench.hub.add("org/name", {"a.pth": content})
    bench.hub.blob(content).claimed_size_bytes = None
    disk = bench.models if download_to == "container" else bench.volume
    disk.mkdir(parents=True)
    inside = 'mount -t tmpfs -o size=1m tmpfs "$0" || exit 77; "$@"; code=$?; cd "$0" && find . -type f; exit "$code"'
    finished = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", inside, disk, sys.executable, UTILS],
        env=bench.environment("org/name:a.pth:vae", DOWNLOAD_TO=download_to),
        capture_output=True,
        text=True,
        timeout=RUN_LIMIT_S,
        check=False,
    )
    if finished.returncode == 77 or finished.stderr.startswith("unshare:"):
        pytest.skip(f"needs the right to mount a tmpfs in a namespace: {finished.stderr.strip()}")
    assert finished.returncode == SOME_MISSING, finished.stderr
    assert f"utils.py: org/name:a.pth: no space left at {disk}/vae" in finished.stderr
    assert "./" not in finished.stdout  # nothing of it has stayed


# -- the network volume


def test_downloads_go_to_the_volume_where_that_is_asked_for(bench: Bench) -> None:
    contents = {f"{number}.safetensors": safetensors(number) for number in range(6)}
    bench.hub.add("org/name", contents)
    bench.volume.parent.mkdir()
    weights = bench.folder / "ComfyUI/custom_nodes/x"
    models = f"org/name:?.safetensors:unet,org/name:0.safetensors:{weights}"
    run = bench.process(models, DOWNLOAD_TO="volume")
    assert run.code == ALL_THERE, run.stderr
    assert files_below(bench.volume) == [f"diffusion_models/{name}" for name in contents]
    for name, content in contents.items():
        link = bench.models / "diffusion_models" / name
        assert link.readlink() == bench.volume / "diffusion_models" / name
        assert link.read_bytes() == content
    assert not (weights / "0.safetensors").is_symlink()
    bench.hub.requests.clear()
    shutil.rmtree(bench.models)  # the next worker's disk is new
    again = bench.utils("org/name:3.safetensors:unet", DOWNLOAD_TO="volume")
    assert (again.code, again.columns[0][1], bench.hub.requests) == (ALL_THERE, "network volume", [])


@pytest.mark.parametrize("linked", [".", "vae"])
def test_a_models_folder_that_is_a_link_to_the_volume_keeps_its_file(bench: Bench, linked: str) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    link = bench.models / linked
    link.parent.mkdir(exist_ok=True)
    (bench.volume / linked).mkdir(parents=True)
    link.symlink_to(bench.volume / linked)
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO="volume")
    assert run.code == ALL_THERE, run.stderr
    assert not (bench.volume / "vae/a.pth").is_symlink()
    assert (bench.models / "vae/a.pth").read_bytes() == b"a"


def test_no_volume_is_said_and_the_container_is_used(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    volumes = f"{bench.folder}/not-mounted:{bench.folder}/neither"
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO="volume", VOLUME_DIRS=volumes)
    assert (run.code, bench.files_below_models()) == (ALL_THERE, ["vae/a.pth"])
    assert not (bench.models / "vae/a.pth").is_symlink()
    assert run.complaints == [
        "DOWNLOAD_TO=volume, but no network volume can be written to: models go to the container's disk"
    ]


def test_the_first_volume_that_can_be_written_to(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.volume.parent.mkdir()
    volumes = f"{bench.folder}/not-mounted:{bench.volume.parent}"
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO="volume", VOLUME_DIRS=volumes)
    assert (run.code, run.complaints, files_below(bench.volume)) == (ALL_THERE, [], ["vae/a.pth"])


def test_a_volume_that_cannot_be_looked_at(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO="volume", VOLUME_DIRS=str(bench.folder / ("x" * 300)))
    assert (run.code, bench.files_below_models()) == (ALL_THERE, ["vae/a.pth"])
    assert len(run.complaints) == 1


def test_a_destination_that_is_none(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    bench.volume.mkdir(parents=True)
    run = bench.utils("org/name:a.pth:vae", DOWNLOAD_TO="nonsense")
    assert (run.code, bench.files_below_models()) == (BAD_CONFIGURATION, ["vae/a.pth"])
    assert run.complaints == ["DOWNLOAD_TO=nonsense is taken as container: set it to container or volume"]
    assert files_below(bench.volume) == []


# -- beside other runs, killed ones among them


def stalled_blob(bench: Bench, content: bytes) -> threading.Event:
    """The file comes in halves, the second one when `released` is set."""
    stalled = bench.hub.blob(content).stalled = threading.Event()
    return stalled


def leases_of(bench: Bench) -> list[Path]:
    return list(bench.volume.rglob("*.lease"))


def held_by_another(bench: Bench, name: str) -> tuple[Download, Path, Path]:
    """A download to the volume whose lease another worker holds; its place and that lease."""
    place = bench.volume / "vae" / name
    one = Download(entry_at(bench.models / "vae" / name), place, is_shared=True)
    return one, place, bench.put(one.lease_path, b"")


def test_two_workers_download_one_file_once(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.volume.mkdir(parents=True)
    stalled = stalled_blob(bench, content)
    models, places = "org/name:a.safetensors:vae", {name: bench.folder / name for name in ("one", "two", "three")}
    settings = {name: {"DOWNLOAD_TO": "volume", "COMFYUI_DIR": str(place)} for name, place in places.items()}
    for place in places.values():
        place.mkdir()
    with (
        bench.start(models, **settings["one"]) as first,
        bench.start(models, **settings["two"]) as second,
        bench.start(models, **settings["three"]) as stopped,
    ):
        assert stalled.wait(RUN_LIMIT_S)
        for process in (first, second, stopped):
            output_until(process, "downloading")
        downloader = next(p for p in (first, second, stopped) if lease_holder_is(p, bench.volume))
        waiting = [process for process in (first, second, stopped) if process is not downloader]
        waiting[0].send_signal(signal.SIGTERM)
        assert waiting[0].wait(RUN_LIMIT_S) == 128 + signal.SIGTERM
        assert len(leases_of(bench)) == 1  # it is not the stopped one's
        bench.hub.blob(content).released.set()
        outputs = {process: process.communicate(timeout=RUN_LIMIT_S)[0] for process in (downloader, waiting[1])}
        assert [process.returncode for process in outputs] == [ALL_THERE, ALL_THERE], outputs
    assert bench.hub.fetched() == [sha256(content)]
    assert files_below(bench.volume) == ["vae/a.safetensors"]
    linked = [place / "models/vae/a.safetensors" for place in places.values()]
    assert sorted(path.is_symlink() for path in linked) == [False, True, True]
    assert all(path.readlink() == bench.volume / "vae/a.safetensors" for path in linked if path.is_symlink())


def lease_holder_is(process: subprocess.Popen[str], volume: Path) -> bool:
    """Whether the process has the open file of a download on the volume."""
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            if descriptor.readlink().is_relative_to(volume):
                return True
        except FileNotFoundError:
            pass
    return False


def killed_in_mid_download(bench: Bench, content: bytes, models: str, **more: str) -> None:
    stalled = stalled_blob(bench, content)
    with bench.start(models, **more):
        assert stalled.wait(RUN_LIMIT_S)
    bench.hub.blob(content).stalled = None
    bench.hub.requests.clear()


def test_another_takes_over_from_one_that_was_killed(bench: Bench) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    bench.volume.mkdir(parents=True)
    models = "org/name:a.safetensors:vae"
    killed_in_mid_download(bench, content, models, DOWNLOAD_TO="volume")
    [alive], [lease] = bench.volume.rglob("alive"), leases_of(bench)
    with bench.start(models, DOWNLOAD_TO="volume") as second:
        output_until(second, "downloading")
        assert (lease.exists(), alive.exists()) == (True, True)  # it may still be at work: 30 s have not passed
        make_old(alive, lease)
        output, _ = second.communicate(timeout=RUN_LIMIT_S)
        assert second.returncode == ALL_THERE, output
    assert (bench.models / "vae/a.safetensors").read_bytes() == content
    assert files_below(bench.folder / "volume") == ["models/vae/a.safetensors"]


def test_a_killed_run_leaves_nothing_to_the_next_one(bench: Bench) -> None:
    contents = {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)}
    bench.hub.add("org/name", contents)
    killed_in_mid_download(bench, contents["a.safetensors"], "org/name:a.safetensors:vae")
    assert any(name.endswith(".incomplete") for name in bench.files_below_models())
    run = bench.utils("org/name:b.safetensors:vae")
    assert (run.code, bench.files_below_models()) == (ALL_THERE, ["vae/b.safetensors"])


@pytest.mark.parametrize("download_to", ["container", "volume"])
def test_a_download_that_is_alive_is_left_alone(bench: Bench, download_to: str) -> None:
    contents = {"a.safetensors": safetensors(1), "b.safetensors": safetensors(2)}
    bench.hub.add("org/name", contents)
    bench.volume.mkdir(parents=True)
    stalled = stalled_blob(bench, contents["a.safetensors"])
    with bench.start("org/name:a.safetensors:vae", DOWNLOAD_TO=download_to) as first:
        assert stalled.wait(RUN_LIMIT_S)
        if download_to == "container":  # there the lock says it, whatever the age
            make_old(*bench.models.rglob("alive"))
        run = bench.utils("org/name:b.safetensors:vae", DOWNLOAD_TO=download_to)
        assert run.code == ALL_THERE, run.stderr
        bench.hub.blob(contents["a.safetensors"]).released.set()
        output, _ = first.communicate(timeout=RUN_LIMIT_S)
        assert first.returncode == ALL_THERE, output
    assert bench.files_below_models() == ["vae/a.safetensors", "vae/b.safetensors"]
    assert len(bench.hub.fetched()) == 2


@pytest.mark.parametrize(
    ("is_shared", "age_s", "alive", "stays"),
    [
        (False, 0, True, False),
        (True, 0, True, True),
        (True, STALE_S + 60, True, False),
        (False, 0, False, True),  # its owner is about to make the file
        (False, STALE_S + 60, False, False),
        (True, 0, False, True),
        (True, STALE_S + 60, False, False),
    ],
)
def test_orphans(tmp_path: Path, is_shared: bool, age_s: float, alive: bool, stays: bool) -> None:
    staging = tmp_path / ".download-abc"
    (staging / "split").mkdir(parents=True)
    (staging / "split/x.incomplete").write_text("x")
    (tmp_path / "download-mine.pth").write_text("mine")
    paths = [staging / "alive"] if alive else []
    for path in paths:
        path.touch()
    for path in (*paths, staging):
        os.utime(path, (time.time() - age_s,) * 2)
    remove_orphans(tmp_path, is_shared=is_shared)
    assert staging.exists() == stays
    assert (tmp_path / "download-mine.pth").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".clock")] == []


def test_orphans_are_gone_before_the_space_is_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add("org/name", {"a.pth": b"a" * 1000})
    orphan = bench.put(bench.models / "vae/.download-x/big.incomplete", b"x")
    bench.put(orphan.with_name("alive"), b"")
    usage = shutil.disk_usage(bench.folder)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=100 if orphan.exists() else 2000))
    assert bench.utils("org/name:a.pth:vae").code == ALL_THERE
    assert bench.files_below_models() == ["vae/a.pth"]


def test_what_another_is_downloading_needs_no_second_space(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hub.add("org/name", {"a.pth": b"a" * 1000})
    usage = shutil.disk_usage(bench.folder)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=500))
    one, place, lease = held_by_another(bench, "a.pth")

    def the_other_ends(_: float) -> None:
        bench.put(place, b"a" * 1000)
        lease.unlink(missing_ok=True)

    run_downloads([one], token=None, say=lambda _: None, sleep=the_other_ends)
    assert one.error is None
    assert one.entry.path.readlink() == place
    assert bench.hub.fetched() == []


@pytest.mark.parametrize("failure", ["wrong bytes", "gone"])
def test_where_the_other_fails_it_is_tried_here(bench: Bench, failure: str) -> None:
    content = safetensors(1)
    bench.hub.add("org/name", {"a.safetensors": content})
    one, place, lease = held_by_another(bench, "a.safetensors")

    def the_other_ends(_: float) -> None:
        if failure == "wrong bytes":
            bench.put(place, content[:-1])
        lease.unlink(missing_ok=True)

    run_downloads([one], token=None, say=lambda _: None, sleep=the_other_ends)
    assert (one.error, place.read_bytes()) == (None, content)
    assert files_below(bench.volume) == ["vae/a.safetensors"]


# -- stopped


@pytest.mark.parametrize(
    ("signum", "download_to"), [(signal.SIGTERM, "container"), (signal.SIGINT, "container"), (signal.SIGTERM, "volume")]
)
def test_a_download_that_is_stopped_leaves_nothing(bench: Bench, signum: signal.Signals, download_to: str) -> None:
    content = safetensors(1, 4 * MB)
    bench.hub.add("org/name", {"a.safetensors": content, "b.safetensors": safetensors(2)})
    bench.volume.mkdir(parents=True)
    stalled = stalled_blob(bench, content)
    disk = bench.models if download_to == "container" else bench.volume
    with bench.start("org/name:a.safetensors:vae", DOWNLOAD_TO=download_to) as process:
        assert stalled.wait(RUN_LIMIT_S)
        names = files_below(disk)
        assert any(name.endswith(".incomplete") for name in names)
        assert any(name.endswith(".lease") for name in names) == (download_to == "volume")
        process.send_signal(signum)
        output, _ = process.communicate(timeout=RUN_LIMIT_S)
    assert process.returncode == 128 + signum
    assert "Traceback" not in output
    assert (files_below(disk), bench.files_below_models()) == ([], [])


class Stopped(BaseException):
    """What utils.py makes of SIGTERM."""


def test_a_stopped_run_begins_nothing_more(bench: Bench) -> None:
    bench.hub.add("org/name", {"a.pth": b"a"})
    one, _, lease = held_by_another(bench, "a.pth")
    has_ended = threading.Event()

    def stop(_signum: int, _frame: object) -> None:
        raise Stopped

    def stopped_while_another_downloads(_: float) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        has_ended.wait(RUN_LIMIT_S)
        lease.unlink(missing_ok=True)  # the other gives it up

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with pytest.raises(Stopped):
            run_downloads([one], token=None, say=lambda _: None, sleep=stopped_while_another_downloads)
    finally:
        signal.signal(signal.SIGUSR1, before)
        has_ended.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(RUN_LIMIT_S)
    assert bench.hub.fetched() == []
    assert files_below(bench.volume) == bench.files_below_models() == []


@pytest.mark.parametrize("models", ["org/name:a.pth:vae", "org/name:*.pth:vae"])
def test_sigterm_is_heard_while_the_hub_keeps_silent(bench: Bench, models: str) -> None:
    bench.hub.silence = threading.Event()
    with bench.start(models, HF_HUB_ETAG_TIMEOUT="60") as process:
        assert bench.hub.asked_in_silence.wait(RUN_LIMIT_S)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=RUN_LIMIT_S / 3)  # it is ended by the signal, not by the hub
    assert (process.returncode, "Traceback" in output) == (128 + signal.SIGTERM, False)
