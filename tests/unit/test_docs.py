"""The documents against the tree: links lead somewhere, and the tables are exactly what the code has."""

import ast
import json
import mimetypes
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import client
import utils
from local.__main__ import free_port
from tests.documents import (
    ROOT,
    anchors,
    build_arguments,
    documents,
    first_names,
    links,
    make_targets,
    names,
    rows,
    section,
    text_of,
)
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
from worker import delivery, errors, fetch, input_files, media, media_types, outputs, payload, reencode, workflow_checks
from worker.config import Config, ConfigError
from worker.errors import WorkerError
from worker.models.manifest import ModelRecord
from worker.outputs import Output
from worker.steps import STEPS

DOCUMENTS = documents()
API = "docs/api.md"
CONFIGURATION = "docs/configuration.md"


def test_the_documents_are_found() -> None:
    expected = {"README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/api.md", "docs/configuration.md"}
    expected |= {"workflows/README.md", "tests/workflows/README.md", "local/README.md", "tests/process/FAULTS.md"}
    assert expected <= set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings(document: str) -> None:
    path, missing = ROOT / document, []
    for target, anchor in links(path.read_text()):
        found = (path.parent / target).resolve() if target else path
        is_there = found.exists() and (not anchor or anchor in anchors(found.read_text()))
        # Outside the repository there is nothing on GitHub.
        if not is_there or not found.is_relative_to(ROOT):
            missing.append(f"{target}#{anchor}" if anchor else target)
    assert missing == []


def test_headings_have_the_anchors_that_github_gives_them() -> None:
    text = "# One job, in 7 steps\n## `MODELS`, and a [link](a.md)\n## RunPod's side\n```\n# code\n```\n"
    expected = {"one-job-in-7-steps", "models-and-a-link", "runpods-side", "it-is_so", "it-is_so-1"}
    assert anchors(text + "# It is_so\n# It is_so\n") == expected


def test_links_are_found_but_not_in_code_and_not_to_other_sites() -> None:
    text = "[a](b.md#c) `[x](y)` [d](https://e) [`f`](#g)\n```\n[h](i)\n```"
    assert links(text) == [("b.md", "c"), ("", "g")]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_named_exists(document: str) -> None:
    assert make_targets(text_of(document)) <= set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.MULTILINE))


def test_make_targets_are_found_in_code_and_nowhere_else() -> None:
    text = "`make image-deps image-test` and\nmake sure, `A=b make up`\n```\nmake demo     # to make a picture\n```\n"
    assert make_targets(text) == {"image-deps", "image-test", "up", "demo"}


# --- docs/configuration.md ---

BUILD, CLIENT = "Building the image", "The client"


def settings(title: str) -> dict[str, list[str]]:
    """The rows of a section of docs/configuration.md, each with one variable in its first cell, by that."""
    found = rows(section(text_of(CONFIGURATION), title))
    assert all(len(names(cells[0])) == 1 for cells in found)
    return {names(cells[0])[0]: cells for cells in found}


def worker_settings() -> dict[str, list[str]]:
    titles = ["Models", "Jobs", "Results", "ComfyUI and the container", "SSH", "Logs"]
    found = [item for title in titles for item in settings(title).items()]
    assert len(dict(found)) == len(found)
    return dict(found)


def default_of(cells: list[str]) -> str:
    return cells[1].strip("`")


def test_the_tables_of_settings_are_what_the_code_reads() -> None:
    start_sh = text_of("start.sh")
    read = set(re.findall(r'"\$\{([A-Z_]+):=', start_sh)) | set(re.findall(r"export ([A-Z_]+)=\$\{\1:-", start_sh))
    read |= set(re.findall(r'environ(?:\.get\(|, )"([A-Z_]+)"', text_of("worker/config.py")))
    read |= set(re.findall(r'environ\.get\("([A-Z_]+)"', text_of("utils.py"))) | {"MODE"}
    # where Hugging Face's library looks for its cache: the two that people set have rows
    assert set(worker_settings()) == read - {"HOME", "XDG_CACHE_HOME", "HUGGINGFACE_HUB_CACHE"}


