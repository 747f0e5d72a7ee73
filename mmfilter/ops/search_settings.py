"""What a search looks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mmfilter.core.codes.duplicate_settings import On, sides_of
from mmfilter.core.pages.place import check_page
from mmfilter.core.pipeline.pass_settings import EncodeSettings
from mmfilter.core.typed import check_fields, setting
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class SearchSettings:
    """What to look for: a key, an image, words, both of these as a pair, or a feature."""

    GROUP: ClassVar[str] = "Query"

    key: str | None = None
    """Find the samples most like the one with this key"""
    shard: str | None = None
    """End of the path of the shard that the key is in, where keys repeat"""
    image: Path | None = setting(None, metavar="FILE")
    """Find the samples most like this image (JPEG, PNG or WebP)"""
    text: str | None = setting(None, metavar="WORDS")
    """Find the samples most like these words; with --image, most like the pair"""
    feature: int | None = None
    """Find the samples in which this SAE feature is strongest"""
    on: On = "both"
    """Sides to compare, or to look for the feature on"""
    n: int = setting(20, flag="-n,--number", least=1)
    """Samples to list"""
    page: Path | None = setting(None, metavar="FILE")
    """Also write an HTML page with pictures and captions"""

    def __post_init__(self) -> None:
        check_fields(self, SelectionError)
        if [self.key is not None, self.by_query, self.feature is not None].count(True) != 1:
            raise SelectionError(
                "say what to look for, one of: --key KEY, --image FILE and/or --text WORDS, --feature NUMBER"
            )
        if self.shard is not None and self.key is None:
            raise SelectionError("--shard says which sample a --key means; give both")
        if self.page is not None:
            check_page(self.page)
        if self.by_query and not self.sides:
            given = "--image FILE" if self.text is None else "--text WORDS"
            raise SelectionError(f"--on {self.on} has nothing to compare with: the query is {given} alone")

    @property
    def by_query(self) -> bool:
        """Whether an image or words are looked for."""
        return self.image is not None or self.text is not None

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that count: those of `on`, and of these what the query has."""
        given = {"image": self.image, "text": self.text}
        return tuple(side for side in sides_of(self.on) if not self.by_query or given[side] is not None)


@dataclass(frozen=True)
class FindSettings(EncodeSettings, SearchSettings):
    """What to look for, and where the model is that turns images and words into codes."""
