"""Whether the shards that a selection copies from are still those that were scored."""

from __future__ import annotations

import itertools
import operator

import numpy as np

from mmfilter.core.data.run import ScoredShard
from mmfilter.core.data.score_tables import ScoreTables
from mmfilter.core.data.shards import STDIN, is_tar, is_url, open_shard, read_once, stamp
from mmfilter.core.data.sources.webdataset_tar import key_at
from mmfilter.core.data.tar_walk import BLOCK
from mmfilter.errors import SelectionError, ShardError


def check_sources(tables: ScoreTables, kept: np.ndarray) -> None:
    """Raise `SelectionError` unless every shard with a row of the mask is as it was when it was scored.

    Its size and time of change (a remote one's ETag) are compared, and the headers of its first and last
    kept sample must be where the score table has them; of a remote shard only where it has no ETag, and of
    tars only: other samples are made anew.
    """
    position = np.flatnonzero(kept)
    shard = np.searchsorted(tables.starts, position, side="right") - 1
    numbers, first = np.unique(shard, return_index=True)
    last = np.append(first[1:], len(position)) - 1
    for number in numbers.tolist():
        _check_stamp(tables, number)
    looked_at = np.array([_has_headers_to_check(tables.shards[i]) for i in numbers.tolist()], bool)
    _check_headers(tables, np.unique(np.concatenate([position[first[looked_at]], position[last[looked_at]]])))


def _has_headers_to_check(shard: ScoredShard) -> bool:
    return is_tar(shard.path) and (not is_url(shard.path) or shard.stamp.etag is None)


def _check_stamp(tables: ScoreTables, number: int) -> None:
    shard = tables.shards[number]
    if read_once(shard.path):
        what = "stdin" if shard.path == STDIN else f"the command {shard.path!r}"
        raise SelectionError(f"run {str(tables.run.path)!r} was scored from {what}, so there is no shard to copy from; use --format keys")
    try:
        same = stamp(shard.path) == shard.stamp
    except ShardError as error:
        raise SelectionError(f"{error}; put it back, or score the input again") from error
    if not same:
        raise SelectionError(f"shard {shard.path!r} has changed since it was scored, its byte ranges may be wrong; score it again")


def _check_headers(tables: ScoreTables, positions: np.ndarray) -> None:
    """Each sample's first member must be at its offset, under its key; `positions` are ascending."""
    found = tables.at(positions, ("key", "shard", "offset"))
    rows = zip(found["shard"].tolist(), found["key"].tolist(), found["offset"].tolist(), strict=True)
    for shard, samples in itertools.groupby(rows, key=operator.itemgetter(0)):
        with open_shard(shard, buffering=8 * BLOCK) as file:
            for _, key, offset in samples:
                there = key_at(shard, file, offset)
                if there != key:
                    what = "no sample" if there is None else f"sample {there!r}"
                    raise SelectionError(f"shard {shard!r} has {what} at byte {offset:,}, where {key!r} was scored: it has changed; score it again")
