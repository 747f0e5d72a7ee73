"""Images of odd modes come out as the colours that a viewer shows; hostile records are only bad samples."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mmfilter.core.input.decode import DecodeSettings, decode
from mmfilter.core.input.sample import RawSample
from tests.conftest import picture


def pair(members: dict[str, bytes], **settings):
    return decode(RawSample("k", 0, 0, 512, members, None), "s.tar", DecodeSettings(**settings))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0
    return image


MODES = {
    "grey": (Image.new("L", (4, 4), 77), (77, 77, 77)),
    "16-bit grey": (Image.fromarray(np.full((4, 4), 200 * 256 + 9, np.uint16)), (200, 200, 200)),
    "one bit": (Image.new("1", (4, 4), 1), (255, 255, 255)),
    "opaque": (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), (10, 20, 30)),
    "transparent shows white": (Image.new("RGBA", (4, 4), (10, 20, 30, 0)), (255, 255, 255)),
    "half transparent": (Image.new("RGBA", (4, 4), (0, 0, 0, 128)), (127, 127, 127)),
    "grey with alpha": (Image.new("LA", (4, 4), (0, 0)), (255, 255, 255)),
    "palette": (palette_with_transparency(), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    image, colour = MODES[mode]
    options = {"transparency": 0} if mode == "palette" else {}
    got = pair({"png": encoded(image, **options), "txt": b"x"})
    assert got.reason is None and got.image.mode == "RGB"
    assert got.image.getpixel((2, 2)) == colour


def test_cmyk_jpeg():
    got = pair({"jpg": encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "txt": b"x"})
    red, green, blue = got.image.getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_a_mislabelled_image_is_read_as_what_it_is():
    assert pair({"jpg": picture(1, kind="PNG"), "txt": b"x"}).reason is None


def test_other_formats_are_refused():
    assert (
        pair({"jpg": encoded(Image.new("RGB", (4, 4)), "GIF"), "txt": b"x"}).reason
        == "image cannot be decoded: it is no JPEG, PNG or WebP"
    )


def test_a_byte_order_mark_is_no_part_of_the_caption():
    assert pair({"jpg": picture(1), "txt": b"\xef\xbb\xbf dog \n"}).caption == "dog"


REASONS = {
    "list": ({"json": b"[1]"}, {}, "no caption: json holds a list, not an object"),
    "deep": ({"json": b"[" * 100_000}, {}, "no caption: unreadable json"),
    "number": ({"json": b'{"caption": 7}'}, {}, "no caption: no txt, no caption in the json (members: jpg, json)"),
    "surrogate": ({"json": b'{"caption": "\\ud800"}'}, {}, "caption is not UTF-8: it holds a lone surrogate"),
    "turns": ({"json": b'{"conversations": [1]}'}, {}, "conversations has a turn without a 'value' text"),
    "txt only": ({"json": b'{"caption": "x"}'}, {"caption": "txt"}, "no caption: no txt among the members (jpg, json)"),
    "field": (
        {"txt": b"x", "json": b"{}"},
        {"caption": "alt"},
        "no caption: no 'alt' in the json (members: jpg, json, txt)",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case):
    members, settings, words = REASONS[case]
    assert pair({"jpg": picture(1), **members}, **settings).reason.startswith(words)


def test_a_conversation_is_its_turns():
    record = (
        b'{"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A dog."}]}'
    )
    assert pair({"jpg": picture(1), "json": record}).caption == "What is it?\nA dog."


def test_what_the_reader_found_is_the_reason():
    raw = RawSample("k", 3, 0, 512, {}, "duplicate key: first at row 1")
    assert decode(raw, "s.tar", DecodeSettings()).reason == "duplicate key: first at row 1"
