"""What people bring as pictures, and what must come out: each table has a line for a thing that somebody brought."""
import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from model import Comparison, open_frames, open_image

# ----------------------------------------------------------------------------------------------- a clear ground

INK = (200, 30, 40)


def drawing(mode="RGBA"):
    """8 x 8 pixels: the left half is ink; the right half is clear, and black underneath, as editors save it."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((*INK, 255), (0, 0, 4, 8))
    return image.convert(mode)


def palette_with_alpha():
    image = drawing("RGB").quantize(2)
    image.putalpha(drawing().getchannel("A"))
    assert image.mode == "PA"
    return image


def one_colour_is_clear(mode, clear):
    """The same picture without an alpha channel: one of its colours is declared to be clear."""
    image = Image.new("RGB", (8, 8), "black")
    image.paste(INK, (0, 0, 4, 8))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    if mode == "P":
        clear = image.getpixel((7, 0))
    if mode == "I;16":
        image = Image.fromarray(np.array(drawing().convert("L")).astype(np.uint16) * 257)
    image.info["transparency"] = clear
    return image


def saved(image, file_format, **options):
    """The bytes of a file."""
    if "transparency" in image.info:
        options["transparency"] = image.info["transparency"]
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


ON_A_CLEAR_GROUND = {
    "PNG with an alpha channel": saved(drawing(), "PNG"),
    "grey PNG with an alpha channel": saved(drawing("LA"), "PNG"),
    "PNG with a palette, one colour clear": saved(one_colour_is_clear("P", 0), "PNG"),
    "PNG with a palette, an alpha for each colour": saved(drawing().quantize(4), "PNG"),
    "PNG in colour, one colour clear": saved(one_colour_is_clear("RGB", (0, 0, 0)), "PNG"),
    "grey PNG, one grey clear": saved(one_colour_is_clear("L", 0), "PNG"),
    "PNG of one bit, black is clear": saved(one_colour_is_clear("1", 0), "PNG"),
    "GIF, one colour clear": saved(one_colour_is_clear("P", 0), "GIF"),
    "WebP with an alpha channel": saved(drawing(), "WEBP", lossless=True, exact=True),
    "TIFF with an alpha channel": saved(drawing(), "TIFF"),
    "RGBA in memory": drawing(),
    "LA in memory": drawing("LA"),
    "PA in memory": palette_with_alpha(),
    "P in memory, one colour clear": one_colour_is_clear("P", 0),
    "RGB in memory, one colour clear": one_colour_is_clear("RGB", (0, 0, 0)),
    # what transformers 5.24 has wrong or refuses
    "P in memory, a palette with alpha": drawing().quantize(4),
    "RGBa in memory, premultiplied": drawing("RGBa"),
    "La in memory, premultiplied": drawing("LA").convert("La"),
    "PNG of 16 bits, one grey clear": saved(one_colour_is_clear("I;16", 0), "PNG"),
}
NOT_AS_IN_TRANSFORMERS = list(ON_A_CLEAR_GROUND)[-4:]


@pytest.mark.parametrize("name", ON_A_CLEAR_GROUND)
def test_what_is_clear_lies_on_white(name):
    """As in transformers to the last digit. Else the ground is as black as the ink, and all drawings are alike."""
    brought = ON_A_CLEAR_GROUND[name]
    seen = np.asarray(open_image(brought)).astype(int)
    gray = round(np.dot(INK, (0.299, 0.587, 0.114)))
    ink = seen[:, :4].reshape(-1, 3)
    assert (seen[:, 4:] == 255).all()
    if "one bit" not in name:  # there ink is white
        assert min(abs(ink - colour).max() for colour in (INK, gray)) <= 1
    if name not in NOT_AS_IN_TRANSFORMERS:
        image = Image.open(io.BytesIO(brought)) if isinstance(brought, bytes) else brought
        assert (seen == convert_to_rgb(image, return_numpy=True)).all()


def test_every_transparency_is_blended_as_in_transformers():
    """All 256 of them, over several colours."""
    levels = np.arange(256, dtype=np.uint8)
    pixels = np.stack([np.repeat(levels[None], 4, 0), np.full((4, 256), 7, np.uint8),
                       np.repeat(levels[None, ::-1], 4, 0), np.repeat(levels[None], 4, 0)], axis=-1)
    for mode in ("RGBA", "LA"):
        image = Image.fromarray(pixels).convert(mode)
        assert (np.asarray(open_image(image)) == convert_to_rgb(image, return_numpy=True)).all()


def test_two_drawings_on_a_clear_ground_are_two_pictures(tiny):
    """Black ink on a clear ground, which is how diagrams are published."""
    rewards = []
    for box in ((0, 0, 40, 112), (60, 60, 112, 112)):
        diagram = Image.new("RGBA", (112, 112), (0, 0, 0, 0))
        diagram.paste((0, 0, 0, 255), box)
        rewards.append(tiny.score("Where is it?", ["left", "right"], diagram))
    assert max(abs(a - b) for a, b in zip(*rewards)) > 1e-4


def test_a_frame_of_a_video_lies_on_white_too(tmp_path):
    drawing().save(tmp_path / "0.png")
    (frame,) = open_frames(tmp_path)
    assert frame.getpixel((7, 0)) == (255, 255, 255)


# ----------------------------------------------------------------------------------------------- 16 bits and more

GRAYS = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
IN_8_BITS = [0, 0, 1, 1, 128, 255]  # a 257th, rounded: 65,535 is white

OF_16_BITS = {
    "PNG": saved(Image.fromarray(GRAYS), "PNG"),
    "TIFF": saved(Image.fromarray(GRAYS), "TIFF"),
    "TIFF, big-endian": saved(Image.fromarray(GRAYS.astype(">u2")), "TIFF"),
    "in memory": Image.fromarray(GRAYS),
    "in memory, big-endian": Image.fromarray(GRAYS.astype(">u2")),
}


@pytest.mark.parametrize("name", OF_16_BITS)
def test_16_bits_are_scaled_and_not_clipped(name):
    """Pillow alone shows all that is above 255 as white: a set of depth maps or X-rays would be trained blind."""
    seen = np.asarray(open_image(OF_16_BITS[name]))
    assert seen.shape == (1, 6, 3) and seen[0, :, 0].tolist() == IN_8_BITS and (seen == seen[..., :1]).all()


def test_a_picture_of_16_bits_is_turned_upright():
    image = Image.fromarray(GRAYS)
    image.getexif()[274] = 6  # hold it a quarter to the right
    turned = saved(image, "PNG", exif=image.getexif())
    assert np.asarray(open_image(turned))[:, 0, 0].tolist() == IN_8_BITS


NUMBERS = np.array([[0, 1], [70_000, 2]])
OF_UNKNOWN_RANGE = {
    "32 bits, TIFF": (saved(Image.fromarray(NUMBERS.astype(np.int32)), "TIFF"), "32-bit integers"),
    "32 bits, in memory": (Image.fromarray(NUMBERS.astype(np.int32)), "32-bit integers"),
    "floats, TIFF": (saved(Image.fromarray(NUMBERS.astype(np.float32)), "TIFF"), "floats"),
    "floats, in memory": (Image.fromarray(NUMBERS.astype(np.float32)), "floats"),
    "a negative in 16 bits, TIFF": (saved(Image.fromarray(GRAYS), "TIFF", tiffinfo={262: 0}), "0 is white"),
}


@pytest.mark.parametrize("name", OF_UNKNOWN_RANGE)
def test_numbers_of_which_nobody_knows_what_is_white_are_refused(name):
    brought, words = OF_UNKNOWN_RANGE[name]
    refused(brought, words)


# ----------------------------------------------------------------------------------------------- not readable


def refused(source, words):
    with pytest.raises(ValueError, match=words) as error:
        open_image(source)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


READABLE = "JPEG, PNG, WEBP, GIF, BMP, TIFF"
FILES = {
    "holiday.avif": (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", f"an AVIF image .images may be {READABLE}"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
    "burst.heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC image"),
    "scan.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ", "a JPEG 2000 image"),
    "scan.j2k": (b"\xff\x4f\xff\x51\0\x2f", "a JPEG 2000 image"),
    "new.jxl": (b"\xff\x0a\xfa\x7f", "a JPEG XL image"),
    "logo.svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "paper.pdf": (b"%PDF-1.7\n", "a PDF document"),
    "chest.dcm": (b"\0" * 128 + b"DICM\x02\0", "a DICOM image"),
    "clip.mp4": (b"\0\0\0\x20ftypisom\0\0\x02\0", "a video; cut it into frames, .* in a folder, and give the folder"),
    "clip.mov": (b"\0\0\0\x14ftypqt  ", "a video; cut it"),
    "clip.webm": (b"\x1aE\xdf\xa3\x9fB\x86\x81", "a video; cut it"),
    "clip.avi": (b"RIFF\x24\0\0\0AVI LIST", "a video; cut it"),
    "blocked.jpg": (b"<!DOCTYPE html>\n<html><body>403 Forbidden", "a web page; fetch the image again"),
    "cloned.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256", "a git-lfs pointer; run `git lfs pull`"),
    "aborted.png": (b"", "an empty file; fetch it again"),
    "note.png": (b"not an image", f"cannot be used: it is no {READABLE}, or damaged"),
    "cut.png": (saved(Image.effect_noise((50, 50), 50), "PNG")[:120], "cannot be used"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_readable_picture_is_named_with_what_to_do(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert name in refused(tmp_path / name, words)
    refused(content, words)  # as bytes too


def bomb():
    """Its header claims 60,000 x 60,000 pixels."""
    content = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


SIZES = {
    "no pixels": (Image.new("RGB", (0, 5)), "0 x 5 pixels are none$"),
    "too many pixels": (Image.new("1", (10_000, 9_000)), "10000 x 9000 pixels are more than 89478485 .*; shrink it$"),
    "far too many pixels": (bomb(), "bomb"),
    "too narrow": (Image.new("RGB", (10, 4000)), "10 x 4000 pixels are narrower than 1:200; crop it$"),
}


@pytest.mark.parametrize("name", SIZES)
def test_each_reason_has_a_sentence_of_its_own(name):
    refused(*SIZES[name])


def test_what_is_no_regular_file_is_never_read(tmp_path):
    """Who opens a pipe waits for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate((1 << 29) + 1)  # takes no room on the disk
    for name in ("pipe.png", "endless.png", "folder.png"):
        assert name in refused(tmp_path / name, "it is no file, but a folder, a pipe or a device$")
    refused(tmp_path / "huge.png", "its file of 536870913 bytes is larger than 536870912$")


