"""Shards: the units of input, found by pattern and read sample by sample (`sources/` has a file for every kind).

A shard is a WebDataset tar (path, URL, stdin or the output of a command), a parquet file with images, a
LLaVA JSON, or a stretch of a folder of images. Reading goes forward only, in bounded memory. A sample
that cannot be used is yielded with a `problem`; a shard that cannot be read to its end raises
`ShardError`, since readers otherwise take a truncated file for a shorter one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from mmfilter.core.input.places import PIPE, STDIN, Stamp, open_shard, read_once
from mmfilter.core.input.remote import as_it_suits, is_url, look, matches
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, RawSample
from mmfilter.core.input.source import NO_OPTIONS, InputOptions, RowSource, Source
from mmfilter.core.input.sources.image_folder import ImageFolder, folder_shards, has_images, is_folder
from mmfilter.core.input.sources.llava_json import LlavaJson
from mmfilter.core.input.sources.parquet_rows import ParquetRows
from mmfilter.core.input.sources.pipe import PipedTar
from mmfilter.core.input.sources.webdataset_tar import WebdatasetTar
from mmfilter.errors import ShardError

__all__ = [
    "MAX_MEMBER_BYTES",
    "STDIN",
    "InputOptions",
    "RawSample",
    "Stamp",
    "expand",
    "is_tar",
    "is_url",
    "open_rows",
    "open_shard",
    "read_once",
    "read_samples",
    "stamp",
    "stamps",
]

_JSON = (".json", ".jsonl")
_PARQUET = ".parquet"


# --- what a shard is -------------------------------------------------------------------------


def read_samples(
    shard: str,
    *,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    stdin: BinaryIO | None = None,
    options: InputOptions = NO_OPTIONS,
) -> Iterator[RawSample]:
    """Yield the samples of a shard in order; raises `ShardError` where it cannot be read to its end."""
    return _source(shard, options, stdin).samples(max_member_bytes)


def stamp(shard: str) -> Stamp:
    """The stamp of a shard as it is now, empty for a stream; raises `ShardError` when it is gone."""
    return Stamp() if read_once(shard) else _source(shard, NO_OPTIONS).stamp()


def stamps(shards: Sequence[str]) -> Iterator[Stamp | ShardError]:
    """The stamp of each shard, or why there is none; stores are asked about many at a time."""

    def look(shard: str) -> Stamp | ShardError:
        try:
            return stamp(shard)
        except ShardError as error:
            return error

    return as_it_suits(next(filter(is_url, shards), ""), look, shards)


def open_rows(shard: str, options: InputOptions) -> RowSource:
    """A shard that is no tar, for reading single samples by row; to be closed."""
    return _rows(shard, options)


def is_tar(shard: str) -> bool:
    """Whether the samples of a shard are byte ranges of a tar."""
    return read_once(shard) or _rows(shard, NO_OPTIONS) is None


def _source(shard: str, options: InputOptions, stdin: BinaryIO | None = None) -> Source:
    if shard.startswith(PIPE):
        return PipedTar(shard, options)
    return _rows(shard, options) or WebdatasetTar(shard, stdin)


def _rows(shard: str, options: InputOptions) -> RowSource | None:
    if is_folder(shard):
        return ImageFolder(shard)
    if shard.lower().endswith(_PARQUET):
        return ParquetRows(shard, options)
    return LlavaJson(shard, options) if shard.lower().endswith(_JSON) else None


# --- where shards are ------------------------------------------------------------------------


def expand(patterns: Iterable[str | os.PathLike[str]], options: InputOptions = NO_OPTIONS) -> list[str]:
    """The shards that paths, globs, brace patterns and URLs name: in order, each once.

    Local paths come back absolute, the matches of one glob sorted. `-` is a tar on stdin and stands
    alone. Raises `ShardError` for what does not exist; of plain URLs the first of every bucket or server is looked at,
    so that a wrong name or missing credentials are told at once, and the others when they are read.
    """
    names = [os.fspath(pattern) for pattern in patterns]
    if STDIN in names and len(names) > 1:
        raise ShardError(STDIN, "(stdin) must be the only shard; give the others in another run")
    shards = list(dict.fromkeys(shard for name in names for shard in _expand_one(name, options)))
    for shard in shards:
        if any(letter < " " or "\ud800" <= letter <= "\udfff" for letter in shard):
            raise ShardError(shard, "has a line break or bytes that are no UTF-8 in its path; rename it")
    if options.images is not None and not any(shard.lower().endswith(_JSON) for shard in shards):
        raise ShardError(
            shards[0] if shards else "", "is no LLaVA JSON, and --images is the folder of those; leave it out"
        )
    _look_at_first(shards)
    return shards


def _look_at_first(shards: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for shard in shards:
        if is_url(shard) and not is_folder(shard):  # a folder has been listed
            first.setdefault("/".join(shard.split("/")[:3]), shard)
    for shard in first.values():
        look(shard)


def _expand_one(name: str, options: InputOptions) -> Iterator[str]:
    if name == STDIN:
        yield name
    elif name.startswith(PIPE):
        options.check_pipe(name)
        yield from _expand_braces(name)
    elif not is_url(name) and os.path.exists(name):  # also names that only look like patterns
        yield from _existing(name)
    else:
        for single in _expand_braces(name):
            yield from _expand_url(single) if is_url(single) else _expand_path(single)


def _expand_braces(name: str) -> Iterator[str]:
    import braceexpand

    try:
        yield from braceexpand.braceexpand(name, escape=False)
    except braceexpand.UnbalancedBracesError as error:
        raise ShardError(
            name, "has unbalanced braces; write a range as {00000..00099} and a choice as {a,b}"
        ) from error


def _expand_path(name: str) -> Iterator[str]:
    if os.path.exists(name) or not glob.has_magic(name):
        yield from _existing(name)
        return
    found = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not found:
        raise ShardError(name, "matches no file; check the folder and the pattern")
    yield from map(os.path.abspath, found)


def _existing(name: str) -> Iterator[str]:
    if not os.path.exists(name):
        raise ShardError(name, "does not exist; check the path, or give a pattern such as 'data/*.tar'")
    if not os.path.isdir(name):
        yield os.path.abspath(name)
    elif has_images(name):
        yield from folder_shards(os.path.abspath(name))
    else:
        raise ShardError(name, f"is a directory; name the shards in it: {os.path.join(name, '*.tar')!r}")


def _expand_url(url: str) -> Iterator[str]:
    if url.lower().startswith("file://"):
        yield from _expand_path(unquote(urlsplit(url).path))
    elif url.endswith("/"):
        yield from folder_shards(url.rstrip("/"))
    else:
        found = matches(url)
        if not found:
            raise ShardError(url, "matches no file; check the bucket and the pattern")
        yield from found
