"""One row of FAULTS.md as a test sees it, and the check that the table and the tests agree.

    python -m tests.process.fault_rows                 the check; exit code 1 where they do not agree
    python -m tests.process.fault_rows SECONDS_FILE    the check, then the measured seconds go into the table

A test of a row is marked `@pytest.mark.fault("C3")` and takes the fixture `row`. With FAULT_SECONDS in the environment
each test of a row appends a line `ID seconds ANSWER...` to that file; where COMFYUI_DIR is set too, the seconds are
those of real ComfyUI.
"""

import ast
import os
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.process.stack import Driver, invert_job, is_inverted, picture_bytes, wait_until

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("FAULTS.md")
ANSWERS = {"COMPLETED", "CANCELLED", "TIMED_OUT"}
IDLE_TIMEOUT_S = 10.0
EVERY = 1_000_000  # times a fault strikes: more than any run has messages


@dataclass(frozen=True)
class TableRow:
    """A line of FAULTS.md: | id | fault | how | the caller sees | the next job | s | s, real ComfyUI | tests |."""

    id: str
    cells: tuple[str, ...]

    @property
    def answers(self) -> set[str]:
        """The error codes and final states that the caller is said to see."""
        return set(re.findall(r"`([A-Z][A-Z_]+)`", self.cells[3]))

    @property
    def tests(self) -> set[str]:
        return set(re.findall(r"`(test_\w+)`", self.cells[7]))


def read_table(text: str) -> dict[str, TableRow]:
    """The rows of the table by their id. Raises ValueError for a malformed or repeated one."""
    rows: dict[str, TableRow] = {}
    for line in text.splitlines():
        if not re.match(r"\| [A-Z]\d+ \|", line):
            continue
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) != 8 or cells[0] in rows:
            raise ValueError(f"{TABLE.name}: {cells[0]} has {len(cells)} cells, or stands there twice")
        rows[cells[0]] = TableRow(cells[0], cells)
    return rows


def marked_tests() -> dict[str, set[str]]:
    """The ids of rows, each with the names of the tests that are marked with it and take `row`."""
    found: dict[str, set[str]] = {}
    for path in TABLE.parent.glob("test_*.py"):
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "row" in {argument.arg for argument in function.args.args}:
                for row_id in _marks(function):
                    found.setdefault(row_id, set()).add(function.name)
    return found


def _marks(function: ast.FunctionDef) -> Iterator[str]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
            yield ast.literal_eval(decorator.args[0])


def disagreements(table: str, tests: dict[str, set[str]]) -> list[str]:
    """A sentence for each thing in which the table and the tests (as `marked_tests` finds them) do not agree."""
    rows = read_table(table)
    found = [f"{row_id} has a test and no row" for row_id in sorted(tests.keys() - rows.keys())]
    codes = set(re.findall(r'^    code = "([A-Z_]+)"', (ROOT / "worker/errors.py").read_text(), re.MULTILINE))
    for row in rows.values():
        if row.tests != tests.get(row.id, set()):
            found.append(f"{row.id} names {sorted(row.tests)}; marked are {sorted(tests.get(row.id, set()))}")
        if unknown := row.answers - codes - ANSWERS:
            found.append(f"{row.id} has the caller see {sorted(unknown)}, which is no code and no state")
        if not row.answers:
            found.append(f"{row.id} does not say what the caller sees")
    for letter in sorted({row_id[0] for row_id in rows}):
        numbers = sorted(int(row_id[1:]) for row_id in rows if row_id[0] == letter)
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"the rows {letter} are not numbered from 1 without a gap: {numbers}")
    return found


@dataclass
class Measured:
    """What the tests of one row said: the longest time in s, and every answer that a caller saw."""

    seconds: float = 0.0
    answers: set[str] = field(default_factory=set)


def read_measured(text: str) -> dict[str, Measured]:
    rows: dict[str, Measured] = {}
    for line in text.splitlines():
        row_id, seconds, *answers = line.split()
        row = rows.setdefault(row_id, Measured())
        row.seconds = max(row.seconds, float(seconds))
        row.answers |= set(answers)
    return rows


def unseen(table: str, measured: dict[str, Measured]) -> list[str]:
    """A sentence for each row of the table that was not run, or of which no test saw an answer that it names."""
    found = []
    for row in read_table(table).values():
        if row.id not in measured:
            found.append(f"{row.id} was not run, or failed")
        elif missing := row.answers - measured[row.id].answers:
            found.append(f"{row.id} has the caller see {sorted(missing)}, which no test of it saw")
    return found


