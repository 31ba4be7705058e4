"""The documents against the tree: links lead somewhere, and the table of settings is exactly what is read."""

import re
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "AGENTS.md", "CHANGELOG.md", "workflows/README.md", "local/README.md"]


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
    assert documented == read


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
