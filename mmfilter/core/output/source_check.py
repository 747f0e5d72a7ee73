"""Whether the shards that a selection copies from are still those that were scored."""

from __future__ import annotations

import itertools
import operator

import numpy as np

from mmfilter.core.input.places import Stamp, open_file
from mmfilter.core.input.remote import check_ranges, forget, is_web
from mmfilter.core.input.shards import stamps
from mmfilter.core.input.sources.webdataset_tar import key_at
from mmfilter.core.input.tar_walk import BLOCK
from mmfilter.core.run.directory import ScoredShard
from mmfilter.core.run.score_tables import ScoreTables
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
    shards = [tables.shards[number] for number in numbers.tolist()]
    for shard in shards:
        _check_kept(tables, shard)
    forget(shard.path for shard in shards if shard.source.remote)
    for shard, now in zip(shards, stamps([shard.source for shard in shards]), strict=True):
        _check_stamp(shard, now)
    for url in {
        shard.path.split("/")[2]: shard.path for shard in shards if is_web(shard.path) and shard.source.is_tar
    }.values():
        check_ranges(url)
    looked_at = np.array([_has_headers_to_check(tables.shards[i]) for i in numbers.tolist()], bool)
    _check_headers(tables, np.unique(np.concatenate([position[first[looked_at]], position[last[looked_at]]])))


def _has_headers_to_check(shard: ScoredShard) -> bool:
    return shard.source.is_tar and (not shard.source.remote or shard.stamp.etag is None)


def _check_kept(tables: ScoreTables, shard: ScoredShard) -> None:
    if shard.source.once:
        what = "stdin" if shard.source.kind == "stdin" else f"the command {shard.path!r}"
        raise SelectionError(
            f"run {str(tables.run.path)!r} was scored from {what}, so there is no shard to copy from; use --format "
            "keys or datacomp"
        )


def _check_stamp(shard: ScoredShard, now: Stamp | ShardError) -> None:
    if isinstance(now, ShardError):
        raise SelectionError(f"{now}; put it back, or score the input again") from now
    if now != shard.stamp:
        raise SelectionError(
            f"shard {shard.path!r} has changed since it was scored, its byte ranges may be wrong; score it again"
        )


def _check_headers(tables: ScoreTables, positions: np.ndarray) -> None:
    """Each sample's first member must be at its offset, under its key; `positions` are ascending."""
    found = tables.at(positions, ("key", "shard", "offset"))
    rows = zip(found["shard"].tolist(), found["key"].tolist(), found["offset"].tolist(), strict=True)
    for shard, samples in itertools.groupby(rows, key=operator.itemgetter(0)):
        with open_file(shard, buffering=8 * BLOCK) as file:
            for _, key, offset in samples:
                there = key_at(shard, file, offset)
                if there != key:
                    what = "no sample" if there is None else f"sample {there!r}"
                    raise SelectionError(
                        f"shard {shard!r} has {what} at byte {offset:,}, where {key!r} was scored: it has changed; "
                        "score it again"
                    )
