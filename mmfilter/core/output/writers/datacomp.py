"""DataComp's subset file: a sorted array of sample ids, which its resharder cuts a pool down to.

A uid is 32 hexadecimal digits; it is stored as two unsigned 64-bit numbers, the first 16 digits and the
last 16 (`f0` and `f1` of the dtype `u8,u8`). The resharder looks ids up by bisection and does not check
that they are sorted; it writes a sample as often as its id comes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from mmfilter.core.output.tar_writer import write_all
from mmfilter.core.output.writers.kept import Kept, Written
from mmfilter.errors import SelectionError

DTYPE = np.dtype("<u8,<u8")
FILE = "sample_ids.npy"

_UID = re.compile(r"[0-9a-fA-F]{32}")
_AT_ONCE = 100_000


def write_datacomp(folder: Path, kept: Kept) -> Written:
    """Write the subset file into a folder."""
    with open(folder / FILE, "xb", buffering=0) as file:
        return write_subset(file.fileno(), kept)


def write_subset(fd: int, kept: Kept) -> Written:
    """Write the subset file to a file descriptor; raises `SelectionError` when a sample has no uid, or another kind."""
    ids, n_shared = subset(kept)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(ids))
    write_all(fd, header.getvalue())
    write_all(fd, ids.view(np.uint8).data)
    warnings: tuple[str, ...] = ()
    if n_shared:
        warnings = (
            f"{n_shared:,} uids belong to several kept samples: each is written once, and resharder copies every "
            "sample of the pool that has it",
        )
    return Written(len(header.getvalue()) + ids.nbytes, warnings=warnings)


def subset(kept: Kept) -> tuple[np.ndarray, int]:
    """The sorted ids (n,) of dtype `u8,u8`, and how many uids belong to several samples.

    A sample that comes several times in the selection has its id as many times.
    """
    positions, times = np.unique(kept.positions, return_counts=True)
    halves = np.concatenate([np.zeros((0, 2), np.uint64), *_halves(kept, positions)])
    order = np.lexsort((-times, halves[:, 1], halves[:, 0]))
    halves, times = halves[order], times[order]
    first = np.ones(len(halves), bool)
    first[1:] = (halves[1:] != halves[:-1]).any(1)
    several = first[:-1] & ~first[1:]
    ids = np.repeat(halves[first], times[first], axis=0).view(DTYPE).reshape(-1)
    return ids, int(several.sum())


def _halves(kept: Kept, positions: np.ndarray) -> Iterator[np.ndarray]:
    """(n, 2) uint64 of chunks of uids."""
    if "uid" not in kept.tables.types:
        raise SelectionError(
            "the score table has no column 'uid', by which a DataComp subset names samples; use --format keys"
        )
    rows = kept.tables.take(positions, ("key", "uid"))
    missing: list[str] = []
    other: list[tuple[str, str]] = []
    while chunk := list(islice(rows, _AT_ONCE)):
        missing += [key for key, uid in chunk if uid is None]
        other += [(uid, key) for key, uid in chunk if uid is not None and not _UID.fullmatch(uid)]
        if not missing and not other:
            digits = bytes.fromhex("".join(uid for _, uid in chunk))
            yield np.frombuffer(digits, ">u8").astype(np.uint64).reshape(-1, 2)
    of = f"of {len(positions):,} kept samples"
    if missing:
        raise SelectionError(
            f"{len(missing):,} {of} have no value in column 'uid' of the score table (first: key {missing[0]!r}), by "
            "which a DataComp subset "
            "names samples; add --where 'uid IS NOT NULL', or use --format keys"
        )
    if other:
        raise SelectionError(
            f"{len(other):,} {of} have a uid that is not 32 hexadecimal digits (first: {other[0][0]!r} of key "
            f"{other[0][1]!r}), as a DataComp "
            "subset needs; use --format keys"
        )
