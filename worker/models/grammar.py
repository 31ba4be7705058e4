"""The MODELS line: which file of which Hugging Face repository goes into which folder of ComfyUI.

    RepoID[@revision]:Filename:Target[:LocalName]

Entries are separated by commas or newlines; spaces around every part, empty entries and comments (from # to the line's
end) are allowed. `Filename` may have folders, and `*` and `?` for several files at once: each matches within one part
of the path, and the files keep their own names. `Target` is a folder below ComfyUI's `models/` (with or without that
word), or an absolute path below COMFYUI_DIR. `LocalName` is the file's name there; without it the name in the
repository is kept.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from worker.models import ModelError

# ComfyUI reads both names (folder_paths.py, 0.18.1: map_legacy), but only the new one stands in its documentation.
RENAMED_FOLDERS = {"unet": "diffusion_models", "clip": "text_encoders"}
NAME_LIMIT_BYTES = 255  # of one file name, on every file system that Linux puts models on
SHOWN_LIMIT_CHARS = 120

# What huggingface_hub 2.4.0 accepts (utils/_validators.py, validate_repo_id), without importing it.
_REPO_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_REPO_NAME}/)?{_REPO_NAME}")


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One file that MODELS asks for."""

    repo_id: str
    """`org/name`, or `name` alone for the oldest repositories"""
    revision: str | None
    """branch, tag or commit; None: the default branch"""
    filename: str
    """path inside the repository; or a pattern"""
    path: Path
    """where ComfyUI will find it: absolute, below COMFYUI_DIR"""

    @property
    def is_pattern(self) -> bool:
        return "*" in self.filename or "?" in self.filename

    def matching(self, filenames: Iterable[str]) -> "list[ModelEntry]":
        """Of a pattern: an entry for each of a repository's files that it matches, in the order of their names."""
        parts = self.filename.replace("[", "[[]").split("/")  # only * and ? are special
        return [
            replace(self, filename=filename, path=self.path.with_name(PurePosixPath(filename).name))
            for filename in sorted(filenames)
            if not {"", ".", ".."} & set(filename.split("/"))
            if len(names := filename.split("/")) == len(parts) and all(map(fnmatchcase, names, parts))
        ]

    @property
    def source(self) -> str:
        """`org/name[@revision]:filename`, as the person wrote it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}:{self.filename}"


def parse_models(text: str, comfyui_dir: Path, file_text: str = "") -> tuple[list[ModelEntry], list[ModelError]]:
    """Read MODELS (`text`) and MODELS_FILE (`file_text`).

    Returns the good entries in their order, each file once, and one error for each bad entry; an error names the
    entry's position, counted from 1 without the empty ones. `comfyui_dir` must be absolute. Touches no file.
    """
    entries: list[ModelEntry] = []
    errors: list[ModelError] = []
    for variable, lines in (("MODELS", text), ("MODELS_FILE", file_text)):
        kept = re.sub(r"(^|\s)#.*", "", lines, flags=re.MULTILINE)
        written = [entry for entry in map(str.strip, re.split(r"[,\n]", kept)) if entry]
        for position, entry_text in enumerate(written, start=1):
            try:
                entries.append(_parse_entry(entry_text, comfyui_dir))
                entries, clashes = each_once(entries)
                if clashes:
                    raise ValueError(clashes[0])
            except ValueError as error:
                errors.append(ModelError(f"{variable} entry {position} ({_shown(entry_text)}) {error}"))
    return entries, errors


def each_once(entries: Iterable[ModelEntry]) -> tuple[list[ModelEntry], list[str]]:
    """The entries without those that are there already, and why some cannot be: another goes to the same place."""
    placed: dict[Path, ModelEntry] = {}
    clashes = []
    for entry in entries:
        key = entry.path / entry.source if entry.is_pattern else entry.path  # only what it stands for can clash
        other = placed.setdefault(key, entry)
        if other != entry:
            clashes.append(f"would overwrite {other.source} at {entry.path}: name each file, with a LocalName")
    return list(placed.values()), clashes


def _parse_entry(text: str, comfyui_dir: Path) -> ModelEntry:
    """Raises ValueError with the rest of a sentence that begins with the entry's name."""
    if "://" in text:
        raise ValueError("is a URL: write RepoID:Filename:Target, where RepoID is org/name")
    parts = [part.strip() for part in text.split(":")]
    if len(parts) not in (3, 4):
        raise ValueError(f"has {len(parts)} of the parts RepoID[@revision]:Filename:Target[:LocalName], not 3 or 4")
    repo_id, revision = _parse_repo(parts[0])
    filename = _checked_path("Filename", parts[1])
    name = PurePosixPath(filename).name
    entry = ModelEntry(repo_id, revision, filename, _parse_target(parts[2], comfyui_dir) / name)
    if len(parts) == 3:
        return entry
    if entry.is_pattern:
        raise ValueError("has a LocalName, but its Filename is a pattern: its files keep their names")
    return replace(entry, path=entry.path.with_name(_parse_local_name(parts[3], name)))


def _parse_repo(text: str) -> tuple[str, str | None]:
    repo_id, at, revision = (part.strip() for part in text.partition("@"))
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise ValueError(f"has the RepoID {_shown(repo_id)}, which is not of the form org/name")
    return repo_id, _checked_path("revision", revision) if at else None


def _parse_target(text: str, comfyui_dir: Path) -> Path:
    models_dir = comfyui_dir / "models"
    if text.startswith("/"):
        folder = Path("/", _checked_path("Target", text.strip("/")))
        if not folder.is_relative_to(models_dir):
            if folder == comfyui_dir or not folder.is_relative_to(comfyui_dir):
                raise ValueError(f"has the Target {_shown(text)}, which is not below {comfyui_dir}")
            return folder
        parts = folder.relative_to(models_dir).parts
    else:
        parts = PurePosixPath(_checked_path("Target", text.rstrip("/"))).parts
        parts = parts[1:] if parts[0] == "models" else parts
    if not parts:
        raise ValueError("has a Target that names no folder below models/, such as checkpoints")
    return models_dir.joinpath(RENAMED_FOLDERS.get(parts[0], parts[0]), *parts[1:])


def _parse_local_name(text: str, name_in_repo: str) -> str:
    name = _checked_path("LocalName", text)
    if "/" in name:
        raise ValueError("has a folder in its LocalName: put it into the Target")
    ending = PurePosixPath(name_in_repo).suffix
    if PurePosixPath(name).suffix.lower() != ending.lower():  # ComfyUI lists and loads models by their ending
        raise ValueError(f"has a LocalName that does not end in {ending or 'no ending'}, as its Filename does")
    return name


def _checked_path(what: str, text: str) -> str:
    """A relative path that stays below any folder that it is joined to."""
    for part in text.split("/"):
        if part == "":
            raise ValueError(f"has an empty part in its {what}")
        if part in (".", ".."):
            raise ValueError(f"has {part} in its {what}")
        if not part.isprintable():
            raise ValueError(f"has a control character or a broken one in its {what}")
        if len(os.fsencode(part)) > NAME_LIMIT_BYTES:
            raise ValueError(f"has a name of more than {NAME_LIMIT_BYTES} bytes in its {what}")
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN_LIMIT_CHARS else text[:SHOWN_LIMIT_CHARS] + "...")
