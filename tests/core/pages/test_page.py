"""The template of pages: whole, self-contained HTML in which every text is escaped."""

from __future__ import annotations

from html.parser import HTMLParser

from mmfilter.core.pages.page import Markup, element, page

HOSTILE = """</title><script>alert("1")</script> & 'more'"""
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Elements in their order, the texts in them, and whether each that opens also closes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1], data))


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_a_page_is_whole_and_needs_nothing_else():
    text = page("Title", "About", element("main", "Body"), style="p{color:red}")
    assert text.startswith("<!doctype html>\n") and "http" not in text
    reader = read(text)
    tags = dict(reader.tags)
    assert tags["html"] == {"lang": "en"} and {"head", "body", "style", "main"} <= tags.keys()
    assert [about for tag, about in reader.tags if tag == "meta"] == [
        {"charset": "utf-8"},
        {"name": "viewport", "content": "width=device-width, initial-scale=1"},
    ]
    assert [(tag, words) for tag, words in reader.texts if tag != "style"] == [
        ("title", "Title"),
        ("h1", "Title"),
        ("p", "About"),
        ("main", "Body"),
    ]
    assert "p{color:red}" in dict(reader.texts)["style"]


def test_every_text_is_escaped():
    reader = read(page(HOSTILE, HOSTILE, HOSTILE, element("p", HOSTILE, title=HOSTILE, class_="x", id=None), style=""))
    assert [words for tag, words in reader.texts if tag != "style"] == [HOSTILE] * 5
    assert ("p", {"title": HOSTILE, "class": "x"}) in reader.tags
    assert "script" not in dict(reader.tags)


def test_markup_stays_as_it_is():
    assert element("p", Markup("<b>1</b>"), " < 2").text == "<p><b>1</b> &lt; 2</p>"
    assert (Markup("<b>") + Markup("</b>")).text == "<b></b>"
    assert element("text", "a", text_anchor="end").text == '<text text-anchor="end">a</text>'
