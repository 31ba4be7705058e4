"""What the image is built from, without building it: the pins, the Dockerfile's features, the build context."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.documents import build_arguments

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "image" / "constraints.txt"
TORCH_FILES = sorted((ROOT / "image").glob("torch-*.txt"))
ALL_PINS = [*TORCH_FILES, CONSTRAINTS]

# --- pins ---


def pins(path: Path) -> dict[str, str]:
    """The version of each package, by its normalized name. Fails on any line that is no comment and no pin."""
    versions: dict[str, str] = {}
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9]+(?:-[a-z0-9]+)*)==(\d+(?:\.\d+)*(?:\.post\d+)?)", line)
        assert match, f"{path.name}: {line!r} is no pin"
        assert match[1] not in versions, f"{path.name} has {match[1]} twice"
        versions[match[1]] = match[2]
    return versions


@pytest.mark.parametrize("path", ALL_PINS, ids=lambda path: path.name)
def test_every_line_pins_a_package_and_nothing_names_an_index(path: Path) -> None:
    assert len(pins(path)) > 20
    assert not re.search(r"://|--|@|index", path.read_text())


def test_torch_and_what_is_built_for_it_come_together_and_from_nowhere_else() -> None:
    assert len(TORCH_FILES) >= 2
    family = {"torch", "torchvision", "torchaudio"}
    for path in TORCH_FILES:
        assert family <= pins(path).keys(), path.name
        # pip gets both files as constraints: it refuses two versions of one package.
        assert pins(path).keys() & pins(CONSTRAINTS).keys() == set(), path.name


# --- the Dockerfile ---


class Instruction(NamedTuple):
    """``flags`` are the --name=value in front, ``words`` the rest."""

    name: str
    flags: tuple[str, ...]
    words: tuple[str, ...]


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, continued lines joined."""
    lines = [line for line in dockerfile().splitlines() if not line.lstrip().startswith("#")]
    found = []
    for text in re.split(r"(?<!\\)\n", "\n".join(lines)):
        if words := text.replace("\\\n", " ").split():
            end = next((at for at in range(1, len(words)) if not words[at].startswith("--")), len(words))
            found.append(Instruction(words[0], tuple(words[1:end]), tuple(words[end:])))
    return found


def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text()


# What docker's BuildKit, buildah and podman share. `COPY --link`, `--exclude` and `--parents`, a health check's
# `--start-interval` and a mount's `sharing=locked` are not there, or mean nothing, in one of them.
SHARED_FLAGS = {
    "COPY": {"--from", "--chmod"},
    "RUN": {"--mount"},
    "HEALTHCHECK": {"--interval", "--timeout", "--start-period", "--retries"},
}
SHARED_MOUNT_KEYS = {
    "bind": {"type", "source", "target", "from"},
    "cache": {"type", "target", "id"},
    "secret": {"type", "id", "target"},
}
SHARED_INSTRUCTIONS = {
    "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "WORKDIR"
}  # fmt: skip


def test_the_dockerfile_has_only_features_that_docker_buildah_and_podman_share() -> None:
    used = instructions()
    assert {instruction.name for instruction in used} <= SHARED_INSTRUCTIONS
    for instruction in used:
        names = {flag.partition("=")[0] for flag in instruction.flags}
        assert names <= SHARED_FLAGS.get(instruction.name, set()), instruction
    for mount in mounts():
        assert mount.keys() <= SHARED_MOUNT_KEYS[mount["type"]], mount


def mounts() -> list[dict[str, str]]:
    """The options of each mount of a RUN."""
    flags = [flag for instruction in instructions() for flag in instruction.flags if flag.startswith("--mount=")]
    return [dict(option.split("=", 1) for option in flag.removeprefix("--mount=").split(",")) for flag in flags]


def test_the_dockerfile_asks_for_no_other_frontend_and_has_no_heredoc() -> None:
    # A comment of this form in front of the first instruction would be a directive.
    head = dockerfile().partition("\nARG ")[0]
    assert re.findall(r"^#\s*\w+\s*=", head, re.MULTILINE) == []
    assert [instruction for instruction in instructions() if any("<<" in word for word in instruction.words)] == []


