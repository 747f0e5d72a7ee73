"""Close pairs of a run's samples: found through the index, measured on the codes, kept in a table.

Samples with the same hashes count as one, with the codes of the first among them by key, shard and row;
the pairs are between those. What is stored goes a little below the threshold asked for, so that the
pairs on either side of it can be looked at, and a higher threshold needs no new search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfilter import __version__
from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.duplicate_settings import DuplicateSettings, On
from mmfilter.core.codes.faiss_library import check_gpu, threads
from mmfilter.core.codes.index import CodeIndex, IndexSettings, open_index
from mmfilter.core.codes.vectors import Codes, cosines
from mmfilter.core.files import system_reason
from mmfilter.core.progress import Progress
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import DUPLICATE_TABLE, TableWriter, read_columns, read_table_metadata
from mmfilter.core.sides import SIDES
from mmfilter.errors import RunError

BELOW = 0.02
"""How far below the threshold pairs are searched and stored"""
NEIGHBOURS = (16, 64, 256)
"""Neighbours asked for; whose list may go on is asked about again with the next number, and after the
last counts as crowded"""
ROWS_AT_ONCE = 100_000
"""Samples whose codes are read and sorted at one time while pairs are measured; pairs between two such
blocks need both in memory (some 1 GB in all)"""


@dataclass(frozen=True)
class Pairs:
    """Pairs of positions, first < second, complete from `floor` upwards but for the crowded samples."""

    first: np.ndarray
    second: np.ndarray
    image: np.ndarray
    """Cosine of the image sides, float32"""
    text: np.ndarray
    similarity: np.ndarray
    """What is held against the threshold: the smaller of the two, or that of the one side that counts"""
    floor: float
    crowded: np.ndarray
    """Positions of samples with more neighbours than are listed, ascending"""
    complete_above: np.ndarray
    """The similarity above which the list of a crowded sample is complete"""
    index: dict[str, Any]
    """How it was searched (manifest of the index)"""

    def __len__(self) -> int:
        return len(self.first)

    def at_least(self, threshold: float) -> Pairs:
        """The pairs from a threshold upwards, and the samples that are still crowded there."""
        level = np.float32(threshold)  # similarities are of this type: a stored 0.95 is at least 0.95
        kept, still = self.similarity >= level, self.complete_above >= level
        return Pairs(
            self.first[kept],
            self.second[kept],
            self.image[kept],
            self.text[kept],
            self.similarity[kept],
            threshold,
            self.crowded[still],
            self.complete_above[still],
            self.index,
        )

    def borderline(self, threshold: float, n: int) -> np.ndarray:
        """Indices of the n pairs closest to the threshold, on either side; the nearest first."""
        return np.lexsort((self.second, self.first, np.abs(self.similarity - np.float32(threshold))))[:n]


def find_pairs(
    scores: ScoreTables,
    tables: CodeTables,
    groups: np.ndarray,
    settings: DuplicateSettings,
    progress: Progress,
    *,
    keep: bool = True,
) -> Pairs:
    """The run's close pairs, stored ones if they go as far down as is asked for, else searched and stored.

    Without `keep`, and where it cannot be, nothing is written into the run. `groups` are those of
    `ScoreTables.groups` over `settings.hashes`. Raises `RunError` for codes that are missing or damaged,
    `MissingExtra` when a search is needed and there is no FAISS.
    """
    stored = _stored(scores, tables, settings, progress)
    if stored is not None:
        return stored
    try:
        with threads(settings.workers):
            if settings.gpu:
                check_gpu()
            index = open_index(
                tables,
                representatives(scores, groups),
                IndexSettings(settings.on),
                scores.run.index,
                progress,
                at_most=settings.at_most,
                keep=keep,
            )
            if settings.gpu:
                index.to_gpu(progress)
            floor = max(round(settings.threshold - BELOW, 6), min(settings.threshold, 1e-3))
            pairs = _searched(tables, index, floor, settings.on, progress)
        if keep and scores.run.writable:
            _store(pairs, scores, tables, settings.on)
    except OSError as error:
        raise RunError(f"run {str(scores.run.path)!r} cannot be written: {system_reason(error)}") from error
    return pairs


def representatives(scores: ScoreTables, groups: np.ndarray) -> np.ndarray:
    """Ascending positions of the scored samples that are the first of their group."""
    return np.flatnonzero(scores.scored & (groups == np.arange(len(groups))))


# --- searching -------------------------------------------------------------------------------


def _searched(tables: CodeTables, index: CodeIndex, floor: float, on: On, progress: Progress) -> Pairs:
    level = floor - index.margin(floor)
    progress.start("searching", len(index))
    candidates, crowded, above = np.zeros(0, np.int64), [], []
    waiting: list[np.ndarray] = []
    n = int(tables.n_rows)
    for position, vectors in index.blocks():
        some, full, last = _candidates(index, position, vectors, level, n)
        waiting.append(some)
        crowded.append(full)
        above.append(last + np.array([index.margin(x) for x in last.tolist()]))
        if sum(map(len, waiting)) > 1 << 24:
            candidates, waiting = np.unique(np.concatenate([candidates, *waiting])), []
        progress.advance(len(position), len(position))
    candidates = np.unique(np.concatenate([candidates, *waiting]))
    first, second = np.divmod(candidates, max(n, 1))
    image, text = _measured(tables, first, second, progress)
    similarity = np.minimum(image, text) if on == "both" else image if on == "image" else text
    kept = similarity >= np.float32(floor)
    full, last = np.concatenate([np.zeros(0, np.int64), *crowded]), np.concatenate([np.zeros(0), *above])
    order = np.argsort(full, kind="stable")
    return Pairs(
        first[kept],
        second[kept],
        image[kept],
        text[kept],
        similarity[kept],
        floor,
        full[order],
        np.minimum(last[order], 1).astype(np.float32),
        index.about,
    )


def _candidates(
    index: CodeIndex, position: np.ndarray, vectors: np.ndarray, level: float, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs at or above `level` as first · n + second, the crowded positions, and their farthest neighbour's
    similarity."""
    pairs, todo = [], np.arange(len(position))
    for k in NEIGHBOURS:
        similarity, other = index.search(vectors[todo], k)
        goes_on = (similarity[:, -1] >= level) & (other[:, -1] >= 0)
        listed = (similarity >= level) & ~goes_on[:, None]
        if k == NEIGHBOURS[-1]:  # of those at the end of a full list only some are on it: which ones is chance
            listed |= goes_on[:, None] & (similarity > similarity[:, -1:])
        query, at = np.nonzero(listed)
        mine, theirs = position[todo[query]], other[query, at]
        real = (theirs >= 0) & (theirs != mine)
        mine, theirs = mine[real], theirs[real]
        pairs.append(np.minimum(mine, theirs) * n + np.maximum(mine, theirs))
        last, todo = similarity[goes_on, -1], todo[goes_on]
        if not len(todo):
            break
    return np.concatenate(pairs), position[todo], last.astype(np.float64)


