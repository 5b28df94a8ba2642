"""sampler.read_image: pictures as people have them, of 16 bits, with broken EXIF data, damaged."""

import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import sampler


def test_sixteen_bits_equal_their_upper_eight(tmp_path):
    grey = np.random.default_rng(0).integers(2**16, size=(31, 17), dtype=np.uint16)
    grey[0, :6] = [0, 1, 255, 256, 65279, 65535]
    upper = torch.from_numpy((grey >> 8).astype(np.uint8)).expand(3, -1, -1)
    swapped = Image.frombytes("I;16B", (17, 31), grey.astype(">u2").tobytes())
    for image, name in (
        (Image.fromarray(grey), "a.png"),
        (Image.fromarray(grey), "a.tif"),
        (swapped, "b.tif"),
    ):
        image.save(tmp_path / name)
        found = sampler.read_image(tmp_path / name)
        assert found.dtype == torch.uint8 and torch.equal(found, upper), name


@pytest.mark.parametrize("mode, kind", [("I", np.int32), ("F", np.float32)])
def test_pictures_without_a_white_are_refused(mode, kind, tmp_path):
    Image.fromarray(np.ones((24, 20), dtype=kind)).save(tmp_path / "0.tif")
    said = f"0.tif: unreadable image .*mode {mode} has no white: .*replace it$"
    with pytest.raises(sampler.Unreadable, match=said):
        sampler.read_image(tmp_path / "0.tif")


@pytest.mark.parametrize("chunk", [b"zTXt", b"iCCP"])
def test_a_png_with_a_long_text_or_profile_is_read(chunk, tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    raw = file.getvalue()
    body = b"name\0\0" + zlib.compress(b"x" * 3_000_000)
    body = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    (tmp_path / "0.png").write_bytes(raw[:33] + body + raw[33:])
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1).expand(3, 40, 40)
    assert torch.equal(sampler.read_image(tmp_path / "0.png"), red)


def entry(tag, kind, count, value):
    """Of an EXIF directory; value: the four bytes, or an offset."""
    value = value if isinstance(value, bytes) else struct.pack("<I", value)
    return struct.pack("<HHI", tag, kind, count) + value


def exif_segment(*entries, rest=b""):
    """A JPEG's segment of EXIF."""
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    block = b"Exif\0\0II*\0" + struct.pack("<I", 8) + directory + rest
    return b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block


MAKER, ORIENTATION, RESOLUTION = 0x010F, 0x0112, 0x011A
ASCII, SHORT, RATIONAL = 2, 3, 5
TURNED = entry(ORIENTATION, SHORT, 1, 6)
BEHIND = entry(MAKER, ASCII, 900, 60_000)  # its text would be behind the end of the file
TWO = entry(RESOLUTION, RATIONAL, 2, 38)
BROKEN_EXIF = {  # the segment, and whether the picture is to be turned
    "whole": (exif_segment(TURNED), True),
    "offset behind the end": (exif_segment(TURNED, BEHIND), True),
    "two rationals": (exif_segment(TURNED, TWO, rest=struct.pack("<4I", 7, 1, 7, 0)), True),
    "a text": (exif_segment(entry(ORIENTATION, ASCII, 2, b"6\0\0\0")), False),
    "no such turn": (exif_segment(entry(ORIENTATION, SHORT, 1, 77)), False),
    "no such type": (exif_segment(entry(ORIENTATION, 99, 1, 6)), False),
    "empty": (b"\xff\xe1\0\x08Exif\0\0", False),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_pictures_with_broken_exif_are_read(name, tmp_path):
    segment, turned = BROKEN_EXIF[name]
    pixels = np.random.default_rng(0).integers(256, size=(6, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((36, 24)).save(file, "JPEG")
    plain = file.getvalue()
    (tmp_path / "plain.jpg").write_bytes(plain)
    (tmp_path / "broken.jpg").write_bytes(plain[:2] + segment + plain[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of the tags
        upright = sampler.read_image(tmp_path / "plain.jpg")
        found = sampler.read_image(tmp_path / "broken.jpg")
    assert torch.equal(found, upright.rot90(-1, dims=(1, 2)) if turned else upright)


def damage(content, rng):
    """Some bytes changed, most often in the head; some files cut short."""
    broken = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        within = min(len(broken), 400) if rng.random() < 0.8 else len(broken)
        broken[rng.randrange(within)] = rng.randrange(256)
    return broken[: rng.randrange(1, len(broken))] if rng.random() < 0.15 else broken


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF"])
def test_damaged_pictures_are_read_or_refused(kind, tmp_path):
    """50 of each format: nothing but Unreadable leaves read_image, and no other picture than uint8
    (3, H, W) is returned."""
    pixels = np.random.default_rng(0).integers(256, size=(24, 28, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[RESOLUTION] = 72.0
    file = io.BytesIO()
    options = dict(exif=exif) if kind in ("JPEG", "PNG", "WEBP") else {}
    Image.fromarray(pixels).save(file, kind, **options)
    rng = random.Random(kind)
    path = tmp_path / "damaged"
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(50):
            path.write_bytes(damage(file.getvalue(), rng))
            try:
                image = sampler.read_image(path)
                assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
            except sampler.Unreadable as error:
                refused += 1
                assert str(error).startswith(f"{path}: unreadable image (")
                assert str(error).endswith("): replace it")
    assert 0 < refused <= (50 if kind == "PNG" else 49)  # a PNG has check sums