def test_the_client_reads_the_variables_of_its_table() -> None:
    assert set(settings(CLIENT)) == set(re.findall(r'environ\.get\("([A-Z_]+)"', text_of("client.py")))


def test_the_defaults_are_those_of_the_code() -> None:
    """Of what is one value, and no other variable."""
    start_sh, config, utils = text_of("start.sh"), text_of("worker/config.py"), text_of("utils.py")
    defaults = dict(re.findall(r'"\$\{([A-Z_]+):=([^}$]*)\}"', start_sh)) | {"RUNPOD_LOG_LEVEL": "INFO"}
    defaults |= dict(re.findall(r'_required\(environ, "([A-Z_]+)", ([\d.]+)', config))
    defaults |= dict.fromkeys(re.findall(r'_flag\(environ, "([A-Z_]+)"\)', config), "0")
    defaults |= dict(re.findall(r'environ\.get\("([A-Z_]+)"\) or "([^"]+)"', config + utils))
    for name in ("REQUIRE_GPU", "HOME"):  # the first has one for each MODE
        del defaults[name]
    documented = {name: default_of(cells) for name, cells in worker_settings().items()}
    assert {name: documented[name] for name in defaults} == defaults
    assert len(defaults) > 25


def test_the_ranges_are_those_of_the_code() -> None:
    pattern = r'_(?:required|number)\(environ, "([A-Z_]+)", .*least=([\d.]+), most=([\d_]+)'
    ranges = re.findall(pattern, text_of("worker/config.py"))
    assert len(ranges) >= 7
    for name, least, most in ranges:
        assert re.search(rf"\b{least} to {int(most):,}(?!\d)", worker_settings()[name][2]), name


def ends_the_container(name: str, value: str) -> bool:
    """Whether start.sh, or the handler that it starts, ends with a sentence about this variable."""
    try:
        Config.from_env({name: value})
    except ConfigError as error:
        assert name in str(error)
        return True
    own = {"COMFYUI_DIR": str(ROOT / "local/comfyui"), "COMFYUI_PORT": str(free_port())}
    own |= {"COMFYUI_PYTHON": sys.executable, "WORKER_PYTHON": sys.executable, "PATH": os.environ["PATH"]}
    source = ["bash", "-c", "source start.sh && setup_environment"]
    told = subprocess.run(source, cwd=ROOT, env=own | {name: value}, capture_output=True, text=True, check=False)
    assert told.returncode == 0 or (told.returncode == 2 and name in told.stderr), told.stderr
    return told.returncode == 2


def test_a_wrong_value_ends_the_container_where_the_tables_say_so() -> None:
    wrong = {"COMFYUI_ARGS": "--listen"}
    tables = worker_settings()
    del tables["RAMDISK_DIR"]  # looked at later: `claim_ramdisk`
    documented = {name for name, cells in tables.items() if cells[3].startswith("ends")}
    assert {name for name in tables if ends_the_container(name, wrong.get(name, "?"))} == documented


def test_the_readme_has_some_of_the_settings_with_the_same_defaults() -> None:
    short = {names(cells[0])[0]: default_of(cells) for cells in rows(section(text_of("README.md"), "Environment"))}
    assert short.items() <= {name: default_of(cells) for name, cells in worker_settings().items()}.items()
    assert len(short) >= 10


def test_the_build_arguments_are_those_of_the_dockerfile() -> None:
    assert build_arguments() == {name: default_of(cells) for name, cells in settings(BUILD).items()}
    torches = [path.stem for path in (ROOT / "image").glob("torch-*.txt")]
    assert {default_of(settings(BUILD)["TORCH"]), *names(settings(BUILD)["TORCH"][2])} >= set(torches)


# --- docs/api.md ---


def api(title: str) -> str:
    return section(text_of(API), title)


def codes() -> dict[str, type[WorkerError]]:
    """Every error that is raised, by its code."""
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, WorkerError)]
    return {error.__dict__["code"]: error for error in classes if "code" in error.__dict__ and error is not WorkerError}


