"""Decoding of image files, and the refusal of bad ones."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision.image_files import MAXIMUM_PIXELS, ImageFileError, check_header, check_images, find_images, open_image

RED, HALF_RED = (200, 30, 10), (200, 30, 10, 128)


def picture(mode="RGB", colour=RED, size=(12, 8)):
    return Image.new(mode, size, colour)


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def huge_png(width, height):
    """A PNG of 100 bytes whose header promises width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
BAD = {
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "cut.jpg": encoded(NOISE, "JPEG")[:1500],
    "cut.png": encoded(NOISE, "PNG")[:6000],
    "broken_checksum.png": encoded(NOISE, "PNG").replace(b"IDAT", b"IDAT\x00", 1),
    "just_over_the_limit.png": huge_png(MAXIMUM_PIXELS // 1000 + 1, 1000),
    "bomb.png": huge_png(60_000, 60_000),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_its_path(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(ImageFileError, match=name):
        open_image(path)


@pytest.mark.parametrize("name", ["empty.png", "text.jpg", "just_over_the_limit.png", "bomb.png"])
def test_header_check_sees(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(ImageFileError, match=name):
        check_header(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ImageFileError, match=r"nothing\.png.*FileNotFoundError"):
        open_image(tmp_path / "nothing.png")


GREY_16 = Image.fromarray(np.full((8, 12), 25700, np.uint16))
CONVERSIONS = {
    "rgb.png": (picture(), "PNG", RED),
    "grey.png": (picture("L", 77), "PNG", (77, 77, 77)),
    "bilevel.png": (picture("1", 1), "PNG", (255, 255, 255)),
    "palette.gif": (picture().quantize(4), "GIF", RED),
    "grey_16_bit.png": (GREY_16, "PNG", (100, 100, 100)),
    "grey_16_bit.tif": (GREY_16, "TIFF", (100, 100, 100)),
    "half_transparent.png": (picture("RGBA", HALF_RED), "PNG", (227, 142, 132)),
    "grey_transparent.png": (picture("LA", (0, 0)), "PNG", (255, 255, 255)),
    "cmyk.tif": (picture("CMYK", (0, 255, 255, 0)), "TIFF", (255, 0, 0)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_colour_modes_become_8_bit_rgb(name, tmp_path):
    image, file_format, expected = CONVERSIONS[name]
    (tmp_path / name).write_bytes(encoded(image, file_format))
    decoded = open_image(tmp_path / name)
    assert decoded.mode == "RGB"
    assert decoded.size == (12, 8)
    assert decoded.getpixel((5, 5)) == pytest.approx(expected, abs=1)
    assert open_image(tmp_path / name, "L").mode == "L"


def test_floating_point_levels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ImageFileError, match=r"float\.tif.*no known range"):
        open_image(tmp_path / "float.tif")


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    image = picture()
    image.paste((0, 0, 0), (0, 0, 6, 8))  # left half black: the top half when shown
    image.save(tmp_path / "rotated.png", exif=exif)
    shown = open_image(tmp_path / "rotated.png")
    assert shown.size == (8, 12)
    assert shown.getpixel((4, 1)) == (0, 0, 0)
    assert shown.getpixel((4, 10)) == RED


def folder_of(tmp_path, good, bad):
    for number in range(good):
        picture().save(tmp_path / f"good{number:03}.png")
    for number in range(bad):
        (tmp_path / f"bad{number:03}.jpg").write_bytes(BAD["cut.jpg"])
    return find_images([tmp_path])


def test_one_bad_file_in_a_hundred_is_skipped_and_named(tmp_path):
    paths = folder_of(tmp_path, good=99, bad=1)
    with pytest.warns(UserWarning, match=r"1 of 100 image files(?s:.*)bad000\.jpg"):
        usable = check_images(paths, progress=False)
    assert [path.name for path in usable] == [f"good{number:03}.png" for number in range(99)]


def test_more_than_one_in_a_hundred_refuses_the_run(tmp_path):
    paths = folder_of(tmp_path, good=100, bad=12)
    with pytest.raises(ValueError, match=r"12 of 112(?s:.*)bad000\.jpg(?s:.*)and 2 more(?s:.*)More than 1%"):
        check_images(paths, progress=False)


def test_header_check_leaves_a_cut_photo_in(tmp_path):
    paths = folder_of(tmp_path, good=1, bad=1)
    assert check_images(paths, "header", progress=False) == paths


def test_find_images_searches_folders_and_keeps_named_files(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("inner/b.PNG", "a.jpeg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_images([tmp_path, tmp_path / "notes.txt"]) == [
        tmp_path / "a.jpeg",
        tmp_path / "inner/b.PNG",
        tmp_path / "notes.txt",
    ]


@pytest.mark.parametrize(("path", "message"), [("nowhere", "does not exist"), (".", "holds no image")])
def test_find_images_refuses(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        find_images([Path(path)])
