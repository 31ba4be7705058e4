"""The RAM disk: writes that are whole before they have a name, reads that stay inside, a wipe that leaves zeros."""

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.errors import OutputMissing, RamDiskError, RamDiskFull
from worker.input_files import InputFile
from worker.ramdisk import MARKER, RamDisk


@pytest.fixture
def root() -> Iterator[Path]:
    """As start.sh makes it; on the real RAM disk where there is one."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        path = Path(folder)
        for name in ("input", "output", "temp", "run"):
            (path / name).mkdir()
        (path / MARKER).touch()
        yield path


@pytest.fixture
def ramdisk(root: Path) -> RamDisk:
    return RamDisk(root)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """fsync and replace, in order, by the file that they act on, fsync with what is in it; both still happen."""
    seen: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        file = Path(f"/proc/self/fd/{fd}")
        seen.append((f"fsync {file.read_text()}", file.readlink().name))
        real_fsync(fd)

    def replace(source: str, target: str, **directories: int) -> None:
        seen.append(("replace", f"{source} -> {target}"))
        real_replace(source, target, **directories)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return seen


# --- writing ---


def test_each_input_is_synced_before_it_gets_its_name(
    ramdisk: RamDisk, root: Path, calls: list[tuple[str, str]]
) -> None:
    ramdisk.write_inputs((InputFile("a.png", b"one"), InputFile("deep/er/b.png", b"two")))
    kinds = [kind for kind, _ in calls]
    assert kinds == ["fsync one", "replace", "fsync two", "replace"]
    for (_, partial), (_, renamed), name in ((*calls[:2], "a.png"), (*calls[2:], "b.png")):
        assert partial.endswith(".part")
        assert renamed == f"{partial} -> {name}"
    assert (root / "input/a.png").read_bytes() == b"one"
    assert (root / "input/deep/er/b.png").read_bytes() == b"two"


def test_a_write_that_breaks_off_leaves_nothing_under_the_name(
    ramdisk: RamDisk, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RamDiskFull):
        ramdisk.write_inputs((InputFile("a.png", b"one"),))
    assert not (root / "input/a.png").exists()
    monkeypatch.undo()
    ramdisk.wipe()
    assert list((root / "input").iterdir()) == []


def test_inputs_larger_than_the_ram_disk_are_refused_before_the_first_byte(
    ramdisk: RamDisk, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RamDisk, "free_bytes", lambda _: 5)
    with pytest.raises(RamDiskFull) as caught:
        ramdisk.write_inputs((InputFile("a.png", b"123"), InputFile("b.png", b"456")))
    assert caught.value.details == {"needed_bytes": 6, "free_bytes": 5}
    assert list((root / "input").iterdir()) == []


def test_a_file_that_is_written_piece_by_piece_has_its_name_only_when_it_is_whole(
    ramdisk: RamDisk, root: Path, calls: list[tuple[str, str]]
) -> None:
    with ramdisk.new_input("deep/a.png", None) as stream:
        for piece in (b"on", b"e"):
            stream.write(piece)
        stream.seek(0)
        assert stream.read() == b"one"
        assert not (root / "input/deep/a.png").exists()
    assert [kind for kind, _ in calls] == ["fsync one", "replace"]
    with pytest.raises(KeyError), ramdisk.new_input("b.png", 1) as stream:
        raise KeyError
    assert not (root / "input/b.png").exists()


@pytest.mark.parametrize(("size_bytes", "needed_bytes"), [(6, 6), (5, 5), (None, 3)])
def test_a_file_that_finds_no_room_tells_what_it_needs(
    ramdisk: RamDisk, root: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int | None, needed_bytes: int
) -> None:
    monkeypatch.setattr(RamDisk, "free_bytes", lambda _: 5)
    with pytest.raises(RamDiskFull) as caught, ramdisk.new_input("a.png", size_bytes) as stream:
        assert size_bytes != 6, "what is too large at once is refused before the first byte"
        stream.write(b"one")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.details == {"needed_bytes": needed_bytes, "free_bytes": 5}
    assert not (root / "input/a.png").exists()


def test_what_is_there_is_told_of_a_ram_disk_that_ran_full_in_the_run(ramdisk: RamDisk, root: Path) -> None:
    (root / "output/deep").mkdir()
    (root / "output/deep/a.png").write_bytes(b"12345")
    (root / "input/b.png").write_bytes(b"123")
    (root / "output/link").symlink_to("/etc")
    error = RamDiskFull("The RAM disk ran full.", node_id="3")
    ramdisk.add_figures(error)
    used = error.details["used_bytes"]
    assert (used["input"], used["temp"]) == (3, 0)
    assert 5 <= used["output"] <= 5 + len("/etc")
    assert error.details["free_bytes"] > 0
    assert "bytes left now" in error.as_result()["error"]


def test_figures_that_an_error_has_already_are_kept(ramdisk: RamDisk) -> None:
    error = RamDiskFull("The inputs need 6 bytes.", needed_bytes=6, free_bytes=5)
    ramdisk.add_figures(error)
    assert (error.message, error.details) == ("The inputs need 6 bytes.", {"needed_bytes": 6, "free_bytes": 5})


def test_a_ram_disk_that_is_gone_is_a_fault_of_the_worker(tmp_path: Path) -> None:
    with pytest.raises(RamDiskError):
        RamDisk(tmp_path / "gone").write_inputs((InputFile("a.png", b"one"),))


def test_a_planted_symlink_is_not_written_through(ramdisk: RamDisk, root: Path, tmp_path: Path) -> None:
    (root / "input/folder").symlink_to(tmp_path)
    with pytest.raises(RamDiskError):
        ramdisk.write_inputs((InputFile("folder/a.png", b"one"),))
    assert list(tmp_path.iterdir()) == []


# --- reading ---


def test_outputs_are_read_from_their_folders(ramdisk: RamDisk, root: Path) -> None:
    (root / "output/a/b").mkdir(parents=True)
    (root / "output/a/b/x.png").write_bytes(b"pixels")
    assert ramdisk.size_of("output", "a/b", "x.png") == 6
    assert ramdisk.read("output", "a/b", "x.png") == b"pixels"


@pytest.mark.parametrize(
    ("kind", "subfolder", "filename"),
    [
        ("output", "", "../run/secret"),
        ("output", "..", "secret"),
        ("output", "../run", "secret"),
        ("output", "", "/etc/passwd"),
        ("output", "", ".."),
        ("output", "", ""),
        ("run", "", "secret"),
        ("output", "", "a\0b"),
        ("output", "a\0b", "x"),
        ("output", "", "\ud800"),
        ("output", "", "link"),
        ("output", "linked", "secret"),
        ("output", "", "pipe"),
        ("output", "", "folder"),
        ("output", "", "absent"),
        ("output", "absent", "x"),
    ],
)
def test_what_is_outside_or_no_plain_file_is_never_read(
    ramdisk: RamDisk, root: Path, kind: str, subfolder: str, filename: str
) -> None:
    (root / "run/secret").write_text("secret")
    (root / "output/link").symlink_to(root / "run/secret")
    (root / "output/linked").symlink_to(root / "run")
    (root / "output/folder").mkdir()
    os.mkfifo(root / "output/pipe")
    with pytest.raises(OutputMissing):
        ramdisk.read(kind, subfolder, filename)


# --- wiping ---


def test_the_wipe_overwrites_every_file_before_it_unlinks_it(ramdisk: RamDisk, root: Path) -> None:
    sizes = {"input/a.png": 10, "output/deep/er/b.png": 3 << 20, "temp/c.png": (1 << 20) + 1, "output/empty": 0}
    held = {}
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"\xff" * size)
        held[name] = (root / name).open("rb")
    ramdisk.wipe()
    for name, stream in held.items():
        with stream:
            assert stream.read() == bytes(sizes[name])  # the inode lives as long as it is held
    assert [list((root / name).iterdir()) for name in ("input", "output", "temp")] == [[], [], []]


def test_a_sparse_file_is_overwritten_where_it_has_data(ramdisk: RamDisk, root: Path) -> None:
    written = {0: b"first", 3 << 20: b"\xff" * ((2 << 20) + 5), 32 << 20: b"last"}
    with (root / "output/sparse").open("wb") as stream:
        for position, content in written.items():
            stream.seek(position)
            stream.write(content)
        stream.truncate(64 << 20)
    with (root / "output/sparse").open("rb") as held:
        taken_blocks = os.fstat(held.fileno()).st_blocks
        ramdisk.wipe()
        for position, content in written.items():
            held.seek(position)
            assert held.read(len(content)) == bytes(len(content))
        assert (os.fstat(held.fileno()).st_size, os.fstat(held.fileno()).st_blocks) == (64 << 20, taken_blocks)
    assert list((root / "output").iterdir()) == []


def test_the_wipe_removes_planted_things_without_touching_what_they_lead_to(
    ramdisk: RamDisk, root: Path, tmp_path: Path
) -> None:
    outside = root / "run/kept"
    outside.write_text("kept")
    (tmp_path / "file").write_text("kept")
    (root / "input/link").symlink_to(outside)
    (root / "input/folder").symlink_to(tmp_path)
    (root / "output/hard").hardlink_to(outside)
    os.mkfifo(root / "temp/pipe")
    ramdisk.wipe()
    assert outside.read_text() == "kept"
    assert (tmp_path / "file").read_text() == "kept"
    assert [list((root / name).iterdir()) for name in ("input", "output", "temp")] == [[], [], []]


def test_a_folder_of_any_depth_is_wiped(ramdisk: RamDisk, root: Path) -> None:
    """Deeper than Python's recursion, longer than a path may be, more levels than open files."""
    folder_fd = os.open(root / "output", os.O_RDONLY)
    for level in range(3000):
        os.mkdir("a", dir_fd=folder_fd)
        inner_fd = os.open("a", os.O_RDONLY, dir_fd=folder_fd)
        os.close(folder_fd)
        folder_fd = inner_fd
        if level % 1000 == 999:
            os.close(os.open("picture", os.O_CREAT | os.O_WRONLY, dir_fd=folder_fd))
    os.close(folder_fd)
    assert len(ramdisk.list_files()) >= 1
    ramdisk.wipe()
    assert list((root / "output").iterdir()) == []