def test_the_contract_has_every_input_key_and_no_other() -> None:
    table = api("Input").partition("\n### ")[0]
    assert sorted(first_names(table)) == sorted(payload.KNOWN_KEYS)
    assert f"`{'`, `'.join(payload.OUTPUT_FORMATS[:-1])}` or `{payload.OUTPUT_FORMATS[-1]}`" in table


def test_the_contract_has_every_error_code_and_no_other() -> None:
    table = rows(api("Error codes"))
    documented = {names(cells[0])[0]: cells for cells in table}
    assert len(documented) == len(table)
    assert set(documented) == {*codes(), errors.internal_error()["error_code"]}
    replaced = {code for code, cells in documented.items() if cells[-1] == "yes"}
    assert replaced == {code for code, error in codes().items() if error.replace_worker}
    assert {cells[3] for cells in table} == {"yes", "no", "perhaps"}


def details_in_the_code() -> tuple[dict[str, set[str]], set[str]]:
    """The keys of `details` that are written where an error of a class is made; and all keys, wherever they are."""
    made: dict[str, set[str]] = {error.__name__: set() for error in codes().values()}
    others: set[str] = set()
    for path in [ROOT / "rp_handler.py", *(ROOT / "worker").glob("*.py")]:
        for found in ast.walk(ast.parse(path.read_text())):
            match found:
                case ast.Call(func=ast.Name(id=name), keywords=given) if name in made:
                    made[name] |= {keyword.arg for keyword in given if keyword.arg}
                case ast.Call(func=ast.Attribute(attr="_unreachable"), keywords=given):  # of worker/fetch.py
                    others |= {keyword.arg for keyword in given if keyword.arg}
                case ast.Assign(
                    targets=[ast.Subscript(value=ast.Attribute(attr="details"), slice=ast.Constant(value=str() as key))]
                ):
                    others.add(key)
                case ast.Assign(targets=[ast.Name(id="details")], value=ast.Dict(keys=keys)):
                    others |= {key.value for key in keys if isinstance(key, ast.Constant)}
                case ast.AugAssign(target=ast.Attribute(attr="details"), value=ast.Dict(keys=keys)):
                    others |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return made, others


def test_the_contract_has_every_key_of_the_details_and_no_other() -> None:
    made, others = details_in_the_code()
    documented = {code: set(names(cells[1])) for cells in rows(api("Details")) for code in names(cells[0]) or ["any"]}
    assert documented.keys() - {"any"} <= codes().keys()
    lacking = {code: made[error.__name__] - documented.get(code, set()) for code, error in codes().items()}
    assert {code: keys for code, keys in lacking.items() if keys} == {}
    assert set().union(*documented.values()) == set().union(others, *made.values())


def test_the_contract_has_every_key_of_an_item_and_of_a_model() -> None:
    assert first_names(api("Items")) == list(Output("9", "a.png").item(1))
    (models,) = [cells[1] for cells in rows(api("debug")) if cells[0] == "`models`"]
    assert names(models)[1:] == [field.name for field in fields(ModelRecord)]  # the first is MODELS


def categories() -> set[str]:
    """The lists of a result that hold files."""
    return {media_types.category_of(media_type) for media_type in media_types._BY_SUFFIX.values()}


def test_the_contract_has_the_lists_and_steps_of_a_result() -> None:
    table = api("Result").partition("\n### ")[0]
    assert categories() < set(first_names(table))
    (steps,) = [cells[1] for cells in rows(table) if cells[0] == "`timings_ms`"]
    assert [name for name in names(steps) if name != "debug"] == list(STEPS)


