"""Reading ahead: in order, up to a limit, never a reason to fail; and how much memory there is to fill."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.models import prefetch as module
from worker.models.prefetch import fraction_of, free_memory_bytes, lower_priority, prefetch

GB = 1 << 30


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of 100, 200 and 300 bytes; in another order than their names."""
    paths = [tmp_path / name for name in ("c", "a", "b")]
    for number, path in enumerate(paths, start=1):
        path.write_bytes(b"x" * 100 * number)
    return paths


@pytest.mark.parametrize(
    ("limit_bytes", "read_bytes"),
    [(1000, [100, 200, 300]), (600, [100, 200, 300]), (250, [100, 150]), (100, [100]), (1, [1]), (0, []), (-1, [])],
)
def test_files_are_read_in_their_order_up_to_the_limit(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, limit_bytes: int, read_bytes: list[int]
) -> None:
    for chunk_bytes in (7, 8 << 20):
        monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
        assert list(prefetch(files, limit_bytes)) == list(zip(files, read_bytes, strict=False))


def test_a_file_that_cannot_be_read_is_left_out(files: list[Path], tmp_path: Path) -> None:
    files[1].unlink()
    read = prefetch([tmp_path, tmp_path / "gone", *files], 1000)
    assert next(read) == (files[0], 100)
    files[2].unlink()  # while it is under way
    assert list(read) == []


def test_more_than_a_chunk_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"\0" * (module.CHUNK_BYTES + 5))
    assert list(prefetch([path], GB)) == [(path, module.CHUNK_BYTES + 5)]


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal:  8388608 kB\nMemAvailable:  4194304 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/memory"
V1 = "sys/fs/cgroup/memory/memory"
STAT = f"anon 1\ninactive_file {GB // 2}\n"


@pytest.mark.parametrize(
    ("files", "free_gb"),
    [
        ({}, 4),
        ({f"{V2}.max": "max\n", f"{V2}.current": f"{GB}\n", f"{V2}.stat": STAT}, 4),
        ({f"{V2}.max": f"{3 * GB}\n", f"{V2}.current": f"{GB}\n", f"{V2}.stat": STAT}, 2.5),
        ({f"{V2}.max": f"{3 * GB}\n", f"{V2}.current": f"{GB}\n"}, 2),
        ({f"{V2}.max": f"{3 * GB}\n", f"{V2}.current": f"{GB}\n", f"{V2}.stat": "anon 1\n"}, 2),
        ({f"{V2}.max": f"{GB}\n", f"{V2}.current": f"{2 * GB}\n", f"{V2}.stat": STAT}, 0),
        ({f"{V2}.max": f"{64 * GB}\n", f"{V2}.current": "0\n", f"{V2}.stat": STAT}, 4),
        ({f"{V2}.max": f"{3 * GB}\n"}, 4),
        ({f"{V2}.max": "much\n", f"{V2}.current": "little\n"}, 4),
        ({f"{V1}.limit_in_bytes": "9223372036854771712\n", f"{V1}.usage_in_bytes": f"{GB}\n"}, 4),
        ({f"{V1}.limit_in_bytes": f"{2 * GB}\n", f"{V1}.usage_in_bytes": f"{GB}\n"}, 1),
        (
            {
                f"{V1}.limit_in_bytes": f"{2 * GB}\n",
                f"{V1}.usage_in_bytes": f"{GB}\n",
                f"{V1}.stat": f"total_inactive_file {GB // 4}\n",
            },
            1.25,
        ),
    ],
)
def test_what_a_limit_leaves(tmp_path: Path, files: dict[str, str], free_gb: float) -> None:
    assert free_memory_bytes(machine(tmp_path, files)) == int(free_gb * GB)


def test_the_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory_bytes() <= total


@given(st.one_of(st.text(max_size=8), st.floats().map(str), st.floats(0, 1).map(str)))
@example("0")
@example("1")
@example("nan")
@example("-0.0")
@example("1e-400")
def test_a_share_is_a_number_from_0_to_1_or_an_error(text: str) -> None:
    try:
        fraction = fraction_of(text)
    except ValueError:
        return
    assert 0 <= fraction <= 1
    assert not math.isnan(fraction)


def test_shares() -> None:
    assert [fraction_of(text) for text in ("0", "0.25", " 1 ", "1e-1")] == [0, 0.25, 1, 0.1]
    for text in ("", "half", "nan", "inf", "-0.1", "1.01", "50%"):
        with pytest.raises(ValueError):
            fraction_of(text)


def test_comfyui_goes_first() -> None:
    pid = os.fork()
    if pid == 0:
        lower_priority()
        os._exit(os.nice(0))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == min(19, os.nice(0) + 10)
