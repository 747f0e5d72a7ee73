"""`Run`: a run directory as an object that answers what people ask in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfilter.core.files import read_json
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.tables import read_table_metadata, taken, whole
from mmfilter.core.selection.select_settings import ChoiceSettings, SelectSettings
from mmfilter.core.typed import combined
from mmfilter.menu import Text, Warned, keywords, search_with
from mmfilter.ops.search_settings import FindSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from mmfilter.ops.search import Hit


@dataclass(frozen=True)
class SideCode:
    """The strongest features of one side of a sample, strongest first."""

    ids: np.ndarray
    """(features,) uint32"""
    maximum: np.ndarray
    """(features,) float16, over the side's tokens"""
    mean: np.ndarray
    """(features,) float16, over the side's tokens, silent ones count 0"""


@dataclass(frozen=True)
class SampleCodes:
    """The stored codes of a sample."""

    image: SideCode
    text: SideCode


class Run:
    """A run directory that `score` wrote.

    >>> import mmfilter
    >>> run = mmfilter.Run("runs/icons")
    >>> run
    Run('runs/icons'): 40 of 40 samples scored, 1 shard
    >>> run.scores.num_rows
    40
    """

    def __init__(self, path: Text) -> None:
        """Open a run; raises `RunError` for a folder that is not one, or has nothing finished in it."""
        self.path = Path(path)
        self._directory = RunDirectory(self.path)
        self._tables = self._directory.score_tables()
        about = [read_table_metadata(table) for table in self._tables]
        self.shards: list[str] = [item["shard"] for item in about]
        """Paths of the finished shards, in the order of the rows"""
        self.n_samples: int = sum(item["rows"] for item in about)
        self.n_scored: int = sum(item["ok"] for item in about)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions, settings, model and SAE with hashes, inputs."""
        manifest: dict[str, Any] = read_json(self._directory.manifest)
        return manifest

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores were made with."""
        settings: dict[str, Any] = self.manifest["settings"]
        return settings

    @cached_property
    def scores(self) -> pa.Table:
        """The score table of all finished shards, as an Arrow table: a row for every sample, bad ones too."""
        return whole(self._tables)

    def codes(self, key: str, *, shard: str | None = None) -> SampleCodes:
        """The sparse codes of the sample with a key; `shard` is the end of its shard's path where keys repeat.

        >>> import mmfilter
        >>> codes = mmfilter.Run("runs/icons").codes("0003")
        >>> len(codes.image.ids) == len(codes.image.maximum) > 0
        True
        """
        from mmfilter.core.codes.code_tables import sample_codes
        from mmfilter.core.run.score_tables import ScoreTables
        from mmfilter.ops.search import sample_at

        tables = ScoreTables(self._directory)
        image, text = sample_codes(tables, sample_at(tables, key, shard))
        return SampleCodes(SideCode(*image), SideCode(*text))

    @keywords(ChoiceSettings)
    def top(self, choice: ChoiceSettings) -> pa.Table:
        """The rows that `select` keeps, the best first; the first argument is `top`, the others are `by`, `where`, ….

        >>> import mmfilter
        >>> best = mmfilter.Run("runs/icons").top("5", by="raw")
        >>> scores = best["raw"].to_pylist()
        >>> len(scores), scores == sorted(scores, reverse=True)
        (5, True)
        """
        from mmfilter.ops.select import chosen

        decided = chosen(self.path, combined(SelectSettings, choice, dry_run=True, format="keys"), Warned())
        kept = decided.positions
        best_first = kept[np.argsort(-decided.column.values[kept].astype(np.float64), kind="stable")]
        return taken(self.scores, best_first)

    @keywords(FindSettings)
    def find(self, query: FindSettings) -> list[Hit]:
        """The samples like a `key`, an `image` or a `text`, or with a `feature`, as `mmfilter.search` finds them.

        >>> import mmfilter
        >>> len(mmfilter.Run("runs/icons").find(key="0003", n=2))
        2
        """
        return search_with(self.path, query)

    def __len__(self) -> int:
        return self.n_samples

    def __repr__(self) -> str:
        shards = f"{len(self.shards):,} {'shard' if len(self.shards) == 1 else 'shards'}"
        return f"Run({str(self.path)!r}): {self.n_scored:,} of {self.n_samples:,} samples scored, {shards}"

    def _repr_html_(self) -> str:
        rows = {
            "run": self.path,
            "samples": f"{self.n_scored:,} of {self.n_samples:,} scored",
            "shards": f"{len(self.shards):,}",
            "model": f"{self.settings.get('model')}, layer {self.settings.get('layer')}",
            "SAE": self.settings.get("sae"),
        }
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
        return f"<table>{cells}</table>"