@pytest.mark.parametrize(
    "limit",
    [
        f"at most {payload.MAX_TIMEOUT_S:,}",
        f"the first {payload.MAX_NAMED_KEYS} are named",
        f"| levels of nesting, of the whole input | {payload.MAX_NESTING} |",
        f"| characters of a node's id, and of its class | {payload.MAX_ID_CHARS} |",
        f"| different classes | {payload.MAX_CLASSES:,} |",
        f"| nodes that depend on one another in a row | {workflow_checks.MAX_CHAIN} |",
        f"8 parts of {input_files.MAX_NAME_BYTES} bytes",
        f"{media.MAX_PIXELS:,} pixels, and {', '.join(media.FORMATS[:-1])} or {media.FORMATS[-1]}.",
        f"each of at most {fetch.MAX_REDIRECTS} redirects",
        f"{reencode.DEFAULT_QUALITY} where it is not given",
        "above {:g} and {:g} MB".format(*(delivery.result_limit_bytes(job, None) / 1e6 for job in ("a", "sync-a"))),
        f"the largest first, at most {delivery.MAX_LISTED_FILES}",
    ],
)
def test_the_limits_of_the_contract_are_those_of_the_code(limit: str) -> None:
    assert limit in " ".join(text_of(API).split())


# --- what the recipes of CONTRIBUTING.md rest on ---


def test_the_tests_that_the_recipes_name_exist() -> None:
    text = text_of("CONTRIBUTING.md")
    named = set(re.findall(r"`(test_\w+)`", text))
    paths = ["tests/unit/test_docs.py", *re.findall(r"\]\((tests/\S+\.py)\)", text)]
    defined = {name for path in paths for name in re.findall(r"^def (test_\w+)", text_of(path), re.MULTILINE)}
    assert len(named) > 10
    assert named <= defined


def test_the_names_in_capitals_that_the_recipes_name_exist() -> None:
    code = "".join(text_of(path) for path in ("client.py", "worker/media_types.py", "worker/outputs.py"))
    code += text_of("tests/process/test_faults_outputs.py") + text_of("tests/unit/test_media.py")
    named = {name for name in names(text_of("CONTRIBUTING.md")) if re.fullmatch(r"[A-Z_]+", name)}
    missing = {name for name in named if not re.search(rf"^{name}\b", code, re.MULTILINE)}
    assert missing <= {"JOB_TIMEOUT_S", "ARG"}


def test_every_error_code_has_a_row_of_faults() -> None:
    answers = set().union(*(row.answers for row in read_table(TABLE.read_text()).values()))
    # Tests of functions have these: a GPU and a driver that hang, an interrupt by hand, a ComfyUI that never listens.
    assert codes().keys() - answers == {"GPU_BROKEN", "COMFYUI_STUCK", "JOB_CANCELLED", "COMFYUI_UNAVAILABLE"}


def test_the_client_knows_the_lists_and_texts_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the same of ComfyUI's history, where it runs a workflow there itself."""
    assert set(client.FILE_LISTS) == categories()
    # What Python knows of suffixes is another thing on each machine.
    monkeypatch.setattr(mimetypes, "guess_type", lambda name: (media_types.media_type_of(name, b""), None))
    found = [f"a{suffix}" for suffix in media_types._BY_SUFFIX]
    result = client.comfyui_result("", {name: {"images": [{"filename": name}]} for name in found})
    listed = {item["node_id"]: kind for kind in client.FILE_LISTS for item in result[kind]}
    assert listed == {name: media_types.category_of(media_types.media_type_of(name, b"")) for name in found}
    texts = client.comfyui_result("", {"1": {key: [key] for key in outputs._TEXT_KEYS}})["texts"]
    assert [text["text"] for text in texts] == list(outputs._TEXT_KEYS)


def test_the_help_of_utils_has_what_it_reads() -> None:
    in_help = re.findall(r"^  ([A-Z_]+) ", utils.EPILOG, re.MULTILINE)
    read = set(re.findall(r'environ\.get\("([A-Z_]+)"', text_of("utils.py")))
    assert set(in_help) == read - {"HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}


def test_the_gallery_is_listed() -> None:
    abouts = [(path.name, json.loads(path.read_text())["about"]) for path in (ROOT / "tests/workflows").glob("*.json")]
    assert rows(text_of("tests/workflows/README.md")) == [[f"`{name}`", about] for name, about in sorted(abouts)]


# --- worker/errors.py, tests/mutants.py ---


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
