"""Samples as one HTML page that needs nothing else: small pictures, captions, figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmfilter.core.files import atomic
from mmfilter.core.input.decode import picture
from mmfilter.core.run.previews import Look
from mmfilter.errors import SelectionError

SIDE = 224
"""Pixels of the longer side of a picture on the page"""
STYLE = """body{font:14px/1.4 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
h1{font-size:1.3rem;margin:0}p{margin:.3rem 0 1.5rem;color:#555}main{display:grid;grid-template-columns:repeat(auto-fill,minmax(240px,1fr));gap:1rem}
main.wide{grid-template-columns:repeat(auto-fill,minmax(500px,1fr))}section{border:1px solid #ddd;border-radius:6px;padding:.6rem}
h2{font-size:.95rem;margin:0 0 .4rem;font-variant-numeric:tabular-nums}.side{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:.6rem}
figure{margin:0;min-width:0}.frame{height:224px;display:flex;align-items:center;justify-content:center;background:#f4f4f4;border-radius:4px;color:#777}
img{max-width:100%;max-height:224px}figcaption{overflow-wrap:anywhere;margin-top:.3rem}small{display:block;color:#555;overflow-wrap:anywhere}"""


@dataclass(frozen=True)
class Shown:
    """One sample on the page."""

    look: Look
    about: tuple[str, ...]
    """Lines below the caption"""


@dataclass(frozen=True)
class Tile:
    """Samples side by side under one heading."""

    heading: str
    samples: tuple[Shown, ...]


def write_page(path: Path, title: str, about: str, tiles: Sequence[Tile]) -> None:
    """Write the page, in place of an earlier one."""
    kind = ' class="wide"' if any(len(tile.samples) > 1 for tile in tiles) else ""
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p><main{kind}>{''.join(map(_tile, tiles))}</main></html>\n"
    )
    try:
        with atomic(path) as temporary:
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise SelectionError(f"--page {str(path)!r} cannot be written: {error.strerror or error}") from error


def _tile(tile: Tile) -> str:
    return f'<section><h2>{html.escape(tile.heading)}</h2><div class="side">{"".join(map(_figure, tile.samples))}</div></section>'


def _figure(shown: Shown) -> str:
    small = None if shown.look.image is None else thumbnail(shown.look.image)
    if small is None:
        frame = html.escape("no picture" if shown.look.problem is None else "cannot be read")
    else:
        frame = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(small).decode()}">'
    lines = "".join(
        f"<small>{html.escape(line)}</small>"
        for line in (*shown.about, *([shown.look.problem] if shown.look.problem else []))
    )
    return f'<figure><div class="frame">{frame}</div><figcaption>{html.escape(shown.look.caption or "")}{lines}</figcaption></figure>'


def thumbnail(payload: bytes) -> bytes | None:
    """An image file as a small JPEG; None where it cannot be decoded."""
    image = picture(payload)
    if image is None:
        return None
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    image.save(small, "JPEG", quality=88)
    return small.getvalue()
