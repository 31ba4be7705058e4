"""The documents as tests read them: sections, tables, JSON, headings and links."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_HEADING = re.compile(r"(#+) (.+)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def documents() -> list[str]:
    """Every Markdown file that git tracks, or would: paths below ROOT."""
    ask = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    told = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False)
    found = told.stdout.splitlines()
    if told.returncode:  # no checkout: a tree that was downloaded or copied
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
        found = [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(path for path in set(found) if (ROOT / path).exists())


def build_arguments() -> dict[str, str]:
    """The default of each build argument of the Dockerfile."""
    return dict(re.findall(r'^ARG ([A-Z_]+)="?([^"\n]*)"?$', text_of("Dockerfile"), re.MULTILINE))


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it stands in a block of code."""
    is_code = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        yield line, is_code or fence
        is_code ^= fence


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its level."""
    found: list[str] = []
    level = 0
    for line, is_code in _lines(text):
        heading = None if is_code else _HEADING.fullmatch(line)
        if heading and level and len(heading[1]) <= level:
            break
        if heading and not level and heading[2] == title:
            level = len(heading[1])
        elif level:
            found.append(line)
    assert level, f"there is no heading {title!r}"
    return "\n".join(found)


def rows(text: str) -> list[list[str]]:
    """The cells of each row of the tables, without their heads."""
    tables = [line if not is_code and line.startswith("|") else "" for line, is_code in _lines(text)]
    # A head is followed by the line of dashes.
    bodies = [line for head, line in zip(["", *tables], tables, strict=False) if line and head]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in bodies if not re.fullmatch(r"[|\s:-]+", line)
    ]


def names(cell: str) -> list[str]:
    """The words that stand as code."""
    return re.findall(r"`([^`]+)`", cell)


def first_names(text: str) -> list[str]:
    """The names in the first column of the tables."""
    return [name for cells in rows(text) for name in names(cells[0])]


def json_blocks(text: str) -> list[Any]:
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]


def anchors(text: str) -> set[str]:
    """What a link to a heading may say after its #, as GitHub makes it."""
    found: set[str] = set()
    for line, is_code in _lines(text):
        if heading := None if is_code else _HEADING.fullmatch(line):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[2])
            anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            number = 0
            while (unused := f"{anchor}-{number}" if number else anchor) in found:
                number += 1
            found.add(unused)
    return found


def links(text: str) -> list[tuple[str, str]]:
    """The relative links, each as path ("" for the document itself) and anchor ("" for none)."""
    prose = "\n".join(line for line, is_code in _lines(text) if not is_code)
    prose = re.sub(r"`[^`\n]*`", "code", prose)
    targets = [target for target in _LINK.findall(prose) if not re.match(r"[a-z]+:", target)]
    return [(target.partition("#")[0], target.partition("#")[2]) for target in targets]


def make_targets(text: str) -> set[str]:
    """The targets of `make` commands, in blocks and in lines of code: `A=1 make image-deps image-test`."""
    code = [line for line, is_code in _lines(text) if is_code]
    code += names("\n".join(line for line, is_code in _lines(text) if not is_code))
    # A comment may go on about making something.
    commands = [command for line in code for command in re.findall(r"\bmake ([a-z][a-z -]*)", line.partition(" #")[0])]
    return {target for command in commands for target in command.split()}
