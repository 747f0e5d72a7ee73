"""Samples whose codes are nearest to some codes: suggested by the index, ordered by the exact cosine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.index import CodeIndex, IndexSettings
from mmfilter.core.codes.vectors import Codes, SideCodes, cosines
from mmfilter.core.sides import SIDES

LEAST = 256
"""Suggestions of the index that are measured at least; ten times as many as are asked for if that is more"""


@dataclass(frozen=True)
class Nearest:
    """Samples near a query, the nearest first; ties by position."""

    position: np.ndarray
    cosine: np.ndarray
    """float32, mean over the sides that the query has"""
    image: np.ndarray
    """float32, 0 where the query has no image side"""
    text: np.ndarray


def only(codes: Codes, sides: Sequence[str]) -> Codes:
    """The same samples with only these sides."""
    none = SideCodes.empty(len(codes))
    image, text = (codes.sides[side] if side in sides else none for side in SIDES)
    return Codes(codes.position, image, text)


def nearest(query: Codes, n: int, index: CodeIndex, tables: CodeTables, groups: np.ndarray) -> Nearest:
    """The n samples nearest to one query, wherever its codes come from; a side without features plays no part.

    Samples with the hashes of one that is found come with it (`groups` as in `ScoreTables.groups`). The
    index suggests some hundred candidates, so what is far from everything may be missed.
    """
    settings = IndexSettings(**index.about["settings"])
    _, suggested = index.search(settings.sketch(tables.idf)(query), min(len(index), max(LEAST, 10 * n)))
    candidates = np.unique(suggested[suggested >= 0])
    codes = Codes.concatenate([tables.take(candidates), query]).by_feature()
    query_row, rows = np.full(len(candidates), len(candidates)), np.arange(len(candidates))
    image, text = (cosines(side, tables.idf, query_row, rows) for side in (codes.image, codes.text))
    compared = [cosine for cosine, side in ((image, query.image), (text, query.text)) if len(side.ids)]
    cosine = np.zeros(len(candidates), np.float32)
    if compared:
        cosine = np.asarray(np.mean(compared, axis=0, dtype=np.float32))
    position = np.flatnonzero(np.isin(groups, candidates))
    at = np.searchsorted(candidates, groups[position])
    order = np.lexsort((position, -cosine[at]))[:n]
    at = at[order]
    return Nearest(position[order], cosine[at], image[at], text[at])


def strongest(tables: CodeTables, feature: int, n: int, sides: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the n samples in which a feature's maximum is largest, and the maxima (samples, 2): image, text.

    Ranked by the larger of the `sides`; ties by position. Only features that the code table keeps count.
    """
    columns = [SIDES.index(side) for side in sides]
    position, maxima = np.zeros(0, np.int64), np.zeros((0, len(SIDES)), np.float32)
    for some, strengths in tables.strongest(feature):
        has = strengths[:, columns].max(1) > 0
        position, maxima = np.concatenate([position, some[has]]), np.concatenate([maxima, strengths[has]])
        order = np.lexsort((position, -maxima[:, columns].max(1)))[:n] if len(position) else np.zeros(0, np.int64)
        position, maxima = position[order], maxima[order]
    return position, maxima
