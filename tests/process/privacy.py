"""A word that must be nowhere after its job, and where to look for it: files, logs, ComfyUI's answers, memory."""

import base64
import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.process.stack import base64_of, slow_workflow

MARKER = "Zq7-privacy-marker-mH2"
_CHUNK_BYTES = 16 << 20
_MAX_MAPPING_BYTES = 1 << 36  # beyond that it is address space that is only reserved


def forms_of(word: str) -> list[bytes]:
    """A word as it may stand somewhere: plain, as pixels that were inverted, in Base64 at any of three offsets."""
    plain = word.encode()
    encoded = [base64.b64encode(bytes(shift) + plain)[2 * shift : -4] for shift in range(3)]
    return [plain, bytes(255 - byte for byte in plain), *encoded]


FORMS = forms_of(MARKER)


def has_marker(content: bytes | str) -> bool:
    raw = content if isinstance(content, bytes) else content.encode(errors="replace")
    return any(form in raw for form in FORMS)


def marked_png() -> bytes:
    """A picture whose pixels are the marker, again and again, and which is not compressed."""
    row = (MARKER.encode() * 20)[: 3 * 100]
    stream = io.BytesIO()
    Image.frombytes("RGB", (100, 64), row * 64).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def marked_jpeg() -> bytes:
    """A picture that has the marker in its EXIF data, as a description."""
    picture = Image.new("RGB", (64, 48), "orange")
    exif = picture.getexif()
    exif[0x010E] = MARKER
    stream = io.BytesIO()
    picture.save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def marked_job(seconds: float = 0, **extra: Any) -> dict[str, Any]:
    """A job with the marker in its prompt text, file names, titles and pixels; it works for ``seconds``."""
    workflow = slow_workflow(seconds)
    workflow["1"]["inputs"]["image"] = f"{MARKER}.png"
    workflow["1"]["_meta"] = {"title": MARKER}
    workflow["3"]["inputs"]["filename_prefix"] = f"{MARKER}/{MARKER}"
    workflow["text"] = {"class_type": "PrimitiveString", "inputs": {"value": f"a cat, {MARKER}"}}
    workflow["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["text", 0]}}
    workflow["preview"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    return {"workflow": workflow, "images": {f"{MARKER}.png": base64_of(marked_png())}, **extra}


def files_with_marker(root: Path) -> list[Path]:
    """Files that have the marker in their names or contents, of all that is there."""
    found = []
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if has_marker(str(path)) or (path.is_file() and has_marker(path.read_bytes())):
                found.append(path)
    return found


def count_in_memory(pid: int) -> int:
    """How often the marker, in any form, stands in what a process can read of its own memory (proc(5): mem).

    Skips the test where the kernel does not let one process look into another.
    """
    try:
        return sum(content.count(form) for content in _readable_memory(pid) for form in FORMS)
    except PermissionError as error:
        pytest.skip(f"needs the right to read the memory of another process: {error}")


def _readable_memory(pid: int) -> Iterator[bytes]:
    overlap = max(map(len, FORMS)) - 1
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            begin, end = (int(number, 16) for number in re.split("[- ]", line)[:2])
            if line.split()[1][0] != "r" or end - begin > _MAX_MAPPING_BYTES:
                continue
            tail = b""
            for position in range(begin, end, _CHUNK_BYTES):
                try:
                    memory.seek(position)
                    content = memory.read(min(_CHUNK_BYTES, end - position))
                except (OSError, ValueError, OverflowError):  # [vvar], [vsyscall]; unmapped meanwhile
                    break
                yield tail + content
                tail = content[-overlap:]
