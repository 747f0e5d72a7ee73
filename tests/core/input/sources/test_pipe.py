"""Commands as input: only when allowed, read once, and held to their exit status."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from mmfilter.core.input.places import Stamp
from mmfilter.core.input.shards import expand, open_source
from mmfilter.core.input.source import InputOptions
from mmfilter.core.run.directory import RunDirectory, name_shards
from mmfilter.errors import ShardError

ALLOWED = InputOptions(allow_pipe=True)
REFUSED = "is a command and would run a shell; run it yourself and pipe its output in: COMMAND | mmfilter score -, or allow it with --allow-pipe"


def error_of(shard: str) -> str:
    with pytest.raises(ShardError) as caught:
        list(open_source(shard, ALLOWED).samples())
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"shard {shard!r} ", "", 1)


def test_a_command_is_refused_unless_allowed(make_shard, tmp_path):
    shard = f"pipe:touch {tmp_path}/ran; cat {make_shard()}"
    for refused in (lambda: expand([shard]), lambda: list(open_source(shard).samples())):
        with pytest.raises(ShardError) as caught:
            refused()
        assert str(caught.value) == f"shard {shard!r} {REFUSED}"
    assert not (tmp_path / "ran").exists()


def test_samples_are_those_of_the_tar(make_shard):
    path = make_shard(n=5)
    [shard] = expand([f"pipe:cat {path} | cat"], ALLOWED)
    assert list(open_source(shard, ALLOWED).samples()) == list(open_source(str(path)).samples())
    assert open_source(shard).stamp() == Stamp()


def test_braces_are_a_range_and_names_come_from_the_tar(tmp_path):
    shards = expand(["pipe:cat /data/{00000..00002}.tar", "pipe:make-a-tar"], ALLOWED)
    assert shards == [
        "pipe:cat /data/00000.tar",
        "pipe:cat /data/00001.tar",
        "pipe:cat /data/00002.tar",
        "pipe:make-a-tar",
    ]
    names = [
        shard.name for shard in name_shards([open_source(shard, ALLOWED) for shard in shards], RunDirectory(tmp_path))
    ]
    assert names[:3] == ["pipe-00000", "pipe-00001", "pipe-00002"] and len(names[3]) == len("pipe-01234567")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exit 3", "failed with exit status 3; run the command by itself to see why"),
        (
            "cat {tar}; echo one >&2; echo two >&2; exit 1",
            "failed with exit status 1 (two); run the command by itself to see why",
        ),
        ("head -c 3000 {tar}; exit 4", "failed with exit status 4; run the command by itself to see why"),
        ("true", "is empty (0 bytes); a tar without samples still has 1,024 bytes, fetch it again"),
        ("yes | head -c 100000", "is not a tar: it does not begin with a tar header"),
        (
            "no-such-program",
            "failed with exit status 127 (/bin/sh: 1: no-such-program: not found); run the command by itself to see why",
        ),
        ("kill -9 $$", "failed with exit status -9; run the command by itself to see why"),
    ],
)
def test_a_command_that_fails_says_so(make_shard, command, message):
    assert error_of("pipe:" + command.format(tar=make_shard(n=3))) == message


def test_a_reader_that_stops_early_stops_the_command(make_shard):
    tar: Path = make_shard(n=3)
    started = time.monotonic()
    samples = open_source(f"pipe:cat {tar} {tar}; yes", ALLOWED).samples()
    assert [raw.key for raw in itertools.islice(samples, 2)] == ["000000000", "000000001"]
    samples.close()
    assert time.monotonic() - started < 5
