"""Small real media files, made by hand: an MP4 of JPEG pictures (ISO 14496-12), a FLAC of silence (RFC 9639)."""

from __future__ import annotations

import struct

_FLAC_BLOCK = 4096
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
