"""client.py with many jobs at once: --repeat and --batch, their table, what a rerun leaves out, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_server import STEADY, End, Folder, Platform, PlatformJob, answer, made, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import client


@pytest.fixture
def platform() -> Iterator[Platform]:
    platform = Platform()
    yield platform
    platform.close()


@pytest.fixture
def folder(tmp_path: Path, platform: Platform) -> Folder:
    return Folder(tmp_path, platform, client.main)


def failing(text: str) -> Callable[[PlatformJob], dict[str, Any] | None]:
    """Jobs with this prompt text fail, the others are done."""
    return lambda job: {"status": "FAILED", "error": "boom"} if text in job.texts() else made(job)


def table(end: End) -> list[list[str]]:
    """The summary's rows of job, state, time, seed, and what came of it."""
    lines = end.err.splitlines()
    heads = [number for number, line in enumerate(lines) if line.split()[:2] == ["job", "state"]]
    assert len(heads) == 1, end.err
    starts = [lines[heads[0]].index(word) for word in ("job", "state", "time", "seed", "files")]
    cuts = [*zip(starts, [*starts[1:], None], strict=True)]
    return [[line[first:last].strip() for first, last in cuts] for line in lines[heads[0] + 1 : -1]]


def states(end: End) -> list[str]:
    return [row[1] for row in table(end)]


# --- repeat ----------------------------------------------------------------------------------------------------------


def test_repeat_draws_new_seeds_and_saves_everything(folder: Folder, platform: Platform) -> None:
    end = folder.process(*folder.text_job(), "--repeat", "6", "--prompt", "new")
    assert end.code == client.ExitCode.SAVED
    seeds = [job.seed() for job in platform.jobs]
    assert len(set(seeds)) == 6
    assert [job.texts() for job in platform.jobs] == [["new", "bad"]] * 6
    # All six are called a.png.
    assert sorted(folder.saved().values()) == sorted(f"['new', 'bad'] {seed}".encode() for seed in seeds)
    assert sorted(end.out.splitlines()) == sorted(f"output/{name}" for name in folder.saved())
    rows = table(end)
    assert [row[0] for row in rows] == [f"{number}/6" for number in range(1, 7)]
    assert sorted(int(row[3]) for row in rows) == sorted(seeds)
    for _, state, _, seed, path in rows:
        assert state == "saved"
        assert (folder.path / path).read_bytes() == f"['new', 'bad'] {seed}".encode()
    assert end.err.splitlines()[-1].startswith("6 jobs in ")
    assert end.err.endswith(": 6 saved\n")


def test_repeat_counts_up_from_a_given_seed(folder: Folder, platform: Platform) -> None:
    folder.run(*folder.text_job(), "--repeat", "3", "--seed", "40")
    assert sorted(job.seed() for job in platform.jobs) == [40, 41, 42]


def test_repeat_keeps_seeds_that_are_to_be_kept(folder: Folder, platform: Platform) -> None:
    folder.run(*folder.text_job(), "--repeat", "2", "--keep-seeds")
    assert [job.seed() for job in platform.jobs] == [1, 1]


@pytest.mark.parametrize("parallel", [1, 3])
def test_so_many_jobs_run_at_once_and_no_more(folder: Folder, platform: Platform, parallel: int) -> None:
    platform.ends = lambda job: made(job) if len(platform.jobs) >= parallel else None
    options = ("--repeat", "7", "--parallel", str(parallel), "--timeout", "20")
    assert folder.run(*folder.text_job(), *options).code == client.ExitCode.SAVED
    assert (len(platform.jobs), platform.most_at_once) == (7, parallel)


def test_jobs_that_end_at_once_do_not_collide_in_names(folder: Folder, platform: Platform) -> None:
    number = 8

    def ends(job: PlatformJob) -> dict[str, Any] | None:
        if len(platform.jobs) < number:
            return None
        items = [picture(f"{job.number} {name}".encode(), name) for name in ("a.png", "A.png", "a_1.png")]
        return {"status": "COMPLETED", "output": {"images": items}}

    platform.ends = ends
    options = ("--repeat", str(number), "--parallel", str(number), "--json", "--save-run")
    end = folder.run(*folder.text_job(), *options)
    jobs = end.told()["jobs"]
    contents = [(folder.path / path).read_bytes() for job in jobs for path in job["saved"][:3]]
    assert len({path for job in jobs for path in job["saved"]}) == 4 * number
    assert sorted(contents) == sorted(
        f"{job} {name}".encode() for job in range(1, number + 1) for name in ("a.png", "A.png", "a_1.png")
    )
    runs = [json.loads((folder.path / job["saved"][3]).read_text()) for job in jobs]
    assert [run["seeds"] for run in runs] == [job["seeds"] for job in jobs]
    assert not [name for name in folder.saved() if name.startswith(".")]


