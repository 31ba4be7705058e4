"""How long the wipe of a job's files takes, over a bare loop that overwrites and removes the same files.

    python -m benchmarks.wipe                        1, 100 and 10,000 files of 1 GB in all, 5 pairs each
    python -m benchmarks.wipe --runs 9 --megabytes 200 --json FILE

The floor writes zeros over each file, as many bytes as it has, and removes it: that much of memory has to be written,
by whatever program. It follows every link, overwrites what has a second name, fills holes, syncs nothing and knows
no sub-folder. `RamDisk.wipe` is the product's. Both wipe files of the same sizes in a folder of /dev/shm, and take
turns; making the files is outside of the times.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.common import in_pairs, pair_figures, rounded, write_json
from worker.ramdisk import JOB_DIRECTORIES, MARKER, RamDisk

MB = 1_000_000
COUNTS = (1, 100, 10_000)
SHM = Path("/dev/shm")
LIMIT_RATIO = 1.2
CHUNK_BYTES = 1 << 20
_ZEROS = memoryview(bytes(CHUNK_BYTES))


def make_files(folder: Path, count: int, total_bytes: int) -> None:
    block = random.Random(count).randbytes(CHUNK_BYTES)
    for number in range(count):
        left = total_bytes // count
        with (folder / f"{number:05}.bin").open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(block[:left])


def bare_wipe(folder: Path) -> None:
    for name in os.listdir(folder):  # noqa: PTH208 - a Path for each would take longer than the rest
        path = f"{folder}/{name}"
        with open(path, "r+b", buffering=0) as file:  # noqa: PTH123
            left = os.fstat(file.fileno()).st_size
            while left > 0:
                left -= file.write(_ZEROS[:left])
        os.unlink(path)  # noqa: PTH108


def seconds_of(wipe: Callable[[], None], folder: Path, count: int, total_bytes: int) -> float:
    make_files(folder, count, total_bytes)
    started = time.perf_counter()
    wipe()
    took = time.perf_counter() - started
    if any(folder.iterdir()):
        raise RuntimeError(f"{folder} still has files")
    return took


def main() -> int:
    """Returns 1 where the wipe takes more than LIMIT_RATIO of the bare loop."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wipe", description="The wipe over a bare loop.")
    parser.add_argument("--runs", type=int, default=5, help="pairs of each (default: 5)")
    parser.add_argument("--megabytes", type=int, default=1000, help="of all files together (default: 1000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures go there")
    options = parser.parse_args()
    total_bytes = options.megabytes * MB
    if 2 * total_bytes > RamDisk(SHM).free_bytes():
        print(f"/dev/shm has too little room for {options.megabytes} MB; give less with --megabytes.", file=sys.stderr)
        return 1
    root = SHM / f"comfy-endpoint-bench-wipe-{os.getpid()}"
    folder, measured = root / "output", {}
    try:
        for name in JOB_DIRECTORIES:
            (root / name).mkdir(parents=True)
        (root / MARKER).touch()
        print(f"{options.megabytes} MB in   | bare loop: median, p95 s | wipe: median, p95 s | more, s | ratio")
        for count in COUNTS:
            bare = partial(seconds_of, partial(bare_wipe, folder), folder, count, total_bytes)
            ours = partial(seconds_of, RamDisk(root).wipe, folder, count, total_bytes)
            pairs = in_pairs(options.runs, bare, ours)
            figures = measured[f"{count} files"] = pair_figures(pairs)
            print(
                f"{count:6} files | {figures['floor']:15.3f}, {figures['floor_p95']:7.3f} | {figures['ours']:10.3f}, "
                f"{figures['ours_p95']:7.3f} | {figures['more']:7.3f} | {figures['ratio']:.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    write_json(options.json, rounded(measured, 4))
    worst = max(figures["ratio"] for figures in measured.values())
    print(f"the limit of the ratio is {LIMIT_RATIO}")
    return 0 if worst <= LIMIT_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
