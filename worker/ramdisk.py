"""The RAM disk: durable, contained writes; reads that cannot leave it; a wipe that overwrites before it unlinks.

Every path is walked one part at a time with ``dir_fd`` and ``O_NOFOLLOW``, so a planted symlink is never followed.
`start.sh` makes the directories and the marker file; nothing here touches a root without it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from worker.errors import OutputMissing, RamDiskError, RamDiskFull

if TYPE_CHECKING:
    from worker.input_files import InputFile

MARKER = ".comfy-endpoint-ramdisk"
JOB_DIRECTORIES = ("input", "output", "temp")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ZEROS = bytes(1 << 20)  # 64 KiB to 1 MiB pieces are the fastest way to overwrite on tmpfs (measured)


class RamDisk:
    """``root`` holds ``input``, ``output``, ``temp`` (wiped with each job), ``run`` and ``user`` (never wiped)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def free_bytes(self) -> int:
        """Bytes that can still be written."""
        usage = os.statvfs(self.root)
        return usage.f_bavail * usage.f_frsize

    def write_inputs(self, files: tuple[InputFile, ...]) -> None:
        """Write all of ``files`` below ``input``, each whole and synced before it has its name.

        Raises RamDiskFull (before the first byte where the sizes already tell) or RamDiskError.
        """
        needed_bytes = sum(len(file.data) for file in files)
        try:
            if needed_bytes > self.free_bytes():
                raise self._full(needed_bytes)
            for file in files:
                with self._written_durably(file.name) as stream:
                    stream.write(file.data)
        except OSError as error:
            raise self._write_error(error, needed_bytes) from error

    @contextlib.contextmanager
    def new_input(self, name: str, size_bytes: int | None) -> Iterator[BinaryIO]:
        """A file to write and to read back, which is in ``input`` when the block ends without an error.

        ``size_bytes`` where it is known beforehand. Raises RamDiskFull or RamDiskError.
        """
        written_bytes = 0
        try:
            if size_bytes is not None and size_bytes > self.free_bytes():
                raise self._full(size_bytes)
            with self._written_durably(name) as stream:
                try:
                    yield stream
                finally:
                    written_bytes = stream.tell()
        except OSError as error:
            raise self._write_error(error, size_bytes or written_bytes) from error

    @contextlib.contextmanager
    def _written_durably(self, name: str) -> Iterator[BinaryIO]:
        *folders, leaf = name.split("/")
        with self._directory("input", folders, create=True) as directory_fd:
            # ComfyUI may open the final name at any moment: it must never see a part of the file (the RAM-disk race).
            partial = f".{secrets.token_hex(8)}.part"
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(partial, flags, 0o600, dir_fd=directory_fd), "w+b") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, leaf, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)

    def size_of(self, kind: str, subfolder: str, filename: str) -> int:
        """Size in bytes of a file that ComfyUI wrote. ``kind`` is ``output`` or ``temp``. Raises OutputMissing."""
        with self._open_file(kind, subfolder, filename) as file_fd:
            return os.fstat(file_fd).st_size

    def has(self, kind: str, subfolder: str, filename: str) -> bool:
        """Whether ComfyUI wrote such a file."""
        try:
            self.size_of(kind, subfolder, filename)
        except OutputMissing:
            return False
        return True

    @contextlib.contextmanager
    def open(self, kind: str, subfolder: str, filename: str) -> Iterator[BinaryIO]:
        """A stream of the file. Raises OutputMissing if it is not there, not a regular file, or outside."""
        with self._open_file(kind, subfolder, filename) as file_fd, os.fdopen(file_fd, "rb", closefd=False) as stream:
            yield stream

    def read(self, kind: str, subfolder: str, filename: str, most_bytes: int = -1) -> bytes:
        """The whole file, or its first ``most_bytes``. Raises OutputMissing as `open` does."""
        with self.open(kind, subfolder, filename) as stream:
            return stream.read(most_bytes)

    def wipe(self, directories: tuple[str, ...] = JOB_DIRECTORIES) -> None:
        """Overwrite with zeros and remove all that is below ``directories``.

        Raises RamDiskError, also when the marker file is missing: then this is no directory of ours.
        """
        try:
            with _opened(os.open(self.root, _DIRECTORY)) as root_fd:
                if not stat.S_ISREG(os.stat(MARKER, dir_fd=root_fd, follow_symlinks=False).st_mode):
                    raise RamDiskError(f"{self.root} has no marker file {MARKER}; refusing to wipe it.")
                for name in directories:
                    self._wipe_below(name, root_fd)
        except FileNotFoundError:
            raise RamDiskError(f"{self.root} has no marker file {MARKER}; refusing to wipe it.") from None
        except OSError as error:
            raise RamDiskError(f"{self.root} cannot be wiped ({error.strerror}).") from error

    def add_figures(self, error: RamDiskFull) -> None:
        """What is known when the RAM disk ran full in ComfyUI's hands: bytes that are free now, and that files take."""
        if "free_bytes" in error.details:
            return
        free_bytes, used_bytes = self.free_bytes(), {name: self._size_below(name) for name in JOB_DIRECTORIES}
        taken = f"the job's files take {sum(used_bytes.values())}"
        error.message += f" The RAM disk has {free_bytes} bytes left now, and {taken}."
        error.details |= {"free_bytes": free_bytes, "used_bytes": used_bytes}

    def _size_below(self, name: str) -> int:
        total_bytes = 0
        for path in self.list_files((name,)):
            with contextlib.suppress(OSError):
                total_bytes += os.lstat(self.root / path).st_size
        return total_bytes

    def list_files(self, directories: tuple[str, ...] = JOB_DIRECTORIES, most: int | None = None) -> list[str]:
        """Paths below ``root`` of what is there, sorted; at most ``most`` of them."""
        found: list[str] = []
        # os.scandir would follow a folder that is a symlink.
        pending = [self.root / name for name in directories if not (self.root / name).is_symlink()]
        while pending and (most is None or len(found) < most):
            with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    else:
                        found.append(str(Path(entry.path).relative_to(self.root)))
        return sorted(found)[:most]

    @staticmethod
    def _wipe_below(name: str, root_fd: int) -> None:
        try:
            directory_fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
        except FileNotFoundError:
            return  # ComfyUI removes its temp directory when it ends and makes it anew at its next start
        with _opened(directory_fd):
            _wipe_directory(directory_fd)

    def _write_error(self, error: OSError, needed_bytes: int) -> RamDiskFull | RamDiskError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._full(needed_bytes)
        return RamDiskError(f"The RAM disk cannot be written ({error.strerror}).")

    def _full(self, needed_bytes: int) -> RamDiskFull:
        free_bytes, usage = self.free_bytes(), os.statvfs(self.root)
        no_file_left = " but cannot hold another file" if usage.f_files and not usage.f_ffree else ""
        return RamDiskFull(
            f"The inputs need {needed_bytes} bytes and the RAM disk has {free_bytes} left{no_file_left}; "
            "send less, or give the container a larger /dev/shm (--shm-size).",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )

    @contextlib.contextmanager
    def _open_file(self, kind: str, subfolder: str, filename: str) -> Iterator[int]:
        folders = [part for part in subfolder.split("/") if part]
        shown = "/".join([kind, *folders, filename])
        if (
            kind not in ("output", "temp")
            or not filename
            or any(p in (".", "..") or "/" in p for p in (*folders, filename))
        ):
            raise OutputMissing(f"ComfyUI named an output outside its directories: {shown!r}.", file=shown)
        try:
            with self._directory(kind, folders, create=False) as directory_fd:
                # O_NONBLOCK: a planted FIFO must not hang the worker.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                file_fd = os.open(filename, flags, dir_fd=directory_fd)
        except OSError as error:
            raise OutputMissing(
                f"ComfyUI's history names {shown!r}, which cannot be opened ({error.strerror}).", file=shown
            ) from None
        except ValueError:  # a NUL or a lone surrogate
            raise OutputMissing(f"ComfyUI's history names {shown!r}, as no file can be named.", file=shown) from None
        with _opened(file_fd):
            if not stat.S_ISREG(os.fstat(file_fd).st_mode):
                raise OutputMissing(f"ComfyUI's history names {shown!r}, which is not a regular file.", file=shown)
            yield file_fd

    @contextlib.contextmanager
    def _directory(self, kind: str, folders: list[str], *, create: bool) -> Iterator[int]:
        """A descriptor of ``root/kind/folders``, no part of which is a symlink."""
        directory_fd = os.open(self.root / kind, _DIRECTORY)
        try:
            for folder in folders:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(folder, 0o700, dir_fd=directory_fd)
                child_fd = os.open(folder, _DIRECTORY, dir_fd=directory_fd)
                os.close(directory_fd)
                directory_fd = child_fd
            yield directory_fd
        finally:
            os.close(directory_fd)


