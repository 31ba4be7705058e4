"""Small real media files, made by hand: MP4 of JPEG pictures (ISO 14496-12), WebM of VP8 pictures (RFC 9559), and
silence as FLAC (RFC 9639), MP3 (ISO 11172-3) and Opus (RFC 7845); and safetensors."""

from __future__ import annotations

import json
import struct
from typing import Any

_FLAC_BLOCK = 4096
_MP3_FRAME = 1152
_MATRIX = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def mp4_of_jpegs(pictures: list[bytes], size: tuple[int, int], fps: float) -> bytes:
    """A video track of JPEG pictures, one a frame; the index stands before the data."""
    head = _box(b"ftyp", b"isom", struct.pack(">I", 0x200), b"isommp42")
    scale, step = round(fps * 1000), 1000
    offset = len(head) + len(_moov(pictures, size, scale, step, 0)) + 8
    return head + _moov(pictures, size, scale, step, offset) + _box(b"mdat", *pictures)


def jpegs_of_mp4(data: bytes) -> tuple[list[bytes], float]:
    """The pictures of a file that `mp4_of_jpegs` has made, and how many are shown a second. Raises ValueError."""
    tables = {kind: data.find(kind) + 8 for kind in (b"mdhd", b"stts", b"stsz", b"stco")}  # behind version and flags
    if data[4:8] != b"ftyp" or min(tables.values()) < 8:
        raise ValueError("Invalid data found when processing input")
    (scale,) = struct.unpack_from(">8xI", data, tables[b"mdhd"])
    (step,) = struct.unpack_from(">8xI", data, tables[b"stts"])
    (count,) = struct.unpack_from(">4xI", data, tables[b"stsz"])
    sizes = struct.unpack_from(f">8x{count}I", data, tables[b"stsz"])
    (offset,) = struct.unpack_from(">4xI", data, tables[b"stco"])
    starts = [offset + sum(sizes[:index]) for index in range(count)]
    return [data[start : start + size] for start, size in zip(starts, sizes, strict=True)], scale / step


def flac_length(data: bytes) -> tuple[int, int, int]:
    """Samples a second, channels and samples of a FLAC file, from its first block."""
    packed = int.from_bytes(data[18:26], "big")
    return packed >> 44, (packed >> 41 & 7) + 1, packed & (1 << 36) - 1


