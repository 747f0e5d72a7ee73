"""Files behind URLs: any that fsspec knows, read in blocks, tried again where their client does not, and errors in one
line.

Limits: a web server that knows no byte ranges is read from its beginning, so its files go through a temporary one.
"""

from __future__ import annotations

import glob
import io
import re
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

from mmfilter.core.input.remote_errors import is_transient, knows_no_ranges, status_of, url_error
from mmfilter.errors import MissingExtra, ShardError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

BLOCK = 8 << 20
"""Bytes that are asked for at one time when a file is read from its beginning to its end"""
AT_ONCE = 32
"""Requests under way where many small ones are made"""
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before another try. S3, Google and the hub have clients that try again by themselves; plain HTTP has none."""
_QUIET = 60
"""Seconds without a byte after which a web server is given up; a transfer as a whole may take any time"""
_PATIENCE = 30
"""Seconds that a store has for its first answer"""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_WEB = ("http://", "https://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Which of our extras brings what fsspec needs for a protocol"""


def is_url(shard: str) -> bool:
    return bool(_URL.match(shard))


def is_web(url: str) -> bool:
    """Whether it is plain HTTP, where nothing is certain: listings, ETags, byte ranges."""
    return url.lower().startswith(_WEB)


def without_query(url: str) -> str:
    """The URL of a web server as far as it names a file; signatures and the like come after that."""
    return re.split("[?#]", url, maxsplit=1)[0] if is_web(url) else url


