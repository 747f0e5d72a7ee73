"""The sample of pairs: which ones, why others are not in it, and that it gives back what it took."""

from __future__ import annotations

import json

import pytest

from mmfilter.core.input.decode import DecodeSettings, decode
from mmfilter.core.input.shards import open_source, open_sources
from mmfilter.core.pipeline import pair_sample as module
from mmfilter.core.pipeline.pair_sample import CAPTION, PairSample
from tests.conftest import caption, good, picture, write_tar


def gathered(shards, wanted, progress, caption_from="auto") -> PairSample:
    sample = PairSample()
    sample.gather(open_sources(shards), wanted, DecodeSettings(caption_from), workers=2, progress=progress)
    return sample


def test_heads_of_shards_spread_over_the_input(make_shard, quiet):
    shards = [make_shard(f"{i:05d}.tar", n=6, seed=10 * i) for i in range(12)]
    with gathered(shards, 20, quiet) as sample:
        assert sample.shards == [str(shards[i]) for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)]
        assert [pair.caption for pair in sample.pairs] == [
            caption(10 * i + j) for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10) for j in (0, 1)
        ]
        assert (len(sample), sample.n_read, quiet.samples) == (20, 20, 20)


def test_bad_samples_are_counted_and_broken_shards_kept_up_to_the_break(make_shard, quiet):
    extra = [("x1.jpg", b"no image"), ("x1.txt", b"a"), ("x2.jpg", picture(1)), ("x2.txt", b""), ("x3.txt", b"words")]
    shard, other = make_shard(n=3, extra=extra), make_shard("1.tar", n=8, seed=50)
    other.write_bytes(other.read_bytes()[:20_000])
    with gathered([shard, other], 40, quiet) as sample:
        assert sample.reasons == {"image cannot be decoded": 1, "empty caption": 1, "no image": 1}
        assert [error.shard for error in sample.failures] == [str(other)]
        assert sample.pairs[:3] == [
            pair for pair in sample.pairs if pair.key.startswith("00000000") and pair.caption in map(caption, range(3))
        ]
        assert 3 < len(sample) < 11 and sample.n_read == len(sample) + 3


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_pairs_come_back_as_they_were_and_with_other_captions(make_shard, quiet, monkeypatch, memory):
    monkeypatch.setattr(module, "MEMORY_BYTES", memory)
    with gathered([make_shard(n=5)], 5, quiet) as sample:
        again = list(sample.read([3, 0]))
        assert [(raw.row, raw.members["jpg"], raw.members[CAPTION].decode("utf-8-sig")) for raw in again] == [
            (0, picture(3), caption(3)), (1, picture(0), caption(0)),
        ]  # fmt: skip
        exchanged = list(sample.read([1, 1], ["one", "other"]))
        assert [(raw.members["jpg"], raw.members[CAPTION].decode("utf-8-sig")) for raw in exchanged] == [
            (picture(1), "one"),
            (picture(1), "other"),
        ]
        assert sample.nbytes([3, 0]) == len(picture(3)) + len(picture(0))


def test_captions_survive_the_round_trip(tmp_path, quiet):
    """Wherever they come from, and with whatever in them."""
    odd = ["\ufeffa mark in front", "two\nlines", "naïve 猫 🐈", "<image> </s>"]
    members = [
        member
        for i, text in enumerate(odd)
        for member in ((f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps({"alt": text}).encode()))
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    with gathered([shard], 10, quiet, "alt") as sample:
        assert [pair.caption for pair in sample.pairs] == odd
        assert [decode(raw, "", DecodeSettings(CAPTION)).caption for raw in sample.read(range(4))] == odd


def test_images_are_bounded(make_shard, quiet, monkeypatch):
    shard = make_shard(n=6)
    sizes = [len(raw.members["jpg"]) for raw in open_source(str(shard)).samples()]
    monkeypatch.setattr(module, "DISK_BYTES", sum(sizes[:3]))
    with gathered([shard], 6, quiet) as sample:
        assert len(sample) == 3 and sum(sample.reasons.values()) == 3


def test_extensions_keep_their_own(tmp_path, quiet):
    members = [("a.png", picture(0, kind="PNG")), ("a.txt", b"a png"), *good("b", 1)]
    with gathered([write_tar(tmp_path / "a.tar", members)], 5, quiet) as sample:
        assert [pair.extension for pair in sample.pairs] == ["png", "jpg"]
        assert next(sample.read([0])).members["png"] == picture(0, kind="PNG")
