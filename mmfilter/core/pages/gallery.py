"""Samples as one HTML page that needs nothing else: small pictures, captions, figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmfilter.core.files import atomic
from mmfilter.core.input.decode import picture
from mmfilter.core.pages.page import Content, Markup, element, page
from mmfilter.core.run.previews import Preview
from mmfilter.errors import SelectionError

SIDE = 224
"""Pixels of the longer side of a picture on the page"""
STYLE = """main{grid-template-columns:repeat(auto-fill,minmax(240px,1fr))}
main.wide{grid-template-columns:repeat(auto-fill,minmax(500px,1fr))}
section{border:1px solid #ddd;border-radius:6px;padding:.6rem}
.side{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:.6rem}figure{margin:0;min-width:0}
.frame{height:224px;display:flex;align-items:center;justify-content:center;background:#f4f4f4;border-radius:4px;color:#777}
img{max-width:100%;max-height:224px}figcaption{overflow-wrap:anywhere;margin-top:.3rem}"""


@dataclass(frozen=True)
class Shown:
    """One sample on the page."""

    preview: Preview
    about: tuple[str, ...]
    """Lines below the caption"""


@dataclass(frozen=True)
class Tile:
    """Samples side by side under one heading."""

    heading: str
    samples: tuple[Shown, ...]


def write_page(path: Path, title: str, about: str, tiles: Sequence[Tile]) -> None:
    """Write the page, in place of an earlier one; raises `SelectionError` where it cannot be written."""
    wide = "wide" if any(len(tile.samples) > 1 for tile in tiles) else None
    text = page(title, about, element("main", *map(_tile, tiles), class_=wide), style=STYLE)
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise SelectionError(f"--page {str(path)!r} cannot be written: {error.strerror or error}") from error


def _tile(tile: Tile) -> Markup:
    return element("section", element("h2", tile.heading), element("div", *map(_figure, tile.samples), class_="side"))


def _figure(shown: Shown) -> Markup:
    preview = shown.preview
    small = None if preview.image is None else thumbnail(preview.image)
    if small is None:
        frame: Content = "no picture" if preview.problem is None else "cannot be read"
    else:
        frame = Markup(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">')
    lines = (*shown.about, *([preview.problem] if preview.problem else []))
    caption = element("figcaption", preview.caption or "", *(element("small", line) for line in lines))
    return element("figure", element("div", frame, class_="frame"), caption)


def thumbnail(payload: bytes) -> bytes | None:
    """An image file as a small JPEG; None where it cannot be decoded."""
    image = picture(payload)
    if image is None:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=88)
    return small.getvalue()
