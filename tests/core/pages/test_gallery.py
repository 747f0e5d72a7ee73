"""Pages of pictures: what they hold is shown and escaped, what cannot be shown says so."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfilter.core.pages.gallery import Shown, Tile, thumbnail, write_page
from mmfilter.core.pages.place import check_page
from mmfilter.core.run.previews import Preview
from mmfilter.errors import SelectionError
from tests.conftest import picture


def test_a_thumbnail_is_the_picture_made_small():
    large = picture(3, size=(960, 480))
    small = Image.open(io.BytesIO(thumbnail(large)))
    wanted = Image.open(io.BytesIO(large)).resize((224, 112), Image.Resampling.LANCZOS)
    assert small.format == "JPEG" and small.size == (224, 112)
    assert np.abs(np.asarray(small, int) - np.asarray(wanted, int)).mean() < 8  # JPEG and blocks of colour
    assert thumbnail(b"no picture") is None


def test_the_page_holds_what_it_is_given_and_escapes_it(tmp_path):
    page = tmp_path / "page.html"
    image = picture(1, size=(64, 48), kind="PNG", mode="RGBA")
    shown = Shown(Preview("<script>alert(1)</script> & more", image), ("key 'a'",))
    write_page(page, "Title <b>", "about", [Tile("0.95", (shown, Shown(Preview(problem="shard <gone>"), ())))])
    text = page.read_text("utf-8")
    assert (
        "<script>" not in text
        and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
        and "Title &lt;b&gt;" in text
    )
    assert "shard &lt;gone&gt;" in text and "cannot be read" in text
    [encoded] = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert base64.b64decode(encoded) == thumbnail(image)
    write_page(page, "again", "", [])
    assert "again" in page.read_text("utf-8") and list(tmp_path.iterdir()) == [page]


def test_a_page_gets_no_name_of_another_kind(tmp_path):
    with pytest.raises(
        SelectionError, match=r"^--page 'data\.tar' is the page to write: give a name that ends in \.html$"
    ):
        check_page(Path("data.tar"))
    with pytest.raises(SelectionError, match=r"cannot be written: there is no folder"):
        check_page(tmp_path / "none" / "page.html")
