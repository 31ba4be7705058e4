"""Reads models into the page cache while ComfyUI boots: it computes for seconds then, and the disk is idle.

Plain reads, because fadvise(WILLNEED) on a whole file does nothing (0.25 % resident, measured), and one reader, because
more won nothing on a local disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

CHUNK_BYTES = 8 << 20
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number of this size


def prefetch(paths: Iterable[Path], limit_bytes: int) -> Iterator[tuple[Path, int]]:
    """Read the files one after the other, up to `limit_bytes` together; yields each with the bytes that were read.

    One that cannot be read is left out: this is a favour, not a duty.
    """
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in paths:
        if limit_bytes <= 0:
            return
        read_bytes = 0
        try:
            with path.open("rb", buffering=0) as file:
                while read_bytes < limit_bytes and (got := file.readinto(buffer[: limit_bytes - read_bytes])):
                    read_bytes += got
        except OSError:
            continue
        limit_bytes -= read_bytes
        yield path, read_bytes


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What the page cache may grow by: the machine's available memory, or what the container's limit leaves."""
    meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_by_cgroups(root / "sys/fs/cgroup")])


def _left_by_cgroups(folder: Path) -> Iterator[int]:
    """Limit minus use, for cgroup v2 and v1, as a container sees its own."""
    for limit_file, use_file, stat_file, key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        *[
            (
                "memory/memory.limit_in_bytes",
                "memory/memory.usage_in_bytes",
                "memory/memory.stat",
                "total_inactive_file",
            )
        ],
    ):
        try:
            limit, use = (folder / limit_file).read_text().strip(), int((folder / use_file).read_text())
        except (OSError, ValueError):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):  # gVisor has no memory.stat
            stat = dict(line.split(" ", 1) for line in (folder / stat_file).read_text().splitlines())
            use -= int(stat[key])  # page cache that can go; Docker subtracts the same
        if limit.isdecimal() and int(limit) < _UNLIMITED_BYTES:
            yield max(0, int(limit) - use)


def fraction_of(text: str) -> float:
    """PREFETCH_FRACTION as a number from 0 to 1. Raises ValueError."""
    fraction = float(text)
    if not 0 <= fraction <= 1:
        raise ValueError("not from 0 to 1")
    return fraction


def lower_priority() -> None:
    """ComfyUI's boot goes first."""
    os.nice(10)
