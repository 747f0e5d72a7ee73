"""Find samples of a run: those most like one of them, like an image or words, or those in which a feature is strongest.

It needs no model: whoever looks for an image or for words brings the `Encoder` that turns them into codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.duplicates import representatives
from mmfilter.core.codes.index import IndexSettings, open_index
from mmfilter.core.codes.nearest import nearest, only, strongest
from mmfilter.core.codes.vectors import Codes
from mmfilter.core.pages.gallery import Shown, Tile, write_page
from mmfilter.core.progress import Progress
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.previews import Preview, previews, problems
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.scores.registry import HEADLINES, SCORES, shown
from mmfilter.errors import RunError, SelectionError
from mmfilter.ops.search_settings import SearchSettings

Encoder = Callable[[Path, Path | None, str | None], Codes]
"""(run, image, words) to the codes of that one query, a side that is not asked for empty; see `core/pipeline/query`"""


@dataclass(frozen=True)
class Hit:
    """A sample that was found."""

    key: str
    shard: str
    row: int
    measures: dict[str, float]
    """Why it is a hit: `cosine`, and `image` and `text` as far as they are compared, for a key or a query; `image` and
    `text`, the feature's maxima, for a feature"""
    scores: dict[str, float | None]
    """Score name -> value"""
    caption: str | None = None
    """Read again from the shard; None where that cannot be read"""


def search(run: Path, settings: SearchSettings, progress: Progress, encode: Encoder | None = None) -> list[Hit]:
    """The samples found, the best first. A sample that is looked for by key is not among them, nor what has no feature
    of it.

    Their captions are read from the shards; `progress` is told of one that is gone. `encode` is needed for an
    image or words only. Raises `SelectionError` for a key, shard or feature that is not in the run, and what
    `encode` raises.
    """
    scores = ScoreTables(RunDirectory(run))
    tables = CodeTables(scores)
    query: Preview | None = None
    if settings.feature is not None:
        position, measures = _with_feature(tables, settings.feature, settings)
    elif settings.by_query:
        if encode is None:
            raise SelectionError("an image or words need a model that turns them into codes, and none was given")
        position, measures = _like(encode(run, settings.image, settings.text), scores, tables, settings, progress)
        query = Preview(settings.text, None if settings.image is None else settings.image.read_bytes())
    else:
        sample = np.array([sample_at(scores, settings.key or "", settings.shard)])
        position, measures = _like(tables.take(sample), scores, tables, settings, progress)
        query = previews(scores, sample)[0]
    samples = previews(scores, position)
    for problem in problems(samples)[:3]:
        progress.note(f"no caption: {problem}")
    hits = _hits(scores, position, measures, samples)
    if settings.page is not None:
        _write_page(settings.page, run, settings, query, hits, samples)
    return hits


def _with_feature(
    tables: CodeTables, feature: int, settings: SearchSettings
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Positions of the samples and, by name, the measures that make them hits."""
    if not 0 <= feature < len(tables.idf):
        raise SelectionError(
            f"--feature {feature} is not a feature of this run's SAE, which has features 0 to {len(tables.idf) - 1:,}"
        )
    position, maxima = strongest(tables, feature, settings.n, settings.sides)
    return position, {"image": maxima[:, 0], "text": maxima[:, 1]}


def _like(
    query: Codes, scores: ScoreTables, tables: CodeTables, settings: SearchSettings, progress: Progress
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same of the samples nearest to the query, without itself where it is one of them."""
    groups = scores.groups("image_hash", "text_hash")
    try:
        index = open_index(tables, representatives(scores, groups), IndexSettings(), scores.run.index, progress)
    except OSError as error:
        raise RunError(f"run {str(scores.run.path)!r} cannot be written: {error.strerror or error}") from error
    near = nearest(only(query, settings.sides), settings.n + 1, index, tables, groups)
    other = np.flatnonzero((near.position != query.position[0]) & (near.cosine > 0))[: settings.n]
    cosines = {"cosine": near.cosine[other], "image": near.image[other], "text": near.text[other]}
    return near.position[other], {name: cosines[name] for name in ("cosine", *settings.sides)}


def sample_at(scores: ScoreTables, key: str, shard: str | None) -> int:
    """The position of the one scored sample with a key, in the shard whose path ends so; raises `SelectionError`."""
    positions = scores.with_key(key)
    paths = [scores.shards[i].path for i in np.searchsorted(scores.starts, positions, side="right") - 1]
    if shard is not None:
        inside = [i for i, path in enumerate(paths) if path.endswith(shard)]
        positions, paths = positions[inside], [paths[i] for i in inside]
    where = f"in a shard that ends with {shard!r} of run" if shard else "in run"
    if not len(positions):
        near = scores.key_like(key) if shard is None else None
        hint = f"; did you mean {near!r}?" if near is not None else ""
        raise SelectionError(f"there is no sample with key {key!r} {where} {str(scores.run.path)!r}{hint}")
    if len(positions) > 1:
        if len(set(paths)) == 1:
            raise SelectionError(
                f"key {key!r} is there {len(positions)} times in shard {paths[0]!r}, so it does not name one sample"
            )
        few = ", ".join(map(repr, paths[:3])) + (", …" if len(paths) > 3 else "")
        raise SelectionError(
            f"key {key!r} is there {len(positions)} times, in {few}: say which with --shard, the end of its path"
        )
    if not scores.scored[positions[0]]:
        raise SelectionError(f"the sample with key {key!r} has no codes: it could not be scored")
    return int(positions[0])


def _hits(
    scores: ScoreTables, position: np.ndarray, measures: dict[str, np.ndarray], samples: list[Preview]
) -> list[Hit]:
    if not len(position):
        return []
    named = [name for name in SCORES if name in scores.types]
    ascending = np.sort(position)
    columns: dict[str, Any] = scores.at(ascending, ("key", "shard", "row", *named))
    hits = []
    for i, at in enumerate(np.searchsorted(ascending, position).tolist()):
        values = {name: float(columns[name][at]) for name in named}
        hits.append(
            Hit(
                str(columns["key"][at]),
                str(columns["shard"][at]),
                int(columns["row"][at]),
                {name: float(column[i]) for name, column in measures.items()},
                {name: value if np.isfinite(value) else None for name, value in values.items()},
                samples[i].caption,
            )
        )
    return hits


def _write_page(
    path: Path, run: Path, settings: SearchSettings, query: Preview | None, hits: list[Hit], samples: list[Preview]
) -> None:
    tiles = []
    if query is not None:
        tiles.append(Tile("looked for", (Shown(query, () if settings.key is None else (settings.key,)),)))
    for hit, preview in zip(hits, samples, strict=True):
        figures = [
            f"{name} {value:.3f}"
            for name, value in hit.scores.items()
            if name in shown(HEADLINES) and value is not None
        ]
        heading = ", ".join(f"{name} {value:.4f}" for name, value in hit.measures.items())
        tiles.append(Tile(heading, (Shown(preview, (hit.key, Path(hit.shard).name, ", ".join(figures))),)))
    request = {
        "key": settings.key,
        "shard": settings.shard,
        "image": settings.image,
        "text": settings.text,
        "feature": settings.feature,
    }
    words = ", ".join(f"{name} {value}" for name, value in request.items() if value is not None)
    write_page(
        path,
        f"Search: {words}",
        f"{len(hits):,} samples of run {run}, the best first; --on {settings.on}",
        tiles,
    )