def _measured(
    tables: CodeTables, first: np.ndarray, second: np.ndarray, progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    """Exact cosines of both sides, with the codes of a bounded number of samples in memory."""
    image, text = np.empty(len(first), np.float32), np.empty(len(first), np.float32)
    involved = np.unique(np.concatenate([first, second]))
    block = np.stack([np.searchsorted(involved, part) // ROWS_AT_ONCE for part in (first, second)])
    progress.start("measuring", len(first))
    for i in np.unique(block[0]).tolist():
        left = tables.take(involved[i * ROWS_AT_ONCE : (i + 1) * ROWS_AT_ONCE]).by_feature()
        for j in np.unique(block[1, block[0] == i]).tolist():
            codes = left
            if j != i:
                codes = Codes.concatenate(
                    [left, tables.take(involved[j * ROWS_AT_ONCE : (j + 1) * ROWS_AT_ONCE]).by_feature()]
                )
            at = np.flatnonzero((block[0] == i) & (block[1] == j))
            rows = [np.searchsorted(codes.position, part[at]) for part in (first, second)]
            image[at], text[at] = (cosines(side, tables.idf, *rows) for side in (codes.image, codes.text))
            progress.advance(len(at), len(at))
    return image, text


# --- the table -------------------------------------------------------------------------------


def _store(pairs: Pairs, scores: ScoreTables, tables: CodeTables, on: On) -> None:
    writer = TableWriter(scores.run.duplicates, DUPLICATE_TABLE)
    try:
        for columns in _rows(pairs, scores):
            writer.write_columns(columns)
    except BaseException:
        writer.abandon()
        raise
    writer.finish(
        {
            "kind": "duplicates",
            "version": __version__,
            "on": on,
            "floor": pairs.floor,
            "inputs": tables.digest,
            "pairs": len(pairs),
        }
        | {"crowded": len(pairs.crowded), "index": pairs.index}
    )


def _rows(pairs: Pairs, scores: ScoreTables) -> Iterator[dict[str, Any]]:
    """Row groups: the pairs, then the crowded samples."""
    involved = np.unique(np.concatenate([pairs.first, pairs.second, pairs.crowded]))
    names = scores.names_of(involved)
    for start in range(0, len(pairs), 1 << 20):
        at = slice(start, start + (1 << 20))
        columns: dict[str, Any] = {
            "image": pairs.image[at],
            "text": pairs.text[at],
            "similarity": pairs.similarity[at],
        }
        for prefix, position in (("", pairs.first[at]), ("other_", pairs.second[at])):
            row = np.searchsorted(involved, position)
            columns |= {f"{prefix}{name}": values[row] for name, values in names.items()}
        yield columns
    if len(pairs.crowded):
        row = np.searchsorted(involved, pairs.crowded)
        columns = {name: [None] * len(row) for name in DUPLICATE_TABLE.names}
        yield columns | {name: values[row] for name, values in names.items()} | {"similarity": pairs.complete_above}


def _stored(scores: ScoreTables, tables: CodeTables, settings: DuplicateSettings, progress: Progress) -> Pairs | None:
    """The stored pairs, if they are this run's and go down to the threshold; a note says why not."""
    path: Path = scores.run.duplicates
    if not path.exists():
        return None
    about = _about(path)
    if about["inputs"] != tables.digest:
        progress.note("the run has changed since its duplicates were searched: searching again")
    elif about["on"] != settings.on:
        progress.note(f"the stored duplicates are for --on {about['on']}: searching again for {settings.on}")
    elif about["floor"] > settings.threshold:
        progress.note(
            f"the stored duplicates go down to {about['floor']:g}, not to {settings.threshold:g}: searching again"
        )
    else:
        try:
            pairs = _read(path, about, scores)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise RunError(
                f"the stored duplicates {str(path)!r} cannot be read ({' '.join(str(error).split())}); delete the file "
                "and run again"
            ) from error
        return pairs if _about(path) == about else None  # another process may have replaced it meanwhile
    return None


def _about(path: Path) -> dict[str, Any]:
    try:
        about = read_table_metadata(path)
    except RunError as error:
        raise RunError(
            f"{' '.join(str(error).split())}; delete the file and run again"
        ) from error  # pyarrow breaks lines
    if about.get("kind") != "duplicates":
        raise RunError(f"{str(path)!r} is not a table of close pairs; move it away and run again")
    return about


def _read(path: Path, about: dict[str, Any], scores: ScoreTables) -> Pairs:
    columns = read_columns(path, [name for name in DUPLICATE_TABLE.names if "key" not in name])
    paths, shard = columns["shard"]
    one = scores.positions(paths, shard, columns["row"].data)
    pair = ~columns["other_row"].mask
    paths, shard = columns["other_shard"]
    other = scores.positions(paths, shard[pair], columns["other_row"].data[pair])
    # the order of the shards may have changed
    first, second = np.minimum(one[pair], other), np.maximum(one[pair], other)
    image, text, similarity = (columns[name].data for name in (*SIDES, "similarity"))
    order = np.argsort(one[~pair], kind="stable")
    crowded, above = one[~pair][order], similarity[~pair][order]
    return Pairs(
        first, second, image[pair], text[pair], similarity[pair], about["floor"], crowded, above, about["index"]
    )
