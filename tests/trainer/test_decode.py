"""Odd image files: the right pixels, or one line that names the file and what is wrong with it."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config import UserError
from trainer.data import decode

SIZE = 16


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def halves(mode: str, first, second) -> Image.Image:
    """16 x 16, upper half ``first``, lower half ``second``."""
    image = Image.new(mode, (SIZE, SIZE), first)
    image.paste(second, (0, SIZE // 2, SIZE, SIZE))
    return image


def corners(content: bytes) -> tuple[list[int], list[int]]:
    """RGB well inside the upper and the lower half."""
    pixels = decode.decode(content, SIZE)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    return pixels[3, 8].tolist(), pixels[12, 8].tolist()


def test_sixteen_bits_become_the_upper_eight():
    values = np.full((SIZE, SIZE), 0x4012, np.uint16)
    values[8:] = 0xC0FF
    content = encoded(Image.fromarray(values))
    assert corners(content) == ([0x40] * 3, [0xC0] * 3)
    assert corners(encoded(Image.fromarray(values), "tiff")) == ([0x40] * 3, [0xC0] * 3)


def test_palettes_grey_bits_and_cmyk_are_the_colours_they_mean():
    two = halves("RGB", (200, 10, 30), (5, 90, 250))
    assert corners(encoded(two.quantize(4))) == ([200, 10, 30], [5, 90, 250])
    assert corners(encoded(two.quantize(4), "gif")) == ([200, 10, 30], [5, 90, 250])
    assert corners(encoded(halves("L", 7, 90))) == ([7] * 3, [90] * 3)
    assert corners(encoded(halves("1", 0, 1))) == ([0] * 3, [255] * 3)
    # Without ink the paper is white; full black ink is black.
    upper, lower = corners(encoded(halves("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), "jpeg", quality=95))
    assert min(upper) > 245 and max(lower) < 10


def test_what_is_transparent_is_mid_grey():
    assert corners(encoded(halves("RGBA", (255, 0, 0, 0), (255, 0, 0, 255)))) == ([128] * 3, [255, 0, 0])
    assert corners(encoded(halves("LA", (255, 0), (255, 255)))) == ([128] * 3, [255] * 3)
    half = corners(encoded(halves("RGBA", (255, 255, 255, 128), (0, 0, 0, 128))))
    assert half == ([192] * 3, [64] * 3)
    indexed = halves("P", 1, 2)
    indexed.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    assert corners(encoded(indexed, transparency=1)) == ([128] * 3, [40, 50, 60])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_stands_upright(orientation):
    """The corner of the upright image that is white, found by undoing what each orientation says was done."""
    upright = np.zeros((SIZE, SIZE), np.uint8)
    upright[:6, :4] = 255  # upper left, higher than wide
    stored = {  # EXIF: where the stored row 0 and column 0 are in the upright image
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.T,  # left, top
        6: upright.T[::-1],  # right, top
        7: upright.T[::-1, ::-1],  # right, bottom
        8: upright.T[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "png", exif=exif)
    assert (decode.decode(content, SIZE)[:, :, 0] == upright).all()


def test_an_animation_is_its_first_picture():
    first, second = (Image.new("RGB", (20, 20), colour) for colour in ((9, 8, 7), (200, 0, 0)))
    content = encoded(first, "gif", save_all=True, append_images=[second])
    assert corners(content) == ([9, 8, 7], [9, 8, 7])


BAD = {
    "empty.png": (b"", "empty"),
    "text.jpg": (b"not an image", "no image"),
    "pixel.png": (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
    "strip.png": (encoded(Image.new("RGB", (3000, 9))), "3000 x 9 pixels"),
    "cut.jpg": (encoded(Image.effect_noise((64, 64), 50), "jpeg")[:600], "truncated"),
    "cut.png": (encoded(Image.effect_noise((64, 64), 50))[:600], ""),
    "float.tif": (encoded(Image.new("F", (20, 20), 0.5), "tiff"), "floating-point pixels"),
    "deep.tif": (encoded(Image.new("I", (20, 20), 70000), "tiff"), "32 bits"),
}


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (40000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


def test_bad_files_are_all_named_with_their_reasons(tmp_path):
    for name, (content, _) in {**BAD, "bomb.png": (bomb(), "")}.items():
        (tmp_path / name).write_bytes(content)
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        decode.read(tmp_path, "a", files, torch.zeros(len(files)), SIZE)
    lines = str(error.value).splitlines()
    assert lines[0] == f"data: got {len(BAD) + 1} files that can't be read as images:"
    for name, (_, reason) in {**BAD, "bomb.png": (b"", "1600000000 pixels|40000 x 40000")}.items():
        (line,) = [line for line in lines if f"{name}: " in line]
        assert any(part in line for part in reason.split("|")), line
    assert "good.png" not in str(error.value)


def test_of_many_bad_files_twenty_are_named_and_the_rest_counted(tmp_path):
    for i in range(23):
        (tmp_path / f"{i:02d}.png").write_bytes(b"")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        decode.read(tmp_path, "a", files, torch.zeros(23), SIZE)
    text = str(error.value)
    assert "got 23 files" in text and text.count(".png: ") == 20 and "and 3 more" in text


def test_images_are_found_by_suffix_or_content_and_system_files_passed_over(tmp_path):
    face = encoded(Image.new("RGB", (20, 20)), "jpeg")
    images = ["a.JPG", "b.jfif", "c.jpe", "deep/er/d.jpeg", "e", "f.dat", "g.png"]
    for name in (*images, ".DS_Store", "Thumbs.db", "._x.jpg", "@eaDir/a.jpg", "__MACOSX/a.jpg", ".hidden/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(face)
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "loop").symlink_to(tmp_path)
    found, others = decode.image_files(tmp_path)
    assert [f.relative_to(tmp_path).as_posix() for f in found] == sorted(images, key=str.lower)
    assert [f.name for f in others] == ["notes.txt"]
