"""Searching by key and by feature against brute force over all codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from mmfilter.errors import SelectionError
from mmfilter.ops.search import search
from mmfilter.ops.search_settings import SearchSettings
from tests.codes import Sample, clustered, dense, first_of_group, write_run


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [dataclasses.replace(sample, key=f"{i:05d}") for i, sample in enumerate(clustered(500, seed=20))]


@pytest.fixture(scope="module")
def run(samples, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("search") / "run", samples)


@pytest.mark.parametrize("on", ["both", "image", "text"])
def test_the_nearest_are_those_of_brute_force(run, samples, quiet, on):
    sides = {"both": ("image", "text")}.get(on, (on,))
    cosines = np.mean([dense(samples, side) @ dense(samples, side).T for side in sides], axis=0)
    cosines = cosines[:, first_of_group(samples, "both")]  # the codes of the first stand for all with its hashes
    scored = np.array([sample.score is not None for sample in samples])
    for i in [3, 50, 100, 200, 300]:
        assert scored[i]
        hits = search(run, SearchSettings(key=f"{i:05d}", on=on, n=5), quiet)
        others = [j for j in np.argsort(-cosines[i], kind="stable") if scored[j] and j != i]
        close = [cosines[i, j] for j in others[:5] if cosines[i, j] > 0.3]  # what is far from all the index may miss
        assert [hit.measures["cosine"] for hit in hits[: len(close)]] == pytest.approx(close, abs=1e-6) and len(
            hits
        ) == 5
        for hit in hits:
            sample = samples[int(hit.key)]
            assert (hit.shard, hit.row, hit.scores["similarity"]) == (sample.shard, sample.row, sample.score)
            assert hit.measures.keys() == {"cosine", *sides} and hit.scores["saev"] is None


def test_exact_duplicates_are_found_with_their_first(tmp_path, quiet):
    base = clustered(60, seed=21, share=0)
    twins = [dataclasses.replace(base[5], key=f"twin{i}", shard="/data/t.tar", row=i, score=0.5) for i in range(3)]
    base[5] = dataclasses.replace(base[5], key="one", score=0.1)
    hits = search(write_run(tmp_path / "run", base + twins), SearchSettings(key="one", n=4), quiet)
    assert [hit.key for hit in hits[:3]] == ["twin0", "twin1", "twin2"] and [
        hit.measures["cosine"] for hit in hits[:3]
    ] == [1, 1, 1]
    assert hits[3].measures["cosine"] < 0.9


@pytest.mark.parametrize("on", ["both", "image", "text"])
def test_the_strongest_are_those_of_brute_force(run, samples, quiet, on):
    feature = 137
    sides = {"both": ("image", "text")}.get(on, (on,))
    maxima = {
        s.key: max(2 * getattr(s, side).get(feature, 0) for side in sides) for s in samples if s.score is not None
    }
    wanted = sorted((value for value in maxima.values() if value > 0), reverse=True)[:7]
    hits = search(run, SearchSettings(feature=feature, on=on, n=7), quiet)
    assert [max(hit.measures[side] for side in sides) for hit in hits] == pytest.approx(wanted, rel=1e-3) and len(
        hits
    ) == 7
    for hit in hits:
        sample = samples[int(hit.key)]
        assert hit.measures == {
            side: pytest.approx(2 * getattr(sample, side).get(feature, 0), rel=1e-3) for side in ("image", "text")
        }


def test_what_is_not_there_is_named(run, samples, quiet, tmp_path):
    def error(**settings) -> str:
        with pytest.raises(SelectionError) as caught:
            search(run, SearchSettings(**settings), quiet)
        return str(caught.value)

    nothing_or_much = "say what to look for, one of: --key KEY, --image FILE and/or --text WORDS, --feature NUMBER"
    assert (
        error()
        == error(key="1", feature=1)
        == error(key="1", text="x")
        == error(image=Path("a.jpg"), feature=1)
        == nothing_or_much
    )
    assert (
        error(image=Path("a.jpg"), on="text")
        == "--on text has nothing to compare with: the query is --image FILE alone"
    )
    assert error(text="x", on="image") == "--on image has nothing to compare with: the query is --text WORDS alone"
    assert error(feature=1, shard="x") == "--shard says which sample a --key means; give both"
    assert error(key="1", n=0) == "--number is 0; at least 1 is needed"
    assert error(key="0003") == f"there is no sample with key '0003' in run {str(run)!r}; did you mean '00003'?"
    assert error(key="nobody's") == f'there is no sample with key "nobody\'s" in run {str(run)!r}'
    assert (
        error(key="00003", shard="s9.tar")
        == f"there is no sample with key '00003' in a shard that ends with 's9.tar' of run {str(run)!r}"
    )
    assert error(text="x") == "an image or words need a model that turns them into codes, and none was given"
    assert error(feature=600) == "--feature 600 is not a feature of this run's SAE, which has features 0 to 599"
    bad = next(sample.key for sample in samples if sample.score is None)
    assert error(key=bad) == f"the sample with key '{bad}' has no codes: it could not be scored"


def test_a_key_in_two_shards_asks_which(tmp_path, quiet):
    samples = clustered(40, seed=22, share=0)
    twice = [
        dataclasses.replace(samples[i], key="k", shard=f"/data/{name}.tar", row=0, score=0.5)
        for i, name in enumerate("ab")
    ]
    run = write_run(tmp_path / "run", samples + twice)
    with pytest.raises(SelectionError) as caught:
        search(run, SearchSettings(key="k"), quiet)
    assert (
        str(caught.value)
        == "key 'k' is there 2 times, in '/data/a.tar', '/data/b.tar': say which with --shard, the end of its path"
    )
    assert search(run, SearchSettings(key="k", shard="b.tar", n=3), quiet)[0].shard != "/data/b.tar"
    run = write_run(
        tmp_path / "again", [dataclasses.replace(sample, shard="/data/c.tar", row=i) for i, sample in enumerate(twice)]
    )
    with pytest.raises(
        SelectionError, match=r"key 'k' is there 2 times in shard '/data/c\.tar', so it does not name one sample"
    ):
        search(run, SearchSettings(key="k"), quiet)
