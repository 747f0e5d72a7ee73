"""Cosines and sketches of sparse codes against float64 on dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfilter.core.codes import vectors
from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.vectors import Codes, SideCodes, Sketch, cosines, margin
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.scores.crossmodal import load_weights
from tests.codes import FEATURES, REFERENCE, SAMPLES, Sample, clustered, dense, write_run

IDF = np.log((1 + REFERENCE) / (1 + SAMPLES))


def codes_of(samples: list[Sample]) -> Codes:
    def side(name: str) -> SideCodes:
        features = [sorted(getattr(sample, name).items(), key=lambda item: -item[1]) for sample in samples]
        lengths = np.array([len(items) for items in features])
        flat = [item for items in features for item in items]
        return SideCodes.of_lengths(
            lengths, np.array([j for j, _ in flat], np.uint32), np.array([value for _, value in flat], np.float16)
        )

    return Codes(np.arange(len(samples)), side("image"), side("text"))


@pytest.mark.parametrize("entries", [1 << 22, 256 * 100])
def test_cosines_are_those_of_dense_float64(monkeypatch, entries):
    monkeypatch.setattr(vectors, "_ENTRIES_AT_ONCE", entries)
    samples = clustered(200, seed=1)
    codes, rng = codes_of(samples).by_feature(), np.random.default_rng(0)
    first, second = rng.integers(0, 200, (2, 5000))
    for name in ("image", "text"):
        exact = dense(samples, name) @ dense(samples, name).T
        found = cosines(getattr(codes, name), IDF, first, second)
        assert np.abs(found - exact[first, second]).max() < 1e-7
        assert found.dtype == np.float32


def test_cosines_have_the_same_bits_either_way_and_in_any_company():
    codes, rng = codes_of(clustered(300, seed=2)).by_feature(), np.random.default_rng(0)
    first, second = rng.integers(0, 300, (2, 4000))
    found = cosines(codes.image, IDF, first, second)
    assert np.array_equal(found, cosines(codes.image, IDF, second, first))
    order = rng.permutation(300)
    moved = codes.take(order).image
    where = np.argsort(order)
    assert np.array_equal(found[:50], cosines(moved, IDF, where[first[:50]], where[second[:50]]))


def test_cosines_of_a_known_pair_and_of_nothing():
    idf = np.array([1.0, 2.0, 0.0])
    side = SideCodes.of_lengths(
        np.array([2, 2, 0, 1]), np.array([0, 1, 1, 0, 2], np.uint32), np.array([3, 2, 1.5, 4, 9], np.float16)
    )
    # idf · mean: (3, 4), (4, 3), nothing, and a feature that all samples have
    assert cosines(side, idf, np.array([0, 0, 0, 2, 3]), np.array([1, 0, 2, 2, 3])).tolist() == [
        np.float32(0.96),
        1,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("sides", [("image",), ("text",), ("image", "text")])
def test_sketches_keep_the_cosine_within_the_margin(sides):
    samples = clustered(1200, seed=3)
    sketch = Sketch(IDF, sides)(codes_of(samples)).astype(np.float64)
    assert np.allclose(np.linalg.norm(sketch, axis=1), 1, atol=2e-3)
    exact = np.mean([dense(samples, name) @ dense(samples, name).T for name in sides], axis=0)
    at = np.triu(exact > 0.8, 1) & (exact < 0.99)
    error = (sketch @ sketch.T - exact)[at]
    deviation = (1 - exact[at] ** 2) / np.sqrt(256)
    assert 0.5 < (error / deviation).std() < 1.3  # the formula of `margin`
    margins = np.array([margin(cosine, 256) for cosine in exact[at]])
    assert (error < -margins).mean() < 0.002 and len(error) > 300


def test_a_sketch_depends_on_the_sample_alone():
    codes = codes_of(clustered(100, seed=4))
    sketch = Sketch(IDF, ("image", "text"))
    order = np.random.default_rng(0).permutation(100)[:30]
    assert np.array_equal(sketch(codes)[order], sketch(codes.take(order)))
    assert not np.array_equal(sketch(codes), Sketch(IDF, ("image", "text"), seed=1)(codes))
    nothing = Codes(np.arange(2), SideCodes.empty(2), SideCodes.empty(2))
    assert np.array_equal(sketch(nothing), np.zeros((2, 256), np.float32))


def test_the_rarity_is_that_of_the_score(tmp_path):
    from safetensors.numpy import load_file, save_file

    run = RunDirectory(write_run(tmp_path / "run", clustered(30)))
    zeros = {name: np.zeros(FEATURES, np.float32) for name in ("omega", "image_maximum", "text_maximum")}
    zeros |= {
        name: np.zeros(FEATURES, np.int64) for name in ("image_samples", "text_samples", "image_tokens", "text_tokens")
    }
    save_file(zeros | load_file(run.weights), run.weights, {"n_samples": str(REFERENCE), "reference": "{}"})
    theirs = load_weights(run.weights).idf
    assert torch.allclose(torch.tensor(CodeTables(ScoreTables(run)).idf).float(), theirs, atol=1e-6)


def test_codes_are_read_as_written_whole_and_in_part(tmp_path):
    samples = clustered(300, seed=5)
    run = write_run(tmp_path / "run", samples, group=20)
    tables = CodeTables(ScoreTables(RunDirectory(run)), workers=2)
    whole = Codes.concatenate([codes for codes, _ in tables.read()])
    ordered = [sample for sample in sorted(samples, key=lambda s: (s.shard, s.row)) if sample.score is not None]
    assert len(whole) == len(ordered)
    for i, sample in enumerate(ordered):
        for name in ("image", "text"):
            one = getattr(whole, name).take(np.array([i]))
            assert dict(zip(one.ids.tolist(), one.means.tolist(), strict=True)) == {
                j: float(np.float16(v)) for j, v in getattr(sample, name).items()
            }
    chosen = whole.position[np.random.default_rng(0).random(len(whole)) < 0.05]
    part, wanted = tables.take(chosen), whole.take(np.searchsorted(whole.position, chosen))
    for name in ("image", "text"):
        for array in ("starts", "ids", "means"):
            assert np.array_equal(getattr(getattr(part, name), array), getattr(getattr(wanted, name), array))
    assert np.array_equal(part.position, chosen)