NO_PATHS = {
    "a data URI": ("data:image/png;base64,iVBORw0KGgo", "data: begins no path; .*its bytes .of a data URI: decoded"),
    "a long data URI": ("data:image/png;base64," + "A" * 9000, "data: begins no path"),
    "a data URI in a data folder": (Path("/data/mine/data:image/png;base64,iVBORw0KGgo"), "data: begins no path"),
    "a file URI": ("file:///data/7.png", "file:/ begins no path; want the path of a file"),
    "a file URI in a data folder": (Path("/data/mine") / "file:///7.png", "file:/ begins no path"),
    "a web address": ("https://example.org/7.png", "https:/ begins no path"),
    "a file that is gone": ("/data/mine/7.png", "/data/mine/7.png does not exist; fetch it or remove the row"),
    "an array": (np.zeros((8, 8, 3), np.uint8), "it is a ndarray, want a path, the bytes of a file or a PIL image"),
    "an Image of `datasets` that is not decoded": ({"bytes": b"", "path": None}, "it is a dict, want a path"),
    "nothing": (None, "it is a NoneType, want a path"),
    "a number": (10_000, "it is a int, want a path"),
}


@pytest.mark.parametrize("name", NO_PATHS)
def test_what_is_no_path_is_named_with_what_to_do(name):
    refused(*NO_PATHS[name])


