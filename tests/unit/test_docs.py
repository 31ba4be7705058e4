"""The documents against the tree: links lead somewhere, and the table of settings is exactly what is read."""

import re
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant
from tests.process.fault_rows import (
    TABLE,
    disagreements,
    marked_tests,
    read_measured,
    read_table,
    unseen,
    with_seconds,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "AGENTS.md",
    "CHANGELOG.md",
    "workflows/README.md",
    "local/README.md",
    "tests/process/FAULTS.md",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_lead_to_files(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []


def test_the_table_of_settings_is_what_the_code_reads() -> None:
    section = (ROOT / "README.md").read_text().split("## Environment", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row)}
    start_sh = (ROOT / "start.sh").read_text()
    read = set(re.findall(r'"\$\{([A-Z_]+):=', start_sh)) | set(re.findall(r"export ([A-Z_]+)=\$\{\1:-", start_sh))
    read |= set(re.findall(r'environ(?:\.get\(|, )"([A-Z_]+)"', (ROOT / "worker/config.py").read_text()))
    read |= set(re.findall(r'environ\.get\("([A-Z_]+)"', (ROOT / "utils.py").read_text())) | {"MODE"}
    # where Hugging Face's library looks for its cache: the two that people set are in the table
    assert documented == read - {"HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"}


@pytest.mark.parametrize("document", ["README.md", "AGENTS.md"])
def test_every_make_target_named_exists(document: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)", (ROOT / document).read_text()))
    assert named
    assert named <= targets


def test_every_error_code_is_drawn_in_the_tree_once() -> None:
    source = (ROOT / "worker/errors.py").read_text()
    defined = re.findall(r'^    code = "([A-Z_]+)"', source, re.MULTILINE)
    tree = source.split("```")[1]
    drawn = re.findall(r" ([A-Z][A-Z_]{3,})  ", tree)
    assert sorted(drawn) == sorted(set(defined) - {"WORKER_ERROR"})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_fits_the_tree(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1


# --- FAULTS.md ---


def test_the_table_of_faults_and_their_tests_agree() -> None:
    assert disagreements(TABLE.read_text(), marked_tests()) == []
    asked_for = {"C": 24, "W": 9, "P": 18, "R": 9}
    assert {f"{letter}{number}" for letter, last in asked_for.items() for number in range(1, last + 1)} <= set(
        read_table(TABLE.read_text())
    )


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("| C3 |", "| C99 |", "C3 has a test and no row"),
        ("`test_a_comfyui_killed_in_mid_job_is_told_with_its_log`", "", "C3 names []; marked are"),
        ("`COMFYUI_CRASHED` with exit code and log", "`CRASHED`", "C3 has the caller see ['CRASHED']"),
        ("`COMFYUI_CRASHED` with exit code and log", "an error", "C3 does not say what the caller sees"),
        ("| P21 |", "| P99 |", "the rows P are not numbered from 1 without a gap"),
    ],
)
def test_a_table_of_faults_that_does_not_agree_is_found_out(old: str, new: str, said: str) -> None:
    table = TABLE.read_text()
    assert old in table
    assert [problem for problem in disagreements(table.replace(old, new), marked_tests()) if said in problem]


def test_a_malformed_row_is_refused() -> None:
    for line in ("| C1 | too short |", "| C1 | a | b | c | d | 1 | 2 | t |\n| C1 | a | b | c | d | 1 | 2 | t |"):
        with pytest.raises(ValueError, match="C1"):
            read_table(line)


def test_measured_seconds_go_into_their_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    line = "| C1 | a | b | c | d | 1 | 2 | t |\n"
    measured = read_measured("C1 7.5 COMPLETED\nC1 7.0 JOB_TIMEOUT\nW1 3 COMPLETED\n")
    assert with_seconds(line, measured) == line.replace("| 1 |", "| 7.5 |")
    assert with_seconds(line, {}) == line.replace("| 1 |", "|  |")
    monkeypatch.setenv("COMFYUI_DIR", "/ComfyUI")
    assert with_seconds(line, measured) == line.replace("| 2 |", "| 7.5 |")


def test_a_row_that_was_not_run_or_an_answer_that_no_test_saw_is_found_out() -> None:
    table = "| C1 | a | b | `COMPLETED`, `JOB_TIMEOUT` | d | | | t |\n| C2 | a | b | `COMPLETED` | d | | | t |\n"
    assert unseen(table, read_measured("C1 1 COMPLETED\nC1 1 JOB_TIMEOUT\nC2 1 COMPLETED\n")) == []
    not_run, not_seen = "C2 was not run, or failed", "C1 has the caller see ['JOB_TIMEOUT'], which no test of it saw"
    assert unseen(table, read_measured("C1 1 COMPLETED\n")) == [not_seen, not_run]


def test_the_documents_name_rows_that_exist_and_count_them() -> None:
    rows = read_table(TABLE.read_text())
    assert set(re.findall(r"\b[A-Z]\d+\b", (ROOT / "AGENTS.md").read_text())) - {"C99"} <= rows.keys()
    assert f"each of {len(rows)} faults" in (ROOT / "README.md").read_text()
