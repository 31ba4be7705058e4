"""The tree that people read is the tree that the code raises."""

import json
import re

import pytest

from worker import errors
from worker.errors import WorkerError, internal_error


def all_below(parent: type[WorkerError]) -> list[type[WorkerError]]:
    return [found for child in parent.__subclasses__() for found in (child, *all_below(child))]


def drawn_tree() -> dict[str, tuple[str, str | None]]:
    """``{class: (parent, code)}`` as the docstring draws it; four columns are one level, a group has no code."""
    assert errors.__doc__
    ancestors, drawn = ["WorkerError"], {}
    for line in re.findall(r"^[│ ]*[├└]── .*$", errors.__doc__, re.MULTILINE):
        level = line.index("── ") // 4 + 1
        name, *rest = line.partition("── ")[2].split()
        drawn[name] = (ancestors[level - 1], rest[0] if rest else None)
        ancestors[level:] = [name]
    return drawn


def test_the_drawn_tree_is_the_tree_of_the_code() -> None:
    declared = {
        error.__name__: (error.__bases__[0].__name__, error.__dict__.get("code")) for error in all_below(WorkerError)
    }
    assert drawn_tree() == declared


def test_every_code_belongs_to_one_class() -> None:
    codes = [error.__dict__["code"] for error in all_below(WorkerError) if not error.__subclasses__()]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[A-Z_]+", code) for code in codes)


def test_only_what_would_harm_the_next_job_replaces_the_worker() -> None:
    assert [error.__name__ for error in all_below(WorkerError) if error.replace_worker] == [
        "GpuBroken",
        "RamDiskError",
        "ComfyUIStuck",
    ]


@pytest.mark.parametrize("error", all_below(WorkerError), ids=lambda error: error.__name__)
def test_a_failure_is_posted_as_a_string_with_its_code_and_details(error: type[WorkerError]) -> None:
    result = error("One sentence.", size_bytes=5).as_result()
    assert result == {
        "error": f"[{error.code}] One sentence.",  # a string: what else would not mark the job FAILED
        "error_code": error.code,
        "details": {"size_bytes": 5},
    }
    assert json.loads(json.dumps(result)) == result


def test_a_bug_has_the_same_shape_as_a_failure() -> None:
    result = internal_error()
    assert result.keys() == WorkerError("x").as_result().keys()
    assert result["error"].startswith(f"[{result['error_code']}] ")
