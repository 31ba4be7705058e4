"""Do the structure checks of worker/media.py agree with a full decode? 1,000 random cuts of each format.

They do, but for the last bytes of a PNG, GIF or JPEG, and cuts between two pictures of an animated GIF: a decode takes
those, and gives every pixel, or fewer pictures. The check refuses them; why that is right stands in media.py.
`CUTS=100` makes fewer, `SEED=7` those of an earlier run; `pytest -s` shows the counts.
"""

import io
import os
import random
import struct
import warnings
from collections import Counter

import pytest
from PIL import Image, ImageFile, ImageSequence

from worker.errors import MediaInvalid
from worker.media import check_image

CUTS = int(os.environ.get("CUTS", "1000"))
SEED = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
CUTS_OF_A_PICTURE = 20
NEAR_THE_END = 32  # bytes: half of the cuts are there, where the two could differ

FORMS: dict[str, tuple[str, dict[str, object]]] = {
    "PNG": ("PNG", {}),
    "animated PNG": ("PNG", {"save_all": True}),
    "JPEG, baseline": ("JPEG", {}),
    "JPEG, progressive": ("JPEG", {"progressive": True}),
    "WebP, lossy": ("WEBP", {}),
    "WebP, lossless": ("WEBP", {"lossless": True}),
    "GIF": ("GIF", {}),
    "animated GIF": ("GIF", {"save_all": True}),
}
# So many bytes at the end hold no pixel. PNG: the end of the deflate stream, its checksum, the CRC of the chunk, IEND.
# GIF: the end code, the terminator of the blocks, and the trailer. JPEG: the end marker.
TAIL_BYTES = {"PNG": 22, "animated PNG": 22, "GIF": 6, "animated GIF": 6, "JPEG, baseline": 2, "JPEG, progressive": 2}


def random_picture(dice: random.Random, form: str) -> bytes:
    kind, options = FORMS[form]
    size = dice.randint(1, 60), dice.randint(1, 60)
    pictures = [Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1])) for _ in range(3)]
    if dice.random() < 0.5:  # smooth pictures compress otherwise than noise
        pictures = [picture.resize((7, 5)).resize(size) for picture in pictures]
    more = {"append_images": pictures[1:]} if "save_all" in options else {}
    stream = io.BytesIO()
    pictures[0].save(stream, kind, **options, **more)
    return stream.getvalue()


def passes_the_check(data: bytes) -> bool:
    try:
        check_image("photo", data)
    except MediaInvalid:
        return False
    return True


def decoded(data: bytes) -> list[bytes] | None:
    """The pixels of all pictures in the file; None where Pillow cannot decode one of them in full."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            return [frame.convert("RGBA").tobytes() for frame in ImageSequence.Iterator(image)]
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error):
        return None


@pytest.mark.parametrize("form", FORMS)
def test_the_check_agrees_with_a_full_decode(form: str) -> None:
    dice, counts = random.Random(f"{SEED} {form}"), Counter[str]()
    for number in range(CUTS):
        if number % CUTS_OF_A_PICTURE == 0:
            whole = random_picture(dice, form)
            pictures = decoded(whole)
            assert passes_the_check(whole)
        most = NEAR_THE_END if dice.random() < 0.5 else len(whole)
        lost = dice.randint(1, min(most, len(whole)))
        cut = whole[: len(whole) - lost]
        told = f"{lost} of {len(whole)} bytes cut, seed {SEED}"
        assert not passes_the_check(cut), told
        found = decoded(cut)
        if found is None:
            counts["both refuse"] += 1
            continue
        is_between_pictures = form == "animated GIF" and found == pictures[: len(found)] != pictures
        assert is_between_pictures or (found == pictures and lost <= TAIL_BYTES.get(form, 0)), told
        counts[f"a decode gives {len(found)} of {len(pictures)} pictures"] += 1
    print(f"\n{form}: {CUTS} cuts, seed {SEED}: {dict(counts)}", end="")
