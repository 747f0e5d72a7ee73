"""The one template of HTML pages: self-contained, escaped by default."""

from __future__ import annotations

import html
from dataclasses import dataclass

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:2rem auto;padding:0 1rem}
body{color:#1a1a1a;background:#fff}
h1{font-size:1.3rem;margin:0}h2{font-size:1rem;margin:0 0 .4rem;font-variant-numeric:tabular-nums}
header p{margin:.3rem 0 1.5rem;color:#555}main{display:grid;gap:1rem}
small{display:block;color:#555;overflow-wrap:anywhere}"""
"""What all pages share"""


@dataclass(frozen=True)
class Markup:
    """Text that is HTML already."""

    text: str

    def __add__(self, other: Markup) -> Markup:
        return Markup(self.text + other.text)


Content = Markup | str
"""HTML, or text that is escaped when it is put into HTML"""


def escaped(content: Content) -> str:
    """As HTML."""
    return content.text if isinstance(content, Markup) else html.escape(content)


def element(tag: str, *content: Content, **attributes: str | None) -> Markup:
    """`<tag …>content</tag>`; attributes that are None are left out, `class_` is `class`."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>{''.join(map(escaped, content))}</{tag}>")


def page(title: str, about: str, *content: Content, style: str) -> str:
    """A whole page: title, a line about it, and the content; `style` is added to what all pages share."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}\n{style}</style>"
    )
    header = element("header", element("h1", title), element("p", about))
    body = header.text + "".join(map(escaped, content))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
