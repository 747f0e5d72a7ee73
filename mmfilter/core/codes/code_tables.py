"""The code tables of a run: read in order, shard by shard or only where asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mmfilter.core.codes.vectors import Codes, SideCodes
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.run.tables import read_codes
from mmfilter.core.sides import SIDES
from mmfilter.errors import RunError

READERS = 8
"""Tables decoded at one time at most: each is in memory whole"""


class CodeTables:
    """The code tables beside a run's score tables. Raises `RunError` when one is missing or is another's."""

    def __init__(self, scores: ScoreTables, *, workers: int | None = None) -> None:
        self._run, self._starts = scores.run, scores.starts
        self._paths = [scores.run.codes(name) for name in scores.names]
        self._workers = min(workers or os.cpu_count() or 1, READERS)
        for path, shard in zip(self._paths, scores.shards, strict=True):
            if not path.exists():
                raise RunError(
                    f"run {str(scores.run.path)!r} has no codes of shard {shard.path!r}: delete scores/{path.name} in "
                    "it and run mmfilter score again"
                )
        self.idf = _idf(scores.run.weights)
        self._about = [
            (shard.path, shard.stamp.size, shard.stamp.mtime_ns, shard.stamp.etag, shard.rows)
            for shard in scores.shards
        ]

    @property
    def n_rows(self) -> int:
        """Samples of the run, those without codes too."""
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """Size of all tables."""
        return sum(path.stat().st_size for path in self._paths)

    @property
    def digest(self) -> str:
        """Changes when a shard joins the run or its codes do, and with the features' rarity; not with the order of
        shards.

        The codes count by the size of their table, which stays when a run is copied.
        """
        sizes = [path.stat().st_size for path in self._paths]
        listing = json.dumps(
            sorted(((*about, size) for about, size in zip(self._about, sizes, strict=True)), key=lambda item: item[0])
        ).encode()
        return hashlib.sha256(listing + self.idf.tobytes()).hexdigest()[:16]

    def read(self, positions: np.ndarray | None = None) -> Iterator[tuple[Codes, int]]:
        """All codes, or those of ascending `positions`: a table at a time with its size in bytes.

        Tables are decoded in threads, a few ahead, and come in order.
        """
        todo = deque(range(len(self._paths)))
        if positions is not None:
            todo = deque(np.unique(np.searchsorted(self._starts, positions, side="right") - 1).tolist())
        running: deque[tuple[int, Future[Codes]]] = deque()
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                while todo or running:
                    while todo and len(running) <= self._workers:
                        number = todo.popleft()
                        running.append((number, threads.submit(self._table, number, positions)))
                    number, table = running.popleft()
                    yield table.result(), self._paths[number].stat().st_size
            finally:
                for _, table in running:
                    table.cancel()

    def take(self, positions: np.ndarray) -> Codes:
        """The codes of ascending positions. Raises `RunError` when a sample has none."""
        codes = Codes.concatenate([part for part, _ in self.read(positions)])
        if len(codes) != len(positions):
            raise RunError(
                f"the code tables of run {str(self._run.path)!r} lack samples that have scores; score the shards again"
            )
        return codes

    def _table(self, number: int, positions: np.ndarray | None) -> Codes:
        start, stop = self._starts[number : number + 2]
        rows = None
        if positions is not None:
            rows = positions[np.searchsorted(positions, start) : np.searchsorted(positions, stop)] - start
        columns = [f"{side}_{part}" for side in SIDES for part in ("ids", "mean")]
        parts = []
        for table_rows, lists in read_codes(self._paths[number], columns, rows):
            sides = [SideCodes.of_lengths(*lists[f"{side}_ids"], lists[f"{side}_mean"][1]) for side in SIDES]
            if any(len(side.ids) and side.ids.max() >= len(self.idf) for side in sides):
                raise RunError(
                    f"code table {str(self._paths[number])!r} has features that {str(self._run.weights)!r} lacks: it "
                    "belongs to another SAE"
                )
            parts.append(Codes(start + table_rows, *sides))
        return Codes.concatenate(parts)

    def strongest(self, feature: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each table the positions of the samples that have a feature, and its maxima there, (samples, 2): image,
        text."""
        columns = [f"{side}_{part}" for side in SIDES for part in ("ids", "max")]
        for start, path in zip(self._starts, self._paths, strict=False):
            for rows, lists in read_codes(path, columns):
                maxima = np.zeros((len(rows), len(SIDES)), np.float32)
                for number, side in enumerate(SIDES):
                    lengths, ids = lists[f"{side}_ids"]
                    at = np.flatnonzero(ids == feature)
                    maxima[np.searchsorted(np.cumsum(lengths), at, side="right"), number] = lists[f"{side}_max"][1][at]
                has = maxima.any(1)
                yield start + rows[has], maxima[has]


def sample_codes(scores: ScoreTables, position: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, maximum, mean) of each side of one sample as they are stored, strongest first; raises `RunError` without
    any."""
    number = int(np.searchsorted(scores.starts, position, side="right") - 1)
    path = scores.run.codes(scores.names[number])
    columns = [f"{side}_{part}" for side in SIDES for part in ("ids", "max", "mean")]
    for _, lists in read_codes(path, columns, np.array([position - scores.starts[number]])):
        sides = [tuple(lists[f"{side}_{part}"][1] for part in ("ids", "max", "mean")) for side in SIDES]
        return [(ids, maximum, mean) for ids, maximum, mean in sides]
    raise RunError(f"code table {str(path)!r} lacks a sample that has scores; score the shard again")


def _idf(path: Path) -> np.ndarray:
    """Rarity of each feature, float64: ln((1 + N) / (1 + samples in which it fires on either side)), read without
    torch."""
    try:
        with safe_open(path, "numpy") as file:
            n = int((file.metadata() or {})["n_samples"])
            return np.log((1 + n) / (1 + file.get_tensor("samples").astype(np.float64)))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(
            f"feature weights {str(path)!r} cannot be read ({error}); score into another --run to fit them again"
        ) from error