def test_every_stage_and_every_build_argument_that_is_used_is_declared() -> None:
    stages: set[str] = set()
    arguments: set[str] = set()
    for instruction in instructions():
        if instruction.name == "ARG":
            arguments |= {word.partition("=")[0] for word in instruction.words if re.match("[A-Z]", word)}
        if instruction.name == "FROM":
            (base, _as, name) = instruction.words
            assert base in stages or base == "${BASE_IMAGE}"
            stages.add(name)
        for flag in instruction.flags:
            if instruction.name == "COPY" and flag.startswith("--from="):
                assert flag.removeprefix("--from=") in stages
        if instruction.name in ("FROM", "COPY"):
            assert set(re.findall(r"\$\{?([A-Z_]+)", " ".join(instruction.words))) <= arguments
    assert stages == {"sources", "base", "baked"}


def test_the_default_torch_is_one_of_those_that_are_there() -> None:
    assert ROOT / "image" / f"{build_arguments()['TORCH']}.txt" in TORCH_FILES


# --- the build context ---


def let_through(path: str) -> bool:
    """Whether .dockerignore leaves this path in the context: the last pattern that matches it, or a folder that it is
    in, decides (moby/patternmatcher). Only the wildcards that the file has: * and **/ at the front."""
    parts = path.split("/")
    ends = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    left_in = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        assert re.fullmatch(r"\*|(\*\*/)?[A-Za-z0-9_./-]+", pattern), f"{line} needs a better matcher"
        form = {"*": r"[^/]*"}.get(pattern) or re.escape(pattern).replace(r"\*\*/", "(.*/)?")
        if any(re.fullmatch(form, end) for end in ends):
            left_in = line.startswith("!")
    return left_in


def context_sources() -> list[str]:
    """What the Dockerfile takes from the context, as regular expressions; any TORCH may be asked for."""
    taken = []
    for instruction in instructions():
        if instruction.name == "COPY" and not any(flag.startswith("--from=") for flag in instruction.flags):
            taken += instruction.words[:-1]
    taken += [mount["source"] for mount in mounts() if mount["type"] == "bind" and "from" not in mount]
    return [re.escape(source.removeprefix("./")).replace(r"\$TORCH", "torch-[^/]*") for source in taken]


def files() -> Iterator[str]:
    """Every file of the tree, but for those that tools have made."""
    for folder, names, found in os.walk(ROOT):
        made = {".git", ".venv", "output", "node_modules"}
        names[:] = [name for name in names if name not in made and not name.endswith("_cache")]
        yield from (str(Path(folder, name).relative_to(ROOT)) for name in found)


def test_what_the_dockerfile_copies_is_in_the_context_and_nothing_else_is() -> None:
    tree = list(files())
    assert {"Dockerfile", "start.sh", "worker/errors.py"} <= set(tree)
    sources = context_sources()
    assert len(sources) >= 8
    for source in sources:
        copied = [path for path in tree if re.fullmatch(f"{source}(/.*)?", path) and "__pycache__" not in path]
        assert copied, f"there is no {source}"
        assert [path for path in copied if not let_through(path)] == []
    copied_at_all = re.compile("|".join(f"{source}(/.*)?" for source in sources))
    assert [path for path in tree if let_through(path) and not copied_at_all.fullmatch(path)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".env",
        ".git/config",
        ".venv/bin/python",
        ".dockerignore",
        "Dockerfile",
        "client.py",
        "local/comfyui/main.py",
        "output/1.png",
        "requirements-dev.txt",
        "start.sh.orig",
        "tests/worker/errors.py",
        "worker/__pycache__/errors.pyc",
        "worker/models/__pycache__/hub.pyc",
    ],
)
def test_what_lies_about_in_a_checkout_stays_out_of_the_context(path: str) -> None:
    assert not let_through(path)
