"""LLaVA JSON: a list of `{"id", "image", "conversations"}`, or JSONL with one a line, beside a folder of images.

The file is read as a stream, a record at a time. The names of images come from the data: one that is
absolute or has `..` in it is never opened.
"""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

from mmfilter.core.input.places import BadFile, Stamp, open_file, read_file, stamp_file
from mmfilter.core.input.remote import as_it_suits
from mmfilter.core.input.sample import MAX_MEMBER_BYTES, Keys, RawSample, image_extension
from mmfilter.core.input.source import InputOptions, RowSource
from mmfilter.errors import ShardError

MAX_RECORD = 16 << 20
"""Characters of one record; a conversation has some thousand."""

_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()
_WANTED = 'a list of records such as {"id": …, "image": "a.jpg", "conversations": […]}'


@dataclass(frozen=True, slots=True)
class _Record:
    """One record and where it is in the file."""

    offset: int
    text: bytes
    value: Any
    problem: str | None = None


class LlavaJson(RowSource):
    """A JSON or JSONL file whose images are in a folder."""

    kind = "llava-json"

    def __init__(self, path: str, options: InputOptions, *, lines: bool) -> None:
        super().__init__(path)
        self._images = (options.images or path.rpartition("/")[0]).rstrip("/")
        self._lines = lines
        self._index: tuple[BinaryIO, list[str], array[int], array[int]] | None = None
        self._open = ExitStack()

    def stamp(self) -> Stamp:
        """That of the JSON; the images are not looked at."""
        return stamp_file(self.path)

    def samples(self, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[RawSample]:
        """The records in order, each with its image."""
        keys = self._keys()
        with open_file(self.path) as file:
            records = (
                (keys.take(_id(record.value), row), row, record) for row, record in enumerate(self._records(file))
            )
            yield from as_it_suits(self._images, lambda item: self._sample(*item, max_member_bytes), records)

    def sample(self, row: int) -> RawSample:
        """One record with its image; the first call goes through the file to learn where each is."""
        if self._index is None:
            self._index = self._indexed()
        file, keys, offsets, sizes = self._index
        if row >= len(keys):
            raise ShardError(
                self.path, f"has only {len(keys):,} records; it has changed since it was scored, score it again"
            )
        file.seek(offsets[row])
        text = file.read(sizes[row])
        return self._sample(keys[row], row, _Record(offsets[row], text, json.loads(text)), MAX_MEMBER_BYTES)

    def close(self) -> None:
        """Close the file."""
        self._open.close()
        self._index = None

    def _keys(self) -> Keys:
        return Keys(os.path.basename(self.path).rpartition(".")[0])

    def _indexed(self) -> tuple[BinaryIO, list[str], array[int], array[int]]:
        """The open file, and key, offset and length of every record."""
        file = self._open.enter_context(open_file(self.path))
        keys, names, offsets, sizes = self._keys(), [], array("q"), array("q")
        for row, record in enumerate(self._records(file)):
            names.append(keys.take(_id(record.value), row))
            offsets.append(record.offset)
            sizes.append(len(record.text))
        return file, names, offsets, sizes

    def _records(self, file: BinaryIO) -> Iterator[_Record]:
        return _lines(self.path, file) if self._lines else _ListReader(self.path, file).records()

    def _sample(self, key: str, row: int, record: _Record, limit: int) -> RawSample:
        members: dict[str, bytes] = {}
        try:
            if record.problem:
                raise BadFile(record.problem)
            members["json"] = record.text
            name = _image_name(record.value)
            image = read_file(f"{self._images}/{name}", name, limit)
            members[image_extension(image, name)] = image
        except BadFile as bad:
            return RawSample(key, row, None, None, members, str(bad))
        return RawSample(key, row, None, None, members, None)


def _id(record: Any) -> Any:
    return record.get("id") if isinstance(record, dict) else None


def _image_name(record: Any) -> str:
    """The name of a record's image, relative to the folder; raises `BadFile` for one that may lead out of it."""
    if not isinstance(record, dict):
        raise BadFile(f"not a record: a {type(record).__name__}, no object")
    name = record.get("image")
    if isinstance(name, list):
        if len(name) != 1:
            raise BadFile(f"{len(name)} images: one per sample is expected")
        name = name[0]
    if name is None or name == "":
        raise BadFile("no image: the record has no 'image'")
    if not isinstance(name, str):
        raise BadFile(f"bad image name: a {type(name).__name__}, no text")
    if name.startswith(("/", "\\")) or name[1:2] == ":" or "://" in name:
        raise BadFile(f"bad image name: {name!r} is not relative to the folder of images")
    if ".." in name.replace("\\", "/").split("/"):
        raise BadFile(f"bad image name: {name!r} leads out of the folder of images")
    return name


# --- records of a file -----------------------------------------------------------------------


def _lines(shard: str, file: BinaryIO) -> Iterator[_Record]:
    """The lines of a JSONL file; one that is not JSON is a record with a problem."""
    offset = 0
    while line := file.readline(MAX_RECORD):
        if len(line) == MAX_RECORD:
            raise ShardError(
                shard, f"has a line of more than {MAX_RECORD:,} bytes, which is not a record; it begins", offset=offset
            )
        text = line.strip().removeprefix(codecs.BOM_UTF8)
        if text:
            try:
                yield _Record(offset + line.index(text), text, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield _Record(offset, b"null", None, f"unreadable json: {str(error)[:80]}")
        offset += len(line)


class _ListReader:
    """A JSON list of any length as a stream: a window of text over the file, and the byte at which it stands."""

    def __init__(self, shard: str, file: BinaryIO) -> None:
        self._shard, self._file = shard, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._offset = 0

    def records(self) -> Iterator[_Record]:
        """The elements in order; raises `ShardError` for a file that is not a list, or is cut or damaged."""
        if self._next() == "\ufeff":
            self._step(1)
        first = self._next()
        if first != "[":
            what = "is empty" if not first else "holds an object" if first == "{" else "is not JSON"
            hint = "; if it has a record a line, call it .jsonl" if first == "{" else ""
            raise ShardError(self._shard, f"{what}, where {_WANTED} is expected{hint}")
        self._step(1)
        if self._next() != "]":
            yield self._element()
            while self._next() == ",":
                self._step(1)
                self._next()
                yield self._element()
        if self._next() != "]":
            raise self._damaged()
        self._step(1)
        if self._next():
            raise self._damaged()

    def _next(self) -> str:
        """The next character that is not a space, or nothing at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._step(1)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _element(self) -> _Record:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):  # damaged, or not all of it is here yet
                if len(self._text) - self._at > MAX_RECORD or not self._more():
                    raise self._damaged() from None
                continue
            if end < len(self._text) or not self._more():  # a number may go on
                offset = self._offset
                return _Record(offset, self._step(end - self._at), value)

    def _step(self, n: int) -> bytes:
        """Move on by `n` characters, which are returned as bytes."""
        passed = self._text[self._at : self._at + n].encode()
        self._at += n
        self._offset += len(passed)
        return passed

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self._ended:
            return False
        try:
            chunk = self._file.read(_CHUNK)
            self._ended = not chunk
            self._text = self._text[self._at :] + self._decoder.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise ShardError(
                self._shard, f"is not UTF-8 ({error.reason}), after the record that begins", offset=self._offset
            ) from error
        self._at = 0
        return not self._ended

    def _damaged(self) -> ShardError:
        if self._ended and self._at >= len(self._text):
            return ShardError(
                self._shard, "is truncated, fetch it again: the list does not end; it stops", offset=self._offset
            )
        return ShardError(
            self._shard, "is damaged or truncated: no valid JSON from the record or separator", offset=self._offset
        )
