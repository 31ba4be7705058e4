"""The files of a job's input: their names, and their contents as Base64 or by URL."""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from dataclasses import dataclass

from worker.errors import InputInvalid, MediaInvalid
from worker.https_url import HttpsUrl

MAX_NAME_BYTES = 255  # what a file system takes for one part of a path
_DATA_URI = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)


@dataclass(frozen=True)
class InputFile:
    """One file for ComfyUI's input directory; ``name`` is relative to it and may have folders."""

    name: str
    data: bytes


@dataclass(frozen=True)
class UrlInput:
    """One file that has yet to be fetched (worker/fetch.py); an image is checked then."""

    name: str
    url: HttpsUrl
    is_image: bool


def parse_files(value: object, key: str, allow_urls: bool) -> list[InputFile | UrlInput]:
    """Both forms: ``{name: base64}`` and the official worker's ``[{"name": ..., "image": base64}]``."""
    if value is None:
        return []
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [_pair_of_item(item, key, position) for position, item in enumerate(value)]
    else:
        raise InputInvalid(f'\'{key}\' must be {{name: base64}} or a list of {{"name", "image"}} objects.')
    return [_parse_file(_checked_name(raw, key), content, key, allow_urls) for raw, content in pairs]


def _parse_file(name: str, content: object, key: str, allow_urls: bool) -> InputFile | UrlInput:
    if not isinstance(content, str) or not content[:8].lower().startswith(("http://", "https://")):
        return InputFile(name, _decode(content, name))
    if not allow_urls:
        raise InputInvalid(f"{name!r} is a URL; this worker takes Base64 only, unless it has ALLOW_URL_INPUTS=1.")
    return UrlInput(name, HttpsUrl.parse(content, name), is_image=key == "images")


def _pair_of_item(item: object, key: str, position: int) -> tuple[object, object]:
    if not isinstance(item, dict) or "name" not in item:
        raise InputInvalid(f"Item {position} of '{key}' must be an object with 'name' and 'image'.")
    content = next((item[field] for field in ("image", "file", "data") if field in item), None)
    return item["name"], content


def _checked_name(name: object, key: str) -> str:
    """A relative path of plain parts, kept letter for letter: the workflow names the file in the same way."""
    if not isinstance(name, str) or not name:
        raise InputInvalid(f"Every file of '{key}' needs a name (a string that is not empty).")
    shown = repr(name[:80])
    if any(ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in name) or "\\" in name:
        raise InputInvalid(f"The file name {shown} has a control character, a backslash or a broken character.")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InputInvalid(f"The file name {shown} must be relative to the input directory and stay inside it.")
    if any(part.startswith(".") for part in parts):
        raise InputInvalid(f"The file name {shown} has a part that starts with a dot.")
    if len(parts) > 8 or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise InputInvalid(f"The file name {shown} is too long.")
    return name


def _decode(value: object, name: str) -> bytes:
    """Base64, plain or as a data URI; the URL-safe alphabet, white space and missing padding are taken too."""
    if not isinstance(value, str):
        raise InputInvalid(f"The content of {name!r} must be a Base64 string.")
    prefix = _DATA_URI.match(value)
    text = value[prefix.end() :] if prefix else value
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error, or a character outside ASCII; worth a second, slower look
        pass
    text = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        raise MediaInvalid(f"The content of {name!r} is not valid Base64; it may have been cut.", name=name) from None


def refuse_duplicates(files: list[InputFile | UrlInput]) -> None:
    """Names that look the same (NFC and NFD) are one name: two files of it would be somebody's mistake."""
    seen: set[str] = set()
    for file in files:
        name = unicodedata.normalize("NFC", file.name)
        if name in seen:
            raise InputInvalid(f"Two files are named {name!r}; each name can be sent once.")
        seen.add(name)
    for name in seen:
        folder = name
        while "/" in folder:
            folder = folder.rpartition("/")[0]
            if folder in seen:
                raise InputInvalid(f"{folder!r} is sent as a file and used as the folder of {name!r}.")