def flac_of_silence(sample_rate: int, channels: int, samples: int, tags: dict[str, str]) -> bytes:
    """16 bits a sample, all zero; `tags` become Vorbis comments."""
    packed = sample_rate << 44 | (channels - 1) << 41 | (16 - 1) << 36 | samples
    # The signature of the decoded audio, 16 zero bytes, means "not known".
    info = struct.pack(">HH", _FLAC_BLOCK, _FLAC_BLOCK) + bytes(6) + packed.to_bytes(8, "big") + bytes(16)
    comments = [f"{name}={text}".encode() for name, text in tags.items()]
    vendor = b"stand-in"
    listing = b"".join(struct.pack("<I", len(comment)) + comment for comment in comments)
    comment_block = struct.pack("<I", len(vendor)) + vendor + struct.pack("<I", len(comments)) + listing
    stream = b"fLaC" + _flac_metadata(0, info) + _flac_metadata(0x84, comment_block)
    lengths = [_FLAC_BLOCK] * (samples // _FLAC_BLOCK) + [samples % _FLAC_BLOCK] * (samples % _FLAC_BLOCK > 0)
    return stream + b"".join(_flac_frame(number, length, channels) for number, length in enumerate(lengths))


def mp3_of_silence(sample_rate: int, channels: int, samples: int) -> bytes:
    """Frames of 128 kbit/s whose side information and data are zero. Raises KeyError for other rates than MPEG-1's."""
    rate_index = {44100: 0, 48000: 1, 32000: 2}[sample_rate]
    header = bytes([0xFF, 0xFB, 9 << 4 | rate_index << 2, (0 if channels == 2 else 3) << 6])
    return header.ljust(144 * 128_000 // sample_rate, b"\0") * -(-samples // _MP3_FRAME)


def opus_of_silence(channels: int, seconds: float) -> bytes:
    """An Ogg stream, one page for each packet of 20 ms."""
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, channels, 0, 48000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I8sI", 8, b"stand-in", 0)
    count = max(1, round(seconds * 50))
    packet = bytes([0xFC if channels == 2 else 0xF8, 0xFF, 0xFE])
    pages = [_ogg_page(0, 2, 0, head), _ogg_page(1, 0, 0, tags)]
    pages += [_ogg_page(2 + number, 4 * (number + 1 == count), 960 * (number + 1), packet) for number in range(count)]
    return b"".join(pages)


def webm_of_vp8(pictures: list[bytes], size: tuple[int, int], fps: float) -> bytes:
    """A video track of VP8 key frames, each as a lossy WebP file holds it."""
    head = _ebml(0x1A45DFA3, *(_ebml(*field) for field in ((0x4282, b"webm"), (0x4287, b"\2"), (0x4285, b"\2"))))
    duration = struct.pack(">d", 1000 * len(pictures) / fps)
    info = _ebml(0x1549A966, _ebml(0x2AD7B1, b"\x0f\x42\x40"), _ebml(0x4489, duration))
    sides = (_ebml(0xB0, struct.pack(">H", size[0])), _ebml(0xBA, struct.pack(">H", size[1])))
    fields = (_ebml(0xD7, b"\1"), _ebml(0x73C5, b"\1"), _ebml(0x83, b"\1"), _ebml(0x86, b"V_VP8"), _ebml(0xE0, *sides))
    blocks = [
        _ebml(0xA3, struct.pack(">BhB", 0x81, round(1000 * number / fps), 0x80), picture)
        for number, picture in enumerate(pictures)
    ]
    tracks = _ebml(0x1654AE6B, _ebml(0xAE, *fields))
    return head + _ebml(0x18538067, info, tracks, _ebml(0x1F43B675, _ebml(0xE7, b"\0"), *blocks))


def safetensors(header: dict[str, Any], data: bytes) -> bytes:
    """`header` describes the tensors whose bytes `data` holds; it is filled up to a multiple of 8 bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def vp8_of_webp(webp: bytes) -> bytes:
    """The one frame of a lossy WebP file."""
    start = webp.index(b"VP8 ")
    return webp[start + 8 : start + 8 + int.from_bytes(webp[start + 4 : start + 8], "little")]


def _ebml(element: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = (1 << 56 | len(content)).to_bytes(8, "big")
    return element.to_bytes((element.bit_length() + 7) // 8, "big") + length + content


def _ogg_page(number: int, flags: int, position: int, packet: bytes) -> bytes:
    head = b"OggS" + struct.pack("<BBqII", 0, flags, position, 1, number)
    lacing = bytes([1, len(packet)])  # one segment: the packets here are short
    checksum = struct.pack("<I", _crc(head + bytes(4) + lacing + packet, 32, 0x04C11DB7))
    return head + checksum + lacing + packet


def _moov(pictures: list[bytes], size: tuple[int, int], scale: int, step: int, offset: int) -> bytes:
    width, height = size
    duration = len(pictures) * step
    mvhd = _box(
        b"mvhd",
        struct.pack(">IIIII", 0, 0, 0, scale, duration),
        struct.pack(">IH10x", 0x10000, 0x100),
        _MATRIX,
        struct.pack(">24xI", 2),
    )
    tkhd = _box(
        b"tkhd",
        struct.pack(">IIIIII", 3, 0, 0, 1, 0, duration),
        bytes(16),  # reserved, layer, group and volume
        _MATRIX,
        struct.pack(">II", width << 16, height << 16),
    )
    mdhd = _box(b"mdhd", bytes(4), struct.pack(">4I2H", 0, 0, scale, duration, 0x55C4, 0))
    hdlr = _box(b"hdlr", bytes(8), b"vide", bytes(12), b"VideoHandler\0")
    dinf = _box(b"dinf", _box(b"dref", bytes(4), struct.pack(">I", 1), _box(b"url ", struct.pack(">I", 1))))
    vmhd = _box(b"vmhd", struct.pack(">I", 1), bytes(8))
    entry = struct.pack(">6xH16xHHIIIH32sHh", 1, width, height, 72 << 16, 72 << 16, 0, 1, b"\x04JPEG", 24, -1)
    stsd = _box(b"stsd", bytes(4), struct.pack(">I", 1), _box(b"jpeg", entry))
    stts = _box(b"stts", bytes(4), struct.pack(">3I", 1, len(pictures), step))
    stsc = _box(b"stsc", bytes(4), struct.pack(">4I", 1, 1, len(pictures), 1))
    sizes = [len(picture) for picture in pictures]
    stsz = _box(b"stsz", bytes(4), struct.pack(f">2I{len(sizes)}I", 0, len(sizes), *sizes))
    stco = _box(b"stco", bytes(4), struct.pack(">2I", 1, offset))
    stbl = _box(b"stbl", stsd, stts, stsc, stsz, stco)
    mdia = _box(b"mdia", mdhd, hdlr, _box(b"minf", vmhd, dinf, stbl))
    return _box(b"moov", mvhd, _box(b"trak", tkhd, mdia))


def _box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", len(content) + 8) + kind + content


def _flac_metadata(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + len(content).to_bytes(3, "big") + content


def _flac_frame(number: int, length: int, channels: int) -> bytes:
    """A frame whose subframes each hold one constant, 0. The block size stands in 16 bits, the rate in the header."""
    header = b"\xff\xf8\x70" + bytes([(channels - 1) << 4 | 4 << 1]) + _utf8(number) + struct.pack(">H", length - 1)
    frame = header + bytes([_crc(header, 8, 0x07)]) + bytes(3) * channels
    return frame + struct.pack(">H", _crc(frame, 16, 0x8005))


def _utf8(number: int) -> bytes:
    """A frame number in FLAC's extension of UTF-8, up to 2**21 - 1 (surrogates, too, are numbers here)."""
    return chr(number).encode("utf-8", "surrogatepass")


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    value, top, mask = 0, 1 << (bits - 1), (1 << bits) - 1
    for byte in data:
        value ^= byte << (bits - 8)
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
    return value
