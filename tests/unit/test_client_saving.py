"""client.py: every item of a result becomes a new file with a harmless name, or a loud failure."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client_server import STEADY, Server, answer, cut
from hypothesis import example, given
from hypothesis import strategies as st

import client


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def save(output: dict[str, Any], directory: Path) -> tuple[list[Path], list[client.ClientError]]:
    """What was told as saved, and what went wrong."""
    told: list[Path] = []
    failures = client.save_result(output, directory, told.append)
    assert {path.name for path in told} <= files_in(directory).keys()
    return told, failures


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("ComfyUI_00001_.png", "ComfyUI_00001_.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Windows\\system.ini", "system.ini"),
        ("/", "image"),
        ("..", "image"),
        ("", "image"),
        (None, "image"),
        (7, "image"),
        (".bashrc", "bashrc"),
        ("a\nb\x1b[31m.png", "a_b_[31m.png"),
        ("what?.png", "what_.png"),
        ("con.png", "_con.png"),
        ("naïve 猫.png", "naïve 猫.png"),
    ],
)
def test_names_from_elsewhere_become_plain_file_names(name: object, safe: str) -> None:
    assert client.safe_basename(name, fallback="image") == safe


AWKWARD = st.text(st.sampled_from("./\\a:\0 \u202e猫\ud800-~") | st.characters(), max_size=300)


@STEADY
@given(AWKWARD)
@example("猫" * 300 + ".png")
@example("a" + ".png" * 300)
@example("a.png. .")
@example("a.png ")
def test_any_name_can_be_written_and_stays_in_its_folder(name: str) -> None:
    safe = client.safe_basename(name, fallback="image")
    assert safe
    assert Path(safe).name == safe
    assert safe[0] not in ". "
    assert safe[-1] not in ". "
    assert safe.isprintable()
    assert len(safe.encode()) <= 220


NAMES = st.sampled_from(["a.png", "A.png", "a_1.png", "a_2.png", "b", "b_1"])


@STEADY
@given(NAMES, st.lists(NAMES, max_size=8))
def test_a_free_name_is_the_name_or_the_next_number(name: str, taken: list[str]) -> None:
    used = {other.casefold() for other in taken}
    free = client.free_name(name, taken)
    assert free.casefold() not in used
    assert free == name or name.casefold() in used
    assert Path(free).suffix == Path(name).suffix
    assert Path(free).stem.startswith(Path(name).stem)


# --- files -----------------------------------------------------------------------------------------------------------


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"mine")
    (tmp_path / "a_1.png").symlink_to("nowhere")
    (tmp_path / "a_2.png").mkdir()
    assert client.save_new(tmp_path, "a.png", [b"ne", b"w"]) == tmp_path / "a_3.png"
    assert client.save_new(tmp_path, "a.png", [b"newer"]) == tmp_path / "a_4.png"
    assert (tmp_path / "a.png").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "a_3.png").read_bytes() == b"new"


@STEADY
@given(st.lists(st.tuples(AWKWARD, st.binary(min_size=1, max_size=4)), max_size=6))
def test_any_names_keep_every_content(tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, bytes]]) -> None:
    directory = tmp_path_factory.mktemp("out")
    output = {"images": [{"filename": name, "type": "base64", "data": encoded(content)} for name, content in items]}
    told, failures = save(output, directory)
    assert len(told) == len(items)
    assert bool(failures) == (not items)
    assert sorted(files_in(directory).values()) == sorted(content for _, content in items)


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise client.JobFailed("cut")

    with pytest.raises(client.JobFailed):
        client.save_new(tmp_path, "a.png", chunks())
    assert files_in(tmp_path) == {}


def test_saved_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    saved = client.save_new(tmp_path, "a.png", [b"x"])
    assert saved.stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# --- results ---------------------------------------------------------------------------------------------------------


def test_every_list_of_a_result_is_saved_and_each_path_told_at_once(tmp_path: Path, server: Server) -> None:
    server.script = [answer(200, "from the bucket")]
    output = {
        "status": "success",
        "images": [
            {"filename": "a.png", "type": "base64", "data": encoded(b"one"), "size_bytes": 3},
            {"filename": "sub/a.png", "type": "base64", "data": f"data:image/png;base64,{encoded(b'two')}"},
        ],
        "videos": [{"filename": "v.mp4", "type": "s3_url", "data": f"{server.url}/v.mp4?signature=x"}],
        "audio": [{"filename": "s.flac", "type": "base64", "data": encoded(b"three")}],
        "files": [{"filename": "l.latent", "type": "base64", "data": encoded(b"four")}],
    }
    told, failures = save(output, tmp_path)
    expected = {
        "a.png": b"one",
        "a_1.png": b"two",
        "v.mp4": b"from the bucket",
        "s.flac": b"three",
        "l.latent": b"four",
    }
    assert files_in(tmp_path) == expected
    assert (told, failures) == ([tmp_path / name for name in expected], [])


def test_what_is_saved_is_told_before_the_next_item_is_taken(tmp_path: Path) -> None:
    item = {"filename": "a.png", "data": encoded(b"x")}
    counts: list[int] = []
    client.save_result({"images": [item] * 3}, tmp_path, lambda path: counts.append(len(files_in(tmp_path))))
    assert counts == [1, 2, 3]


def test_a_download_goes_without_any_key(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [answer(200, "x")]
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login someone password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))  # what is there would make a presigned link invalid
    save({"images": [{"filename": "a.png", "type": "s3_url", "data": server.url}]}, tmp_path)
    assert [authorization for _, _, authorization, _ in server.requests] == [None]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("text", "no object but str"),
        ({"filename": "b.png"}, "b.png is not saved: it has no data"),
        ({"filename": "b.png", "data": ""}, "it has no data"),
        ({"filename": "b.png", "data": "!!!"}, "not Base64"),
        ({"filename": "b.png", "data": "abc"}, "not Base64"),
        ({"filename": "b.png", "data": "data:image/png;base64,"}, "it has 0 bytes"),
        ({"filename": "b.png", "data": encoded(b"short"), "size_bytes": 99}, "it has 5 bytes instead of 99"),
        ({"filename": "b.png", "type": "s3_url", "data": "file:///etc/passwd"}, "download failed"),
        ({"filename": "b.png", "data": "http://[::1"}, "download failed"),
        ({"filename": "b.png", "data": "https://.."}, "download failed"),
    ],
)
def test_a_broken_item_fails_loudly_and_the_others_are_kept(tmp_path: Path, item: Any, message: str) -> None:
    good = {"filename": "good.png", "type": "base64", "data": encoded(b"good")}
    told, failures = save({"images": [good, item, good]}, tmp_path)
    assert [path.name for path in told] == ["good.png", "good_1.png"]
    assert [message in str(failure) for failure in failures] == [True]
    assert files_in(tmp_path) == {"good.png": b"good", "good_1.png": b"good"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [(answer(403, "<Error>expired</Error>"), "HTTP 403"), (cut, "failed"), (answer(200, ""), "0 bytes")],
)
def test_a_download_that_fails_leaves_nothing(tmp_path: Path, server: Server, reply: Any, message: str) -> None:
    server.script = [reply]
    told, failures = save({"images": [{"filename": "a", "type": "s3_url", "data": server.url}]}, tmp_path)
    assert [message in str(failure) for failure in failures] == [True]
    assert (told, files_in(tmp_path)) == ([], {})


@pytest.mark.parametrize("output", [{"images": []}, {"status": "success"}, {"images": {}}, {"images": None}])
def test_a_result_with_nothing_in_it_is_a_failure(tmp_path: Path, output: dict[str, Any]) -> None:
    assert [type(failure) for failure in save(output, tmp_path)[1]] == [client.JobFailed]


def test_a_result_of_text_alone_is_enough(tmp_path: Path) -> None:
    assert save({"images": [], "texts": ["a caption"]}, tmp_path) == ([], [])


def test_a_folder_that_is_gone_fails_each_item_in_a_sentence(tmp_path: Path) -> None:
    items = [{"filename": name, "data": encoded(b"x")} for name in ("a.png", "b.png")]
    failures = client.save_result({"images": items}, tmp_path / "gone", print)
    assert [str(failure).partition(":")[0] for failure in failures] == ["a.png is not saved", "b.png is not saved"]
    assert all("No such file or directory" in str(failure) for failure in failures)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="ascii"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ITEMS = st.dictionaries(st.sampled_from(["filename", "data", "size_bytes"]), JSON)


@STEADY
@given(st.dictionaries(st.sampled_from([*client.FILE_LISTS, "texts"]), st.lists(ITEMS | JSON, max_size=3) | JSON))
def test_any_result_is_saved_or_told(tmp_path_factory: pytest.TempPathFactory, output: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("out")
    _, failures = save(output, directory)
    assert all(str(failure).isprintable() for failure in failures)
    assert failures or output.get("texts") or files_in(directory)