def test_what_a_job_left_is_listed(ramdisk: RamDisk, root: Path) -> None:
    (root / "output/deep").mkdir()
    for name in ("input/b", "input/a", "output/deep/c"):
        (root / name).write_text("x")
    assert ramdisk.list_files() == ["input/a", "input/b", "output/deep/c"]
    for number in range(300):
        (root / f"temp/{number}").touch()
    assert len(ramdisk.list_files()) == 303
    assert len(ramdisk.list_files(most=200)) == 200


def test_the_wipe_keeps_what_belongs_to_the_worker(ramdisk: RamDisk, root: Path) -> None:
    (root / "run/comfyui").write_text("1 1")
    ramdisk.wipe()
    assert (root / "run/comfyui").read_text() == "1 1"


def test_a_missing_temp_directory_is_no_error(ramdisk: RamDisk, root: Path) -> None:
    (root / "temp").rmdir()
    (root / "input/a").write_text("a")
    ramdisk.wipe()
    assert list((root / "input").iterdir()) == []


@pytest.mark.parametrize("plant", ["nothing", "a directory", "a symlink"])
def test_the_wipe_refuses_a_directory_without_its_marker_file(ramdisk: RamDisk, root: Path, plant: str) -> None:
    (root / "input/photo.png").write_text("somebody's")
    (root / MARKER).unlink()
    if plant == "a directory":
        (root / MARKER).mkdir()
    elif plant == "a symlink":
        (root / MARKER).symlink_to("/etc/hostname")
    with pytest.raises(RamDiskError, match="marker"):
        ramdisk.wipe()
    assert (root / "input/photo.png").read_text() == "somebody's"


def test_a_linked_job_directory_is_not_entered(ramdisk: RamDisk, root: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("somebody's")
    (root / "output").rmdir()
    (root / "output").symlink_to(tmp_path)
    with pytest.raises(RamDiskError):
        ramdisk.wipe()
    assert (tmp_path / "photo.png").read_text() == "somebody's"


def test_a_linked_job_directory_is_neither_listed_nor_counted(ramdisk: RamDisk, root: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("somebody's")
    (root / "output").rmdir()
    (root / "output").symlink_to(tmp_path)
    error = RamDiskFull("The RAM disk ran full.")
    ramdisk.add_figures(error)
    assert error.details["used_bytes"]["output"] == 0
    assert ramdisk.list_files() == []
