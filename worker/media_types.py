"""The media type of a file that a workflow made, by its first bytes where they say it, else by its suffix.

Not the mimetypes module: its answers for WebP, FLAC and others depend on the machine's /etc/mime.types. Registered or
common types only; what has none (latents, splats, PLY, FBX, safetensors) is ``application/octet-stream``.
"""

from __future__ import annotations

from pathlib import PurePosixPath

HEAD_BYTES = 16  # what `media_type_of` wants to see of a file
UNKNOWN = "application/octet-stream"
_BY_SUFFIX = {
    ".3gp": "video/3gpp",
    ".3mf": "model/3mf",
    ".aac": "audio/aac",
    ".aif": "audio/aiff",
    ".aiff": "audio/aiff",
    ".apng": "image/apng",
    ".avi": "video/x-msvideo",
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".csv": "text/csv",
    ".dae": "model/vnd.collada+xml",
    ".exr": "image/x-exr",
    ".flac": "audio/flac",
    ".flv": "video/x-flv",
    ".gif": "image/gif",
    ".glb": "model/gltf-binary",
    ".gltf": "model/gltf+json",
    ".gz": "application/gzip",
    ".hdr": "image/vnd.radiance",
    ".heic": "image/heic",
    ".html": "text/html",
    ".ico": "image/vnd.microsoft.icon",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".jxl": "image/jxl",
    ".m4a": "audio/mp4",
    ".m4v": "video/mp4",
    ".md": "text/markdown",
    ".mid": "audio/midi",
    ".midi": "audio/midi",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
    ".mp3": "audio/mpeg",
    ".mp4": "video/mp4",
    ".mpeg": "video/mpeg",
    ".mpg": "video/mpeg",
    ".mtl": "model/mtl",
    ".obj": "model/obj",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".ogv": "video/ogg",
    ".opus": "audio/ogg",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".psd": "image/vnd.adobe.photoshop",
    ".srt": "application/x-subrip",
    ".stl": "model/stl",
    ".svg": "image/svg+xml",
    ".tga": "image/x-tga",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".txt": "text/plain",
    ".usdz": "model/vnd.usdz+zip",
    ".vtt": "text/vtt",
    ".wav": "audio/wav",
    ".weba": "audio/webm",
    ".webm": "video/webm",
    ".webp": "image/webp",
    ".xml": "application/xml",
    ".yaml": "application/yaml",
    ".zip": "application/zip",
}
# Offset and bytes of what begins only one kind of file. Ogg, Matroska, ZIP and most of the MP4 family do not: the
# suffix says whether it is sound, pictures or something else.
_BY_SIGNATURE = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF8", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (4, b"ftypavif", "image/avif"),
    (0, b"fLaC", "audio/flac"),
    (8, b"WAVE", "audio/wav"),
    (0, b"glTF", "model/gltf-binary"),
    (0, b"%PDF-", "application/pdf"),
)
_CATEGORIES = {"image": "images", "video": "videos", "audio": "audio"}


def media_type_of(filename: str, head: bytes) -> str:
    """``head`` are the first HEAD_BYTES of the file, or none. A JPEG that is named ``a.png`` is ``image/jpeg``."""
    by_suffix = _BY_SUFFIX.get(PurePosixPath(filename).suffix.lower(), UNKNOWN)
    for offset, signature, media_type in _BY_SIGNATURE:
        if head.startswith(signature, offset):
            return "image/apng" if by_suffix == "image/apng" and media_type == "image/png" else media_type
    return by_suffix


def category_of(media_type: str) -> str:
    """The result's list for files of this type: ``images``, ``videos``, ``audio`` or ``files``."""
    return _CATEGORIES.get(media_type.partition("/")[0], "files")