def test_lines_of_several_jobs_are_written_in_one_piece() -> None:
    written: list[str] = []

    class Stream:
        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            pass

    client.write_line(Stream(), "output/a.png")
    assert written == ["output/a.png\n"]


def test_a_job_that_fails_stops_no_other_and_the_exit_code_tells(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: {"status": "FAILED", "error": "boom"} if job.seed() == 2 else made(job)
    end = folder.run(*folder.text_job(), "--repeat", "4", "--seed", "1", "--parallel", "2")
    assert end.code == client.ExitCode.JOB_FAILED
    assert states(end) == ["saved", "failed", "saved", "saved"]
    assert table(end)[1][4] == "the job failed: boom"
    assert len(folder.saved()) == 3
    assert end.err.endswith(": 3 saved, 1 failed\n")


def test_a_line_is_told_as_soon_as_a_job_has_ended(folder: Folder, platform: Platform) -> None:
    told = threading.Event()
    platform.ends = lambda job: made(job) if job.seed() == 1 or told.is_set() else None
    process = folder.start(*folder.text_job(), "--repeat", "2", "--seed", "1")
    assert process.stderr is not None
    first = process.stderr.readline()
    told.set()
    assert folder.end_of(process).code == client.ExitCode.SAVED
    assert first.startswith("[1/2] 1/2 saved ")


def test_with_json_many_jobs_are_one_object(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: {"status": "TIMED_OUT"} if job.seed() == 2 else made(job)
    end = folder.run(*folder.text_job(), "--repeat", "3", "--seed", "1", "--json")
    told = end.told()
    assert end.code == client.ExitCode.TIMED_OUT
    assert [job["job"] for job in told["jobs"]] == ["1/3", "2/3", "3/3"]
    assert [job["seeds"] for job in told["jobs"]] == [{"3.seed": seed} for seed in (1, 2, 3)]
    assert [(job["ok"], job["exit_code"]) for job in told["jobs"]] == [(True, 0), (False, 4), (True, 0)]
    assert len({job["job_id"] for job in told["jobs"]}) == 3
    assert [len(job["saved"]) for job in told["jobs"]] == [1, 0, 1]


def test_quiet_many_jobs_tell_failures_and_warnings_with_their_name(folder: Folder, platform: Platform) -> None:
    def ends(job: PlatformJob) -> dict[str, Any] | None:
        done = made(job)
        assert done is not None
        done["output"]["warnings"] = ["slow"]
        return done if job.seed() == 1 else {"status": "FAILED", "error": "boom"}

    platform.ends = ends
    end = folder.run(*folder.text_job(), "--repeat", "2", "--seed", "1", "--quiet")
    assert end.out == "output/a.png\n"
    warning, failure = sorted(end.err.splitlines(), key=lambda line: "boom" in line)
    assert "[1/2] " in warning
    assert warning.endswith("warning: slow")
    assert failure.startswith("error: ")
    assert " 2/2 " in failure
    assert failure.endswith("the job failed: boom")


def test_a_server_that_is_not_there_fails_every_job(folder: Folder) -> None:
    end = folder.run(*folder.text_job(), "--repeat", "3", "--url", "http://127.0.0.1:1/v2")
    assert (end.code, states(end)) == (client.ExitCode.PLATFORM, ["failed"] * 3)
    assert all("Connection refused" in row[4] for row in table(end))


@pytest.mark.parametrize("option", [("--repeat", "0"), ("--parallel", "0"), ("--repeat", "x"), ("--parallel", "-1")])
def test_a_number_of_jobs_is_a_number(folder: Folder, platform: Platform, option: tuple[str, str]) -> None:
    end = folder.run(*folder.text_job(), *option)
    assert (end.code, len(end.errors())) == (client.ExitCode.BAD_INPUT, 1)
    assert platform.jobs == []


def test_a_dry_run_of_many_sends_nothing_leaves_nothing_and_tells_each(folder: Folder, platform: Platform) -> None:
    batch(folder, {"prompt": "a cat"}, {"prompt": "a dog", "seed": 5}, {"promt": "x"})
    end = folder.run(*folder.text_job(), "--batch", "b.jsonl", "--dry-run", RUNPOD_API_KEY="")
    assert (end.code, end.out) == (client.ExitCode.BAD_INPUT, "")
    assert states(end) == ["ready", "ready", "failed"]
    assert '[line 1] 6 (CLIPTextEncode).text = "a cat"\n' in end.err
    assert "[line 2] 3 (KSampler).seed = 5\n" in end.err
    told = folder.run(*folder.text_job(), "--batch", "b.jsonl", "--dry-run", "--json").told()
    assert told["jobs"][1]["workflow"]["3"]["inputs"]["seed"] == 5
    assert platform.requests == []
    assert not (folder.path / "output").exists()


# --- batch: what a line can say --------------------------------------------------------------------------------------


def batch(folder: Folder, *lines: object) -> None:
    """Writes b.jsonl; a `str` is a line as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder.path / "b.jsonl").write_text("\n".join(texts), encoding="utf-8")


def run_batch(folder: Folder, *lines: object, options: tuple[str, ...] = ()) -> End:
    if lines:
        batch(folder, *lines)
    return folder.run(*folder.text_job(), "--batch", "b.jsonl", *options)


def sent_texts(platform: Platform) -> list[list[str]]:
    return sorted(job.texts() for job in platform.jobs)


def test_a_line_goes_before_the_command_line(folder: Folder, platform: Platform) -> None:
    lines = ({"prompt": "a cat"}, {"negative": ["7=a dog"], "prompt": "two"}, {})
    end = run_batch(folder, *lines, options=("--prompt", "given", "--seed", "7"))
    assert end.code == client.ExitCode.SAVED
    assert sent_texts(platform) == [["a cat", "bad"], ["given", "bad"], ["two", "a dog"]]
    assert {job.seed() for job in platform.jobs} == {7}


@pytest.mark.parametrize(
    ("line", "options", "seed"),
    [
        ({"seed": 5}, ("--seed", "9"), 5),
        ({"seed": 0}, ("--seed", "9"), 0),
        ({"seed": 5}, ("--keep-seeds",), 5),
        ({"keep_seeds": True}, ("--seed", "9"), 1),
        ({"keep-seeds": True}, (), 1),
        ({"set": "3.seed=8"}, (), 8),
        ({"set": ["3.seed=8"]}, ("--set", "3.seed=9"), 8),
        ({"set": {"3.seed": 8, "6.text": "8"}}, (), 8),
    ],
)
def test_a_line_sets_the_seed(
    folder: Folder, platform: Platform, line: object, options: tuple[str, ...], seed: int
) -> None:
    assert run_batch(folder, line, options=options).code == client.ExitCode.SAVED
    assert [job.seed() for job in platform.jobs] == [seed]


@pytest.mark.parametrize("line", [{"seed": None}, {"keep_seeds": False}])
def test_a_line_takes_back_what_the_command_line_says(folder: Folder, platform: Platform, line: object) -> None:
    for options in (("--seed", "1"), ("--keep-seeds", "--out", "other")):
        assert run_batch(folder, line, options=options).code == client.ExitCode.SAVED
    assert all(job.seed() != 1 for job in platform.jobs)
    assert len(platform.jobs) == 2


def test_a_line_has_pictures_a_workflow_and_a_place_of_its_own(folder: Folder, platform: Platform) -> None:
    Image.new("RGB", (4, 4), "blue").save(folder.path / "b.png")
    line = {"workflow": "workflow.json", "img": ["1=b.png"], "out": "other", "save_run": True, "timeout": 30.5}
    assert run_batch(folder, line, options=("--img", "in.png")).code == client.ExitCode.SAVED
    (job,) = platform.jobs
    assert job.input["images"].keys() == {"b.png"}
    assert json.loads(platform.requests[0][3])["policy"] == {"executionTimeout": 30_500}
    assert folder.saved("other").keys() == {"a.png", "run.json"}


def test_a_batch_may_need_no_workflow_on_the_command_line(folder: Folder, platform: Platform) -> None:
    batch(folder, {"workflow": "text.json"}, {"prompt": "without one"})
    end = folder.run("--batch", "b.jsonl", "--url", platform.url)
    assert states(end) == ["saved", "failed"]
    assert "--workflow" in table(end)[1][4]


def test_texts_keep_every_character(folder: Folder, platform: Platform) -> None:
    text = "a\u2028b\u0085c é猫 \x1f\x1e=--x\ny"
    content = json.dumps({"prompt": text}, ensure_ascii=False)
    (folder.path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + content.encode() + b"\r\n\r\n" + content.encode() + b"\r")
    assert run_batch(folder).code == client.ExitCode.SAVED
    assert sent_texts(platform) == [[text, "bad"]] * 2


def test_repeat_goes_for_every_line(folder: Folder, platform: Platform) -> None:
    end = run_batch(folder, {"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 5}, options=("--repeat", "2"))
    assert sorted((*job.texts(), job.seed()) for job in platform.jobs) == [
        ("a", "bad", 1),
        ("a", "bad", 2),
        ("b", "bad", 5),
        ("b", "bad", 6),
    ]
    assert [row[0] for row in table(end)] == ["line 1 1/2", "line 1 2/2", "line 2 1/2", "line 2 2/2"]


BAD_LINES: list[tuple[object, str]] = [
    ("{'prompt': 'a'}", "not JSON"),
    ('{"prompt": "cut off', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[]", "no object"),
    ('"a cat"', "no object"),
    ({"promt": "a"}, "did you mean prompt?"),
    ({"Prompt": "a"}, "did you mean prompt?"),
    ({"endpoint": "x"}, "no option endpoint"),
    ({"batch": "b.jsonl"}, "no option batch"),
    ({"json": True}, "no option json"),
    ({"\x1b[31m": 1}, "no option ?[31m"),
    ({"prompt": {"6": "x"}}, "--prompt takes a text, or a list of them"),
    ({"prompt": [["x"]]}, "--prompt takes a text, or a list of them"),
    ({"prompt": True}, "--prompt"),
    ({"prompt": ["a", "b"]}, "given more than once"),
    ({"seed": "seven"}, "a seed is a whole number"),
    ({"seed": 1.5}, "a seed is a whole number"),
    ({"seed": True}, "--seed"),
    ({"keep_seeds": "yes"}, "--keep-seeds"),
    ({"seed": 1, "keep_seeds": True}, "not allowed with"),
    ({"timeout": -1}, "the timeout is a number"),
    ({"format": "gif"}, "invalid choice"),
    ({"quality": 80}, "--quality goes with"),
    ({"set": {"3.sed": 1}}, "did you mean seed?"),
    ({"img": "missing.png"}, "there is no image missing.png"),
    ({"img": "a\0.png"}, "a"),
    ({"img": "\ud800.png"}, "png"),
    ({"img": "in.png"}, "--img gives 1 image"),
    ({"workflow": "missing.json"}, "missing.json"),
    ({"workflow": "a\0"}, "a"),
    ({"workflow": "in.png"}, "is not JSON"),
    ({"workflow": 7}, "7"),
    ({"out": "in.png"}, "--out in.png cannot be made"),
    ({"out": "a\0"}, "--out"),
]


def test_a_bad_line_stops_no_other_and_says_what_is_wrong(folder: Folder, platform: Platform) -> None:
    lines = [line for line, _ in BAD_LINES]
    end = run_batch(folder, {"prompt": "first"}, "", *lines, "  \t", {"prompt": "last"}, "")
    assert end.code == client.ExitCode.BAD_INPUT
    assert sent_texts(platform) == [["first", "bad"], ["last", "bad"]]
    rows = table(end)
    assert [row[0] for row in rows] == [f"line {number}" for number in (1, *range(3, 3 + len(lines)), 4 + len(lines))]
    assert states(end) == ["saved", *["failed"] * len(lines), "saved"]
    wrong = [
        (line, row[4]) for (line, message), row in zip(BAD_LINES, rows[1:-1], strict=True) if message not in row[4]
    ]
    assert wrong == []
    assert "Errno" not in end.err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*client.LINE_OPTIONS, "keep-images"]) | st.text(max_size=6)


@STEADY
@given(st.lists(st.dictionaries(KEYS, JSON, max_size=3).map(json.dumps) | st.builds(json.dumps, JSON), max_size=3))
def test_any_line_is_a_job_or_an_error_of_one_line(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("\n".join(["{}", *lines]))
    tasks = client.tasks_of(client.build_parser().parse_args(["--batch", str(path), "--prompt", "given"]))
    assert [task.name for task in tasks] == [f"line {number}" for number in range(1, len(lines) + 2)]
    assert len({task.key for task in tasks if task.options}) == len([task for task in tasks if task.options])
    for task in tasks:
        assert (task.options is None) == bool(task.error)
        assert task.error.isprintable()
        client.Run(task.options, client.Console(quiet=True)).attempt(None) if task.options else None


def test_seeds_that_would_grow_too_large_are_refused(folder: Folder, platform: Platform) -> None:
    end = folder.run(*folder.text_job(), "--repeat", "2", "--seed", str(2**64 - 1), "--parallel", "1")
    assert end.code == client.ExitCode.BAD_INPUT
    assert all(job.seed() < 2**64 for job in platform.jobs)


# --- batch: a rerun --------------------------------------------------------------------------------------------------

CAT, DOG = {"prompt": "a cat"}, {"prompt": "a dog"}


def rerun(folder: Folder, platform: Platform, *lines: object, options: tuple[str, ...] = ()) -> list[list[str]]:
    """The prompt texts that are sent this time."""
    before = len(platform.jobs)
    assert run_batch(folder, *lines, options=options).code == client.ExitCode.SAVED
    return sorted(job.texts() for job in platform.jobs[before:])


def test_a_rerun_leaves_out_what_is_done_and_does_what_failed(folder: Folder, platform: Platform) -> None:
    platform.ends = failing("a dog")
    assert run_batch(folder, CAT, DOG).code == client.ExitCode.JOB_FAILED
    platform.ends = made
    end = run_batch(folder)
    assert (end.code, end.out) == (client.ExitCode.SAVED, "output/a_1.png\n")
    assert states(end) == ["done before", "saved"]
    assert table(end)[0][4] == "output/a.png"
    assert sent_texts(platform) == [["a cat", "bad"], ["a dog", "bad"], ["a dog", "bad"]]
    requests = len(platform.requests)
    told = run_batch(folder, options=("--json",)).told()
    assert [job["state"] for job in told["jobs"]] == ["DONE BEFORE"] * 2
    assert [job["saved"] for job in told["jobs"]] == [["output/a.png"], ["output/a_1.png"]]
    assert len(platform.requests) == requests


def test_a_rerun_does_a_job_whose_file_is_gone(folder: Folder, platform: Platform) -> None:
    assert len(rerun(folder, platform, CAT, DOG)) == 2
    next((folder.path / "output").glob("a.png")).unlink()
    assert len(rerun(folder, platform)) == 1
    assert rerun(folder, platform) == []


def test_a_rerun_does_what_has_changed(folder: Folder, platform: Platform) -> None:
    rerun(folder, platform, CAT, DOG)
    assert rerun(folder, platform, CAT, {**DOG, "seed": 7}) == [["a dog", "bad"]]
    assert rerun(folder, platform, {"prompt": "new"}, CAT, "", DOG) == [["new", "bad"]]
    assert len(rerun(folder, platform, options=("--format", "webp"))) == 3
    workflow = (folder.path / "text.json").read_text()
    (folder.path / "text.json").write_text(workflow.replace('"bad"', '"worse"'))
    assert rerun(folder, platform) == [["a cat", "worse"], ["a dog", "worse"], ["new", "worse"]]
    (folder.path / "text.json").write_text(workflow)
    assert rerun(folder, platform) == []


def test_a_rerun_does_a_job_whose_picture_has_changed(folder: Folder, platform: Platform) -> None:
    line = {"workflow": "workflow.json", "img": "in.png"}
    named = {"workflow": "workflow.json", "img": ["1=in.png"]}
    assert len(rerun(folder, platform, line, named)) == 2
    assert rerun(folder, platform) == []
    Image.new("RGB", (8, 8), "blue").save(folder.path / "in.png")
    assert len(rerun(folder, platform)) == 2
    assert rerun(folder, platform) == []


@pytest.mark.parametrize("options", [("--timeout", "99"), ("--debug",), ("--parallel", "1"), ("--quiet",)])
def test_a_rerun_does_not_mind_what_changes_no_picture(
    folder: Folder, platform: Platform, options: tuple[str, ...]
) -> None:
    rerun(folder, platform, CAT)
    assert rerun(folder, platform, options=options) == []


def test_equal_lines_are_as_many_jobs(folder: Folder, platform: Platform) -> None:
    same = ('{"prompt": "a cat"}', '{"prompt":"a cat"}', '{"prompt": "a cat", "seed": null}')
    platform.ends = lambda job: made(job) if job.number == 1 else {"status": "FAILED", "error": "boom"}
    assert run_batch(folder, *same, options=("--parallel", "1")).code == client.ExitCode.JOB_FAILED
    platform.ends = made
    assert len(rerun(folder, platform)) == 2
    assert rerun(folder, platform) == []
    (folder.path / "output/a_1.png").unlink()
    assert len(rerun(folder, platform)) == 1
    assert len(rerun(folder, platform, *same, *same)) == 3


def test_repeated_jobs_of_a_batch_are_done_once_each(folder: Folder, platform: Platform) -> None:
    assert len(rerun(folder, platform, CAT, options=("--repeat", "2"))) == 2
    assert rerun(folder, platform, options=("--repeat", "2")) == []
    assert len(rerun(folder, platform, options=("--repeat", "3"))) == 1


def test_what_is_done_is_known_by_the_folder_of_the_results(folder: Folder, platform: Platform) -> None:
    rerun(folder, platform, CAT)
    assert len(rerun(folder, platform, options=("--out", "other"))) == 1
    assert rerun(folder, platform, options=("--out", "other")) == []


def test_a_job_that_made_only_text_is_done_too(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: {"status": "COMPLETED", "output": {"texts": ["a caption"]}}
    assert len(rerun(folder, platform, CAT)) == 1
    assert rerun(folder, platform) == []


def test_a_job_of_which_one_item_is_broken_is_not_done(folder: Folder, platform: Platform) -> None:
    broken = {"status": "COMPLETED", "output": {"images": [picture(b"x"), {"filename": "b.png"}]}}
    platform.ends = lambda job: broken
    assert run_batch(folder, CAT).code == client.ExitCode.JOB_FAILED
    platform.ends = made
    assert len(rerun(folder, platform)) == 1


@pytest.mark.parametrize("damage", ['{"key": "ab', "\xff\0", '[]\n{"key": 5}\n{"key": [], "saved": []}\nnull', "\n\n"])
def test_a_damaged_list_of_what_is_done_costs_nothing_more(folder: Folder, platform: Platform, damage: str) -> None:
    rerun(folder, platform, CAT)
    (listed,) = (folder.path / "output").glob("*.jsonl")
    listed.write_text(listed.read_text() + damage, encoding="latin-1")
    assert rerun(folder, platform, CAT, DOG) == [["a dog", "bad"]]
    assert rerun(folder, platform) == []


def test_a_list_of_what_is_done_that_cannot_be_written_fails_no_job(folder: Folder, platform: Platform) -> None:
    def ends(job: PlatformJob) -> dict[str, Any] | None:
        (folder.path / "output").rmdir()
        return made(job)

    platform.ends = ends
    end = run_batch(folder, {**CAT, "out": "other"})
    assert (end.code, end.out, states(end)) == (client.ExitCode.SAVED, "other/a.png\n", ["saved"])
    assert "warning: " in end.err


def test_what_was_done_before_an_interruption_is_done(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: made(job) if "a cat" in job.texts() else None
    batch(folder, CAT, DOG)
    process = folder.start(*folder.text_job(), "--batch", "b.jsonl")
    assert process.stdout is not None
    assert process.stdout.readline() == "output/a.png\n"
    platform.wait_for(lambda: len(platform.jobs) == 2)
    process.send_signal(signal.SIGINT)
    assert folder.end_of(process).code == client.ExitCode.INTERRUPTED
    platform.ends = made
    assert rerun(folder, platform) == [["a dog", "bad"]]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted(folder: Folder, platform: Platform, *options: str, running: int = 3) -> End:
    """Six jobs, three at once, that do not end; Ctrl-C when three of them run."""
    process = folder.start(*folder.text_job(), "--repeat", "6", "--parallel", "3", "--seed", "1", *options)
    platform.wait_for(lambda: len(platform.requests) > len(platform.jobs) >= running)
    process.send_signal(signal.SIGINT)
    return folder.end_of(process)


def test_ctrl_c_cancels_every_running_job_and_starts_no_other(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: None
    end = interrupted(folder, platform)
    assert end.code == client.ExitCode.INTERRUPTED
    assert (len(platform.jobs), sorted(platform.cancelled())) == (3, [1, 2, 3])
    assert "interrupted" in end.err
    assert sorted(states(end)) == ["cancelled"] * 3 + ["not sent"] * 3


def test_ctrl_c_leaves_what_was_saved_and_says_so(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: made(job) if job.seed() == 1 else None
    end = interrupted(folder, platform, "--json", running=4)
    told = end.told()
    assert end.code == client.ExitCode.INTERRUPTED
    assert told["jobs"][0]["saved"] == ["output/a.png"]
    assert [job["state"] for job in told["jobs"]] == ["COMPLETED", *["CANCELLED"] * 3, *["NOT SENT"] * 2]
    assert [job["exit_code"] for job in told["jobs"]] == [0, *[client.ExitCode.INTERRUPTED] * 5]
    assert states(end) == ["saved", *["cancelled"] * 3, *["not sent"] * 2]


def test_ctrl_c_is_the_exit_code_also_after_a_failure(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: {"status": "FAILED", "error": "boom"} if job.seed() == 1 else None
    end = interrupted(folder, platform, running=4)
    assert end.code == client.ExitCode.INTERRUPTED
    assert states(end) == ["failed", *["cancelled"] * 3, *["not sent"] * 2]


def test_ctrl_c_says_which_jobs_could_not_be_cancelled(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: None
    platform.on_cancel = answer(400, "no")
    end = interrupted(folder, platform, "--quiet")
    assert end.code == client.ExitCode.INTERRUPTED
    assert sum("could not be cancelled and may still run" in line for line in end.err.splitlines()) == 3


def test_the_table_does_not_take_a_job_that_may_run_for_one_that_does_not(folder: Folder, platform: Platform) -> None:
    platform.ends = lambda job: None
    platform.on_cancel = answer(400, "no")
    end = interrupted(folder, platform)
    assert states(end).count("not sent") == 3
    assert not {"ready", "cancelled", "saved"} & set(states(end))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_second_ctrl_c_leaves_at_once(folder: Folder, platform: Platform, options: tuple[str, ...]) -> None:
    over, cancels = threading.Event(), threading.Semaphore(0)

    def hangs(handler: Any) -> None:
        cancels.release()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        while not over.wait(0.2):  # never silent for long enough to time out
            handler.wfile.write(b"x")
            handler.wfile.flush()
        handler.close_connection = True

    platform.ends = lambda job: None
    platform.on_cancel = hangs
    process = folder.start(*folder.text_job(), "--repeat", "4", "--parallel", "2", *options)
    try:
        platform.wait_for(lambda: len(platform.requests) > len(platform.jobs) == 2)
        process.send_signal(signal.SIGINT)
        assert cancels.acquire(timeout=30)
        assert cancels.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        end = folder.end_of(process)
    finally:
        over.set()
    assert end.code == client.ExitCode.INTERRUPTED
    assert "may still run" in end.err
    assert states(end).count("not sent") == 2
    assert len(platform.jobs) == 2
    if options:
        assert [job["exit_code"] for job in end.told()["jobs"]] == [client.ExitCode.INTERRUPTED] * 4


def test_a_job_whose_files_are_still_read_at_ctrl_c_is_not_sent(folder: Folder, platform: Platform) -> None:
    os.mkfifo(folder.path / "slow.png")
    picture_bytes = (folder.path / "in.png").read_bytes()
    batch(folder, {"workflow": "workflow.json", "img": "slow.png"}, CAT)
    platform.ends = lambda job: None
    process = folder.start(*folder.text_job(), "--batch", "b.jsonl")
    assert process.stderr is not None
    with (folder.path / "slow.png").open("wb") as slow:  # opens once the client reads
        platform.wait_for(lambda: len(platform.requests) > len(platform.jobs) == 1)
        process.send_signal(signal.SIGINT)
        platform.wait_for(lambda: platform.cancelled() == [1])
        slow.write(picture_bytes)
    end = folder.end_of(process)
    assert (end.code, len(platform.jobs)) == (client.ExitCode.INTERRUPTED, 1)
    assert states(end) == ["not sent", "cancelled"]
