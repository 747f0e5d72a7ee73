"""The door for shards, the units of input: from the words of the user to sources (`sources/` has a file for every
kind).

A shard is a WebDataset tar (path, URL, stdin or the output of a command), a parquet file with images, a
LLaVA JSON, or a stretch of a folder of images. Reading goes forward only, in bounded memory. A sample
that cannot be used is yielded with a `problem`; a shard that cannot be read to its end raises
`ShardError`, since readers otherwise take a truncated file for a shorter one.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, Literal
from urllib.parse import unquote, urlsplit

from mmfilter.core.input.places import PIPE, STDIN, Stamp, read_head
from mmfilter.core.input.remote import as_it_suits, is_url, look, matches, without_query
from mmfilter.core.input.source import NO_OPTIONS, InputOptions, Source
from mmfilter.core.input.sources.image_folder import ImageFolder, folder_shards, has_images, is_folder
from mmfilter.core.input.sources.llava_json import LlavaJson
from mmfilter.core.input.sources.parquet_rows import ParquetRows
from mmfilter.core.input.sources.pipe import PipedTar
from mmfilter.core.input.sources.webdataset_tar import StdinTar, WebdatasetTar
from mmfilter.errors import ShardError

_EXTENSIONS: dict[str, FileKind] = {".tar": "tar", ".parquet": "parquet", ".json": "json", ".jsonl": "jsonl"}
_HEAD = 512
"""Bytes that tell the kinds of files apart: a tar's first header has its magic in them"""

FileKind = Literal["tar", "parquet", "json", "jsonl"]


# --- sources ---------------------------------------------------------------------------------


def open_sources(patterns: Iterable[str | os.PathLike[str]], options: InputOptions = NO_OPTIONS) -> list[Source]:
    """The shards that paths, globs, brace patterns and URLs name: in order, each once; `-` is a tar on stdin.

    Raises `ShardError` for what does not exist, and for --images where no shard is a LLaVA JSON; of plain URLs the
    first of every bucket or server is looked at, so that a wrong name or missing credentials are reported at once,
    and the others when they are read.
    """
    sources = [open_source(path, options) for path in expand(patterns, options)]
    if options.images is not None and not any(source.kind == "llava-json" for source in sources):
        first = sources[0].path if sources else ""
        raise ShardError(first, "is not LLaVA JSON, and --images is the folder of its images; leave it out")
    return sources


def open_source(path: str, options: InputOptions = NO_OPTIONS, stdin: BinaryIO | None = None) -> Source:
    """The shard at a path as `expand` gives it, or as a manifest names it; `-` is `stdin`, or the process's own."""
    if path == STDIN:
        return StdinTar(stdin)
    if path.startswith(PIPE):
        return PipedTar(path, options)
    if is_folder(path):
        return ImageFolder(path)
    kind = _kind(path)
    if kind == "parquet":
        return ParquetRows(path, options)
    return WebdatasetTar(path) if kind == "tar" else LlavaJson(path, options, lines=kind == "jsonl")


def _kind(path: str) -> FileKind:
    """What a file is, by its name (a URL's query is not a part of it) and by its first bytes.

    The bytes decide where the name says nothing, and where they cannot be those of what it says. A remote file
    whose name says what it is is not looked at.
    """
    named = _EXTENSIONS.get(os.path.splitext(without_query(path))[1].lower())
    if named is not None and is_url(path):
        return named
    return _kind_of_bytes(read_head(path, _HEAD), named)


def _kind_of_bytes(head: bytes, named: FileKind | None) -> FileKind:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "tar"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if named in (None, "tar", "parquet") and first in (b"[", b"{") and b"\0" not in head:
        return "json" if first == b"[" else "jsonl"
    return named or "tar"


def stamps(sources: Sequence[Source]) -> Iterator[Stamp | ShardError]:
    """The stamp of each source, or why there is none; stores are asked about many at a time."""

    def stamp(source: Source) -> Stamp | ShardError:
        try:
            return source.stamp()
        except ShardError as error:
            return error

    return as_it_suits(next((source.path for source in sources if source.remote), ""), stamp, sources)


# --- where shards are ------------------------------------------------------------------------


def expand(patterns: Iterable[str | os.PathLike[str]], options: InputOptions = NO_OPTIONS) -> list[str]:
    """The paths of the shards that patterns name; local ones come back absolute, the matches of one glob sorted."""
    names = [os.fspath(pattern) for pattern in patterns]
    if STDIN in names and len(names) > 1:
        raise ShardError(STDIN, "(stdin) must be the only shard; give the others in another run")
    shards = list(dict.fromkeys(shard for name in names for shard in _expand_one(name, options)))
    for shard in shards:
        if any(letter < " " or "\ud800" <= letter <= "\udfff" for letter in shard):
            raise ShardError(shard, "has a line break or bytes that are not UTF-8 in its path; rename it")
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
    except ValueError as error:
        raise ShardError(
            name, "has unbalanced braces; write a range as {00000..00099} and a choice as {a,b}"
        ) from error


def _expand_path(name: str) -> Iterator[str]:
    if os.path.exists(name) or not glob.has_magic(name):
        yield from _existing(name)
        return
    paths = sorted(match for match in glob.glob(name, recursive=True) if os.path.isfile(match))
    if not paths:
        raise ShardError(name, "matches no file; check the folder and the pattern")
    yield from map(os.path.abspath, paths)


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
        urls = matches(url)
        if not urls:
            raise ShardError(url, "matches no file; check the bucket and the pattern")
        yield from urls