# --- asking file systems ---------------------------------------------------------------------


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it; raises `MissingExtra` or `ShardError` where there is
    none."""
    import fsspec

    protocol = url.partition("://")[0].lower()
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **(_web_options(protocol) if is_web(url) else {}))
        return filesystem, str(path)
    except ImportError as error:
        if protocol in _EXTRAS:
            raise MissingExtra(f"reading {protocol}:// URLs", _EXTRAS[protocol]) from error
        raise ShardError(url, f"needs a package that is not installed: {' '.join(str(error).split())}") from error
    except Exception as error:
        if protocol not in fsspec.available_protocols():
            raise ShardError(
                url, f"has a protocol that fsspec does not know, {protocol!r}; it knows s3, gs, https, hf and others"
            ) from error
        raise url_error(url, error) from error


def _web_options(protocol: str) -> dict[str, Any]:
    """How to talk to web servers, unless fsspec's own configuration says it: through the proxy that the environment
    names."""
    import aiohttp
    import fsspec

    if "client_kwargs" in fsspec.config.conf.get(protocol, {}):
        return {}
    return {
        "client_kwargs": {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_QUIET, sock_read=_QUIET),
            "trust_env": True,
        }
    }


def ask(url: str, call: Callable[..., _Result], *args: Any, **settings: Any) -> _Result:
    """`call(*args, **settings)`, several times where that may help; whatever it raises in the end becomes a
    `ShardError`."""
    for pause in (*_PAUSES, None):
        try:
            return call(*args, **settings)
        except ShardError:
            raise
        except Exception as error:  # remote file systems raise what they like
            if pause is None or not is_web(url) or not is_transient(error):
                raise url_error(url, error) from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def look(url: str) -> None:
    """See that a file is there, without much patience: clients try for minutes where a host takes calls and says
    nothing."""
    filesystem, path = filesystem_of(url)
    ask(url, filesystem.info, path, **({"timeout": _PATIENCE} if filesystem.async_impl else {}))


def matches(pattern: str) -> list[str]:
    """The URLs that a pattern names, sorted; web servers do not list their files, so there it is taken as it is."""
    if not glob.has_magic(pattern) or is_web(pattern):
        return [pattern]
    filesystem, path = filesystem_of(pattern)
    if filesystem.async_impl:
        ask(pattern, _look_at_root, filesystem, path)
    return [filesystem.unstrip_protocol(match) for match in sorted(ask(pattern, filesystem.glob, path))]


def _look_at_root(filesystem: Any, path: str) -> None:
    """Whether anybody answers at all; a bucket may be listed by those who may not look at it."""
    with suppress(FileNotFoundError, PermissionError):
        filesystem.info(path.split("/")[0], timeout=_PATIENCE)


def exists(url: str) -> bool:
    """Whether there is a file; one that may not be looked at counts as none where stores say so of files that are not
    there."""
    filesystem, path = filesystem_of(url)
    try:
        ask(url, filesystem.info, path)
    except ShardError as error:
        if status_of(error) in (403, 404):
            return False
        raise
    return True


def forget(urls: Iterable[str]) -> None:
    """Let file systems forget what they have listed: what they say of files is what is there now."""
    for filesystem in {id(filesystem): filesystem for filesystem, _ in map(filesystem_of, urls)}.values():
        filesystem.invalidate_cache()


def tag_of(info: dict[str, Any]) -> str | None:
    """What a store says of a file that changes when its content does: its ETag, else its time of the last change."""
    tags = (
        info.get(name)
        for name in ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "created", "blob_id")
    )
    return next((str(tag) for tag in tags if tag is not None), None)


def in_parallel(
    call: Callable[[_Item], _Result], items: Iterable[_Item], *, at_once: int = AT_ONCE
) -> Iterator[_Result]:
    """`call` of each item, in their order, up to `at_once` of them under way."""
    with ThreadPoolExecutor(at_once, "remote") as workers:
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(workers.submit(call, item))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def as_it_suits(place: str, call: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """`call` of each item, which reads small files of a place: one by one of a folder, many at a time of a URL."""
    return in_parallel(call, items) if is_url(place) else (call(item) for item in items)


# --- reading files ---------------------------------------------------------------------------


class RemoteFile(io.RawIOBase):
    """A file at a URL; every `read` is one request, tried again when it fails. Raises `ShardError`.

    Without a `size` that is known already, the store is asked for it, and sees to it that the file stays the same.
    """

    def __init__(self, url: str, size: int | None = None) -> None:
        super().__init__()
        self._url, self._at = url, 0
        self._file: Any = None
        self._filesystem, self._path = filesystem_of(url)
        if size is None or is_web(url):
            self._file = ask(url, self._filesystem.open, self._path, "rb", cache_type="none")
            size = getattr(self._file, "size", None)
        self.size: int = self._download() if size is None else size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self._range(self._at, min(self._at + len(buffer), self.size))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

    def _range(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        try:
            content = ask(self._url, self._read, start, end)
        except ShardError as error:
            if not knows_no_ranges(error):
                raise
            self._download()
            content = self._read(start, end)
        if len(content) < end - start:
            raise ShardError(self._url, "has become shorter while it was read; it ends", offset=start + len(content))
        return content

    def _read(self, start: int, end: int) -> bytes:
        if self._file is None:
            return _read_range(self._filesystem, self._path, start, end)
        self._file.seek(start)
        content: bytes = self._file.read(end - start)
        return content

    def _download(self) -> int:
        """Go on with a temporary file; its size."""
        self._file.close()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        ask(self._url, self._fill, self._file)
        return int(self._file.seek(0, io.SEEK_END))

    def _fill(self, file: BinaryIO) -> None:
        file.seek(0)
        file.truncate()
        self._filesystem.get_file(self._path, file)


def open_remote(url: str, buffering: int = BLOCK) -> BinaryIO:
    """A file at a URL, of which `buffering` bytes are asked for at one time."""
    return io.BufferedReader(RemoteFile(url), buffering)


def check_ranges(url: str) -> None:
    """Raise `ShardError` for a file on a web server that gives whole files only."""
    filesystem, path = filesystem_of(url)
    with ask(url, filesystem.open, path, "rb", cache_type="none") as file:
        if file.size is None or not _gives_ranges(url, file):
            raise ShardError(
                url,
                "comes from a server that gives whole files only, no byte ranges; download it, and score the local "
                "file",
            )


def _gives_ranges(url: str, file: Any) -> bool:
    file.seek(min(1, file.size - 1))
    try:
        ask(url, file.read, 1)
    except ShardError as error:
        if knows_no_ranges(error):
            return False
        raise
    return True


def read_start(url: str, size: int) -> bytes:
    """The first `size` bytes of a file, or all that it has."""
    with RemoteFile(url) as file:
        return file.read(min(size, file.size)) or b""


def fetch(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of remote ranges (URL, start, end), many at a time where the file system can.

    Fewer bytes come back where a shard ends before. Raises `ShardError` for the first that cannot be read.
    """
    places = [filesystem_of(url) for url, _, _ in ranges]
    found: list[Any] = [b""] * len(ranges)
    for filesystem in {id(filesystem): filesystem for filesystem, _ in places}.values():
        mine = [i for i, (other, _) in enumerate(places) if other is filesystem]
        paths, starts, ends = [places[i][1] for i in mine], [ranges[i][1] for i in mine], [ranges[i][2] for i in mine]
        if not filesystem.async_impl:
            for path, url in {places[i][1]: ranges[i][0] for i in mine}.items():
                ask(url, filesystem.info, path)  # once, not in every thread: opening it asks what is known of it then
            contents = in_parallel(partial(_ask_range, filesystem, ranges, places), mine)
        else:
            contents = ask(ranges[mine[0]][0], filesystem.cat_ranges, paths, starts, ends)
        for i, content in zip(mine, contents, strict=True):
            found[i] = content
    for i, ((url, start, end), (filesystem, path)) in enumerate(zip(ranges, places, strict=True)):
        if isinstance(found[i], BaseException):  # `cat_ranges` returns them
            found[i] = ask(url, _again, [found[i]], filesystem, path, start, end)
    return found


def _ask_range(
    filesystem: Any, ranges: Sequence[tuple[str, int, int]], places: Sequence[tuple[Any, str]], i: int
) -> bytes:
    url, start, end = ranges[i]
    return ask(url, _read_range, filesystem, places[i][1], start, end)


def _again(failed: list[BaseException], filesystem: Any, path: str, start: int, end: int) -> bytes:
    """A range whose first try has failed already: that error is raised first, so that it counts as a try."""
    if failed:
        raise failed.pop()
    return _read_range(filesystem, path, start, end)


def _read_range(filesystem: Any, path: str, start: int, end: int) -> bytes:
    """Those bytes and no others: fsspec's own way reads megabytes ahead where a client (the hub's) is not
    asynchronous."""
    if filesystem.async_impl:
        return bytes(filesystem.cat_file(path, start=start, end=end))
    with filesystem.open(path, "rb", cache_type="none") as file:
        file.seek(start)
        return bytes(file.read(end - start))