@contextlib.contextmanager
def _opened(file_fd: int) -> Iterator[int]:
    try:
        yield file_fd
    finally:
        os.close(file_fd)


def _wipe_directory(top_fd: int) -> None:
    """Without recursion, which a prefix such as "a/a/a/..." would exhaust: the folders in a folder move up first."""
    while folders := _wipe_files(top_fd):
        for folder in folders:
            # Anything can vanish meanwhile: a ComfyUI that dies removes its own temp directory.
            with contextlib.suppress(FileNotFoundError):
                with _opened(os.open(folder, _DIRECTORY, dir_fd=top_fd)) as folder_fd:
                    for inner in _wipe_files(folder_fd):
                        os.rename(inner, f".{secrets.token_hex(8)}", src_dir_fd=folder_fd, dst_dir_fd=top_fd)
                os.rmdir(folder, dir_fd=top_fd)


def _wipe_files(directory_fd: int) -> list[str]:
    """Wipe what is no directory; returns the names of the directories."""
    with os.scandir(directory_fd) as scan:
        entries = list(scan)
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file(follow_symlinks=False):
                    overwrite_with_zeros(entry.name, directory_fd)
                os.unlink(entry.name, dir_fd=directory_fd)
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def overwrite_with_zeros(name: str | Path, directory_fd: int | None = None) -> None:
    """Replace the bytes of a regular file in place, its length unchanged.

    Opening with "wb" would truncate first: the old pages would be freed with their content and the zeros would go to
    fresh ones. So would zeros for the holes of a sparse file, which can be larger than the RAM disk. A file with a
    second hard link is left alone: the other name may lie outside the RAM disk.
    """
    file_fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    with _opened(file_fd):
        status = os.fstat(file_fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            return
        for position, end in _data_of(file_fd, status.st_size):
            while position < end:
                position += os.pwrite(file_fd, memoryview(_ZEROS)[: end - position], position)
        os.fsync(file_fd)


def _data_of(file_fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and end of each part of a file that is no hole."""
    end = 0
    while end < size_bytes:
        try:
            start = os.lseek(file_fd, end, os.SEEK_DATA)
            end = min(os.lseek(file_fd, start, os.SEEK_HOLE), size_bytes)
        except OSError as error:
            if error.errno == errno.ENXIO:  # there is no more
                return
            raise
        yield start, end


if __name__ == "__main__":  # start.sh: ROOT [DIRECTORY...]; without one, everything goes
    try:
        RamDisk(Path(sys.argv[1])).wipe(tuple(sys.argv[2:]) or (*JOB_DIRECTORIES, "run", "user"))
    except RamDiskError as failure:
        sys.exit(f"ERROR: {failure}")
