"""Byte ranges: few requests, no byte more than near gaps, and the right bytes in the order asked for."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mmfilter.core.input import ranges
from mmfilter.core.input.ranges import OpenShards, coalesce, read_ranges, stream_remote
from mmfilter.core.input.shards import open_source
from mmfilter.core.input.sources.webdataset_tar import WebdatasetTar
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.selection.select_settings import SelectSettings
from mmfilter.errors import ShardError
from mmfilter.ops.select import select
from tests.conftest import good, write_tar
from tests.runs import add_table, make_run, make_shard


class Counted(MemoryFileSystem):
    """Files in memory that count what is read of them."""

    protocol = "counted"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    requests: list[int] = []  # noqa: RUF012
    whole_files = False

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("counted://"))  # noqa: SLF001 (fsspec's)

    def _open(self, path, mode="rb", **settings):
        return (
            super()._open(path, mode, **settings) if mode == "wb" else CountedFile(super()._open(path).getvalue(), self)
        )


class CountedFile(io.BytesIO):
    def __init__(self, content: bytes, filesystem: Counted) -> None:
        super().__init__(content)
        self.size, self._filesystem = len(content), filesystem

    def read(self, size: int | None = -1) -> bytes:
        content = self.getvalue() if self._filesystem.whole_files else super().read(size)
        self._filesystem.requests.append(len(content))
        return content


A, B = WebdatasetTar("a"), WebdatasetTar("b")


fsspec.register_implementation("counted", Counted, clobber=True)


@pytest.fixture
def counted():
    """Write a file; its URL. Counting begins anew."""
    filesystem = fsspec.filesystem("counted")
    filesystem.store.clear()
    filesystem.whole_files = False

    def write(name: str, content: bytes) -> str:
        filesystem.pipe_file(f"/{name}", content)
        filesystem.requests.clear()
        return f"counted:///{name}"

    yield write
    filesystem.whole_files = False


def requests() -> list[int]:
    return fsspec.filesystem("counted").requests


@pytest.mark.parametrize("seed", range(20))
def test_requests_cover_every_range_and_join_near_ones(seed, monkeypatch):
    monkeypatch.setattr(ranges, "MAX_REQUEST", 1 << 20)
    randomness = random.Random(seed)
    asked = [
        (
            randomness.choice([A, B]),
            randomness.randrange(4 << 20),
            randomness.choice([1, 512, 10_000, 300_000, 1 << 20]),
        )
        for _ in range(randomness.randrange(40))
    ]
    made, places = coalesce(asked)
    for (shard, offset, nbytes), (number, start) in zip(asked, places, strict=True):
        other, begin, length = made[number]
        assert (shard, offset) == (other, begin + start) and start + nbytes <= length
    assert all(length <= ranges.MAX_REQUEST for _, _, length in made)
    for (shard, begin, length), (other, following, size) in itertools.pairwise(made):
        assert (
            shard != other
            or following > begin + length + ranges.MAX_GAP
            or following + size - begin > ranges.MAX_REQUEST
        ), "could have been joined"
    for shard, begin, length in made:
        end = begin
        for a, b in sorted(
            (o, o + n) for other, o, n in asked if other == shard and begin <= o and o + n <= begin + length
        ):
            assert a - end <= ranges.MAX_GAP, "a gap that is not worth reading"
            end = max(end, b)
        assert end == begin + length


def test_bytes_come_back_in_the_order_asked_for(counted, tmp_path):
    content = random.Random(0).randbytes(3 << 20)
    (tmp_path / "local").write_bytes(content[::-1])
    url, local = WebdatasetTar(counted("a", content)), WebdatasetTar(str(tmp_path / "local"))
    randomness = random.Random(1)
    asked = [
        (
            randomness.choice([url, local]),
            randomness.randrange(2 << 20),
            randomness.randrange(1, 100_000),
        )
        for _ in range(50)
    ]
    with OpenShards() as sources:
        found = list(read_ranges(sources, asked))
    assert found == [
        (content if shard == url else content[::-1])[offset : offset + nbytes] for shard, offset, nbytes in asked
    ]


def test_a_stream_holds_a_bounded_number_of_bytes(counted, monkeypatch):
    monkeypatch.setattr(ranges, "AT_ONCE", 1 << 20)
    monkeypatch.setattr(ranges, "MAX_REQUEST", 256 << 10)
    monkeypatch.setattr(ranges, "_RANGES_AT_ONCE", 3)
    content = random.Random(0).randbytes(5 << 20)
    url = WebdatasetTar(counted("a", content))
    pieces = stream_remote([(url, 0, 3 << 20), (url, 4 << 20, 100), (url, (4 << 20) + 100, 100)])
    assert len(next(pieces)) == 256 << 10
    assert sum(requests()) == 3 * (256 << 10), "no more than a batch has been read"
    assert b"".join([content[: 256 << 10], *pieces]) == content[: 3 << 20] + content[4 << 20 : (4 << 20) + 200]
    assert max(requests()) <= 256 << 10


@pytest.fixture
def remote_run(counted, tmp_path) -> tuple[Path, bytes]:
    """A run over one remote shard of 400 samples of some 6 KB; and its bytes."""
    make_shard(tmp_path / "x.tar", [f"k{i:03d}" for i in range(400)])
    content = (tmp_path / "x.tar").read_bytes()
    url = counted("x.tar", content)
    make_run(tmp_path / "run", {str(tmp_path / "x.tar"): [(i * 37 % 400) / 400 for i in range(400)]})
    now = open_source(url).stamp()
    rows = pq.read_table(RunDirectory(tmp_path / "run").scores("x-0")).to_pylist()
    add_table(tmp_path / "run", "x-0", url, [row | {"shard": url} for row in rows], size=now.size, etag=now.etag)
    (tmp_path / "x.tar").unlink()
    requests().clear()
    return tmp_path / "run", content


@pytest.mark.parametrize("form", ["shards", "tar"])
def test_of_a_remote_shard_only_what_is_kept_is_read(remote_run, tmp_path, form):
    run, content = remote_run
    selection = select(run, SelectSettings(top="4", format=form, output=tmp_path / "best"))
    assert len(requests()) == 4
    assert sum(requests()) == selection.nbytes_written - 1024, "not a byte more than is written"
    assert sum(requests()) < len(content) / 40
    rows = pq.read_table(RunDirectory(run).scores("x-0")).to_pylist()
    best = sorted(sorted(rows, key=lambda row: -row["similarity"])[:4], key=lambda row: row["row"])
    written = tmp_path / ("best/00000000.tar" if form == "shards" else "best")
    assert written.read_bytes() == b"".join(
        content[row["offset"] : row["offset"] + row["nbytes"]] for row in best
    ) + bytes(1024)


def test_copies_of_remote_samples_get_keys_of_their_own(remote_run, tmp_path):
    run, content = remote_run
    select(run, SelectSettings(top="2", repeat="2", output=tmp_path / "best"))
    rows = pq.read_table(RunDirectory(run).scores("x-0")).to_pylist()
    keys = [
        row["key"] for row in sorted(sorted(rows, key=lambda row: -row["similarity"])[:2], key=lambda row: row["row"])
    ]
    (tmp_path / "x.tar").write_bytes(content)
    source = {sample.key: sample.members for sample in open_source(str(tmp_path / "x.tar")).samples()}
    found = {sample.key: sample.members for sample in open_source(str(tmp_path / "best/00000000.tar")).samples()}
    assert found == {key: source[key] for key in keys} | {f"{key}-2": source[key] for key in keys}


def test_near_samples_share_a_request(remote_run, tmp_path):
    run, content = remote_run
    select(run, SelectSettings(top="100%", where="row % 2 = 0", output=tmp_path / "best"))
    assert len(requests()) == 1 and sum(requests()) <= len(content)
    select(run, SelectSettings(top="100%", output=tmp_path / "all", shuffle=3))
    assert len(requests()) == 2, "in whatever order they are written"


def test_other_formats_read_remote_shards_in_the_same_way(tmp_path, counted):
    source = write_tar(tmp_path / "y.tar", [member for i in range(60) for member in good(f"{i:02d}", i)])
    url = counted("y.tar", source.read_bytes())
    make_run(tmp_path / "run", {str(source): [i / 60 for i in range(60)]})
    now = open_source(url).stamp()
    rows = pq.read_table(RunDirectory(tmp_path / "run").scores("y-0")).to_pylist()
    add_table(tmp_path / "run", "y-0", url, rows, size=now.size, etag=now.etag)
    requests().clear()
    select(tmp_path / "run", SelectSettings(top="3", format="parquet", output=tmp_path / "best"))
    assert sum(requests()) == sum(row["nbytes"] for row in rows[-3:]) and len(requests()) == 1
    pairs = pq.read_table(tmp_path / "best/data/00000000.parquet").to_pylist()
    assert [(pair["key"], pair["image"]["bytes"]) for pair in pairs] == [
        (f"{i:02d}", good("x", i)[0][1]) for i in (57, 58, 59)
    ]


def test_a_server_that_gives_whole_files(remote_run, tmp_path):
    fsspec.filesystem("counted").whole_files = True
    message = r"^shard 'counted:///x\.tar' comes from a server that gives the whole file for a byte range; download it, and score the local file$"
    with pytest.raises(ShardError, match=message):
        select(remote_run[0], SelectSettings(top="4", output=tmp_path / "best"))
    assert not (tmp_path / "best").exists()


def test_what_a_remote_shard_can_lack(counted):
    url = WebdatasetTar(counted("short", b"x" * 1000))
    with OpenShards() as sources:
        with pytest.raises(
            ShardError,
            match=r"^shard 'counted:///short' has become shorter since it was scored: score it again; it ends at byte 1,000$",
        ):
            list(read_ranges(sources, [(url, 512, 1024)]))
        with pytest.raises(ShardError, match=r"^shard 'counted:///none' does not exist; check the URL$"):
            list(read_ranges(sources, [(url, 0, 10), (WebdatasetTar("counted:///none"), 512, 1024)]))


def test_a_local_shard_that_ends_early(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 1000)
    with (
        OpenShards() as sources,
        pytest.raises(
            ShardError, match=r"/short' has become shorter since it was scored: score it again; it ends at byte 1,000$"
        ),
    ):
        list(read_ranges(sources, [(WebdatasetTar(str(tmp_path / "short")), 512, 1024)]))