# ----------------------------------------------------------------------------------------------- the calls


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (112, 112), "red").save(path)
    return path


IMAGES = {  # what is given as `images`, made of a file, and the list that it means
    "None": lambda file: (None, []),
    "no image": lambda file: ((), []),
    "one path": lambda file: (str(file), [file]),
    "one Path": lambda file: (file, [file]),
    "the bytes of one file": lambda file: (file.read_bytes(), [file]),
    "one PIL image": lambda file: (Image.open(file), [file]),
    "a tuple": lambda file: ((file, file), [file, file]),
    "the folder of a video": lambda file: (str(file.parent), [[file]]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_may_be_none_or_a_single_one(tiny, file, name):
    """TRL gives a reward function None for a row without pictures, and one picture of a column `image`."""
    images, meant = IMAGES[name](file)
    responses = ["red", "blue blue"]
    expected = tiny.score("What colour?", responses, meant)
    assert tiny.score("What colour?", responses, images) == expected
    assert tiny.score_many([Comparison("What colour?", responses, images=images)]) == [expected]


def test_comparisons_may_be_tuples_and_come_from_a_generator(tiny, file):
    rows = [Comparison("Name a colour.", ["red", "blue"]), Comparison("Which?", ["red", "blue"], images=[file])]
    tuples = [("Name a colour.", ["red", "blue"]), ("Which?", ("red", "blue"), file)]
    expected = tiny.score_many(rows)
    assert tiny.score_many(tuples) == expected and tiny.score_many(iter(rows)) == expected
    assert tiny.score_many([tuples[0], rows[1]]) == expected and tiny.score_many([]) == []


CALLS = {
    "a text as responses": (lambda model: model.score("Hi", "red"), "the responses are a str, want a list of texts"),
    "one response that is no text": (lambda model: model.score("Hi", ["red", None]), "a response is a NoneType, want"),
    "no responses": (lambda model: model.score("Hi", None), "the responses are a NoneType, want a list of texts"),
    "no prompt": (lambda model: model.score(None, ["red"]), "the prompt is a NoneType, want a text or a list"),
    "no picture among pictures": (lambda model: model.score("Hi", ["red"], [None]), "image None .* want a path"),
    "texts as comparisons": (lambda model: model.score_many(["Hi"]), "found a str, want a Comparison, or a tuple"),
    "rows as comparisons": (lambda model: model.score_many([{"prompt": "Hi"}]), "found a dict, want a Comparison"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_be_meant_is_refused_in_one_line(tiny, name):
    call, words = CALLS[name]
    with pytest.raises(ValueError, match=words) as error:
        call(tiny)
    assert "\n" not in str(error.value)