def with_seconds(text: str, measured: dict[str, Measured]) -> str:
    """The table with the figures of a run; of a row that was not run it keeps none."""
    column = 6 if "COMFYUI_DIR" in os.environ else 5
    lines = []
    for line in text.splitlines():
        cells = line.strip("|").split("|")
        if len(cells) == 8 and re.match(r" [A-Z]\d+ $", cells[0]):
            row = measured.get(cells[0].strip())
            cells[column] = f" {row.seconds:.1f} " if row else "  "
            line = f"|{'|'.join(cells)}|"
        lines.append(line)
    return "\n".join(lines) + "\n"


@dataclass
class Row:
    """What a test asserts of its row: what the caller sees, and that the next job runs and nothing is left."""

    table_row: TableRow
    is_alone: bool = True
    """Whether this is the row's only test: else another one, or another parameter, sees the other answers."""
    seen: set[str] = field(default_factory=set)
    next_job_ran: bool = False
    seconds: float = 0.0

    def fails(self, answer: dict[str, Any], code: str, *words: str) -> dict[str, Any]:
        """The job failed with this code and a sentence with these words. Returns its details."""
        self._sees(answer, code)
        assert answer["status"] == "FAILED", answer
        assert answer["output"]["error_code"] == code, answer
        assert answer["error"].startswith(f"[{code}] ")
        assert [word for word in words if word not in answer["error"]] == [], answer["error"]
        assert "\n" not in answer["error"]
        return dict(answer["output"]["details"])

    def succeeds(self, answer: dict[str, Any], contents: dict[str, bytes] | None = None) -> dict[str, Any]:
        """The job gave one picture for each node of ``contents``: its content, inverted. Returns the result."""
        self._sees(answer, "COMPLETED")
        assert answer["status"] == "COMPLETED", answer
        expected = contents or {"3": picture_bytes()}
        items = answer["output"]["images"]
        assert sorted(item["node_id"] for item in items) == sorted(expected)
        assert [item["node_id"] for item in items if not is_inverted(item, expected[item["node_id"]])] == []
        return dict(answer["output"])

    def ends(self, answer: dict[str, Any], ending: str) -> None:
        """The job ended in this way: an error code, or where it has none the platform's state."""
        self._sees(answer, ending)
        assert ending == (answer.get("output") or {}).get("error_code", answer["status"]), answer

    def _sees(self, answer: dict[str, Any], word: str) -> None:
        assert word in self.table_row.answers, (
            f"{TABLE.name} says that {self.table_row.id} gives {self.table_row.answers}"
        )
        self.seen.add(word)
        self.seconds = max(self.seconds, answer.get("executionTime", 0) / 1000)

    def next_job_runs(self, driver: Driver) -> None:
        """Nothing is left of the job before; one with a picture of its own gives that, and nothing is left of it."""
        self.leaves_nothing(driver)
        content = picture_bytes(color=f"#{secrets.token_hex(3)}")
        answer = driver.run(invert_job(content))
        assert answer["status"] == "COMPLETED", answer
        (item,) = answer["output"]["images"]
        assert (item["node_id"], is_inverted(item, content)) == ("3", True)
        assert answer["output"]["warnings"] == []
        self.leaves_nothing(driver)
        self.next_job_ran = True

    @staticmethod
    def leaves_nothing(driver: Driver) -> None:
        """ComfyUI lives, does nothing and remembers nothing; no file of a job is there, no line of it in its log."""
        wait_until(driver.comfyui_answers, "ComfyUI answers")
        wait_until(driver.comfyui_is_idle, "ComfyUI is idle", IDLE_TIMEOUT_S)
        wait_until(lambda: driver.comfyui("/history") == {}, "the history is empty", IDLE_TIMEOUT_S)
        wait_until(lambda: driver.job_files() == [], "the files are wiped", IDLE_TIMEOUT_S)
        wait_until(lambda: "got prompt" not in driver.comfyui_log(), "ComfyUI's log is wiped", IDLE_TIMEOUT_S)

    def check_complete(self) -> None:
        """To be called after the test: it asserted all that a row promises."""
        assert self.next_job_ran, "the test did not run the next job"
        assert self.seen, "the test did not say what the caller sees"
        if self.is_alone:
            assert self.seen == self.table_row.answers
        if path := os.environ.get("FAULT_SECONDS"):
            with Path(path).open("a") as stream:
                stream.write(f"{self.table_row.id} {self.seconds:.1f} {' '.join(sorted(self.seen))}\n")


def main() -> int:
    table = TABLE.read_text()
    problems = disagreements(table, marked_tests())
    if len(sys.argv) > 1 and not problems:
        measured = read_measured(Path(sys.argv[1]).read_text())
        problems = unseen(table, measured)
        TABLE.write_text(with_seconds(table, measured))
    for problem in problems:
        print(problem, file=sys.stderr)
    rows = read_table(table)
    print(f"{TABLE.name}: {len(rows)} rows, {sum(len(row.tests) for row in rows.values())} tests")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
