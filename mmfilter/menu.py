"""The commands as functions: `mmfilter.score(shards, run=…)` and its kin.

A function's keywords are the fields of its settings class, which declares them once: type checkers see them through the
class's constructor, `help` and `inspect.signature` through the class.
"""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from mmfilter.core.progress import Silence
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.ops.check_settings import CheckSettings
from mmfilter.ops.dedup_settings import DedupSettings
from mmfilter.ops.score_settings import ScoreSettings
from mmfilter.ops.search_settings import FindSettings

if TYPE_CHECKING:
    from mmfilter.core.selection.funnel import Selection
    from mmfilter.ops.check import CheckReport
    from mmfilter.ops.dedup import DedupSummary
    from mmfilter.ops.score import ScoreSummary
    from mmfilter.ops.search import Hit

Text = str | os.PathLike[str]
Shards = Text | Sequence[Text]
"""Paths, globs, brace patterns or URLs of shards: one or several"""

P = ParamSpec("P")
F = TypeVar("F")
S = TypeVar("S")
R = TypeVar("R")


class Warned(Silence):
    """A progress that shows nothing, and warns of what a user should know."""

    def note(self, text: str) -> None:
        """Warn."""
        warnings.warn(text, stacklevel=3)


def keywords(settings: Callable[P, S]) -> Callable[[Callable[[F, S], R]], Callable[Concatenate[F, P], R]]:
    """Give a function of one argument and settings the fields of the settings as keywords."""

    def decorate(function: Callable[[F, S], R]) -> Callable[Concatenate[F, P], R]:
        first = next(iter(inspect.signature(function).parameters.values()))

        @functools.wraps(function)
        def call(argument: F, *args: P.args, **kwargs: P.kwargs) -> R:
            return function(argument, settings(*args, **kwargs))

        options = [
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=item.default_factory() if item.default_factory is not MISSING else item.default,
                annotation=item.type,
            )
            for item in fields(settings)  # type: ignore[arg-type]
        ]
        call.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
        return call

    return decorate


def listed(shards: Shards) -> list[str]:
    """One or several shards as patterns."""
    if isinstance(shards, (str, os.PathLike)):
        return [os.fspath(shards)]
    return [os.fspath(shard) for shard in shards]


@keywords(ScoreSettings)
def score(shards: Shards, settings: ScoreSettings) -> ScoreSummary:
    """Score image-text pairs inside a multimodal model into a run directory; finished shards are skipped.

    >>> import mmfilter
    >>> summary = mmfilter.score("pairs.tar", run="runs/pairs", batch_size=16)
    >>> summary.n_samples, summary.n_scored
    (40, 40)
    """
    from mmfilter.ops import score as operation

    return operation.score(listed(shards), settings, Warned())


@keywords(SelectSettings)
def select(run: Text, settings: SelectSettings) -> Selection:
    """Copy the best pairs of a run, byte for byte, into `output`; `dry_run=True` only counts.

    >>> import mmfilter
    >>> selection = mmfilter.select("runs/icons", top="20%", output="best")
    >>> selection.kept, selection.written
    (8, 8)
    >>> selection.funnel[-1]
    ('kept by --top 20%', 8)
    """
    from mmfilter.errors import SelectionError
    from mmfilter.ops import select as operation

    if settings.output is None and not settings.dry_run:
        raise SelectionError(
            "say where to: output='best', or dry_run=True to only count; mmfilter.stream gives samples"
        )
    selection = operation.select(Path(run), settings, progress=Warned())
    for warning in selection.warnings:
        warnings.warn(warning, stacklevel=2)
    return selection


@keywords(CheckSettings)
def check(shards: Shards, settings: CheckSettings) -> CheckReport:
    """Compare the scores of true pairs with those of shuffled ones.

    >>> import mmfilter
    >>> report = mmfilter.check("pairs.tar", sample=20)
    >>> sorted(report.scores)[:3]
    ['caption_chars', 'caption_tokens', 'cooccurrence']
    >>> 0 <= report.scores["similarity"].auc <= 1
    True
    """
    from mmfilter.ops import check as operation

    return operation.check(listed(shards), settings, Warned())


@keywords(DedupSettings)
def dedup(run: Text, settings: DedupSettings) -> DedupSummary:
    """Find exact and near duplicates in a run; which of each is kept stands in `dedup.parquet` there.

    >>> import mmfilter
    >>> summary = mmfilter.dedup("runs/icons", threshold=0.95)
    >>> summary.rows, summary.kept + summary.exact + summary.near
    (40, 40)
    """
    from mmfilter.ops import dedup as operation

    return operation.dedup(Path(run), settings, Warned())


@keywords(FindSettings)
def search(run: Text, settings: FindSettings) -> list[Hit]:
    """Find the samples of a run like a key, an image or words, or with a feature; the best first.

    >>> import mmfilter
    >>> hits = mmfilter.search("runs/icons", key="0003", n=2)
    >>> [hit.key != "0003" for hit in hits]
    [True, True]
    """
    return search_with(run, settings)


def search_with(run: Text, settings: FindSettings) -> list[Hit]:
    """`search` with its settings as one object."""
    from mmfilter.ops import search as operation

    encode = None
    if settings.by_query:
        from mmfilter.core.pipeline.query import encoder

        encode = encoder(settings)
    return operation.search(Path(run), settings, Warned(), encode)
