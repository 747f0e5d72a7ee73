"""`score` end to end with the embedded model, against a float64 re-implementation on dense arrays."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.scores.crossmodal import load_weights
from mmfilter.core.scores.registry import SCORES
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import RunError, ShardError
from mmfilter.ops.score import score
from mmfilter.ops.score_settings import ScoreSettings
from tests import reference
from tests.conftest import good, picture, write_tar


def run_score(card, shards, run, progress, **options):
    return score([str(shard) for shard in shards], ScoreSettings(model=card, run=run, **options), progress)


def rows_of(run: Path, name: str = "00000") -> list[dict]:
    return pq.read_table(run / "scores" / f"{name}.parquet").to_pylist()


def columns_of(run: Path, name: str = "00000") -> np.ndarray:
    table = pq.read_table(run / "scores" / f"{name}.parquet")
    return np.stack([table[column].to_numpy() for column in SCORES])


def states_and_codes(backbone, sae, shard: Path, n: int):
    """Per pair the float64 states and dense codes of (image, text), each pair run alone."""
    import tarfile

    tensors = {
        name: getattr(sae, name).double().numpy()
        for name in ("W_enc", "b_enc", "b_dec", "threshold")
        if getattr(sae, name) is not None
    }
    states, codes = [], []
    with tarfile.open(shard) as tar:
        for i in range(n):
            image = Image.open(io.BytesIO(tar.extractfile(f"{i:09d}.jpg").read())).convert("RGB")
            caption = tar.extractfile(f"{i:09d}.txt").read().decode()
            got = backbone.activations(backbone.prepare([image], [caption]))
            sides = tuple(got.states[got.side == side].double().numpy() for side in (IMAGE, TEXT))
            states.append(sides)
            codes.append(
                tuple(reference.dense_codes(side, tensors, k=sae.k, subtract=sae.subtract_b_dec) for side in sides)
            )
    return states, codes


@pytest.mark.parametrize(
    "fitted",
    [
        pytest.param(False, id="card's weights"),
        pytest.param(True, id="weights fitted on the input", marks=pytest.mark.slow),
    ],
)
def test_scores_equal_the_float64_reference(tiny, make_shard, tmp_path, quiet, fitted):
    card, backbone, sae = tiny
    n = 130 if fitted else 40
    shard = make_shard(n=n)
    card = replace(card, weights=None if fitted else card.weights, threshold=0.4)
    summary = run_score(card, [shard], tmp_path / "run", quiet)
    assert (summary.n_samples, summary.n_scored, summary.n_shards) == (n, n, 1)

    states, codes = states_and_codes(backbone, sae, shard, n)
    weights = load_weights(tmp_path / "run" / "weights.safetensors")
    omega, idf = weights.omega.numpy(), weights.idf.double().numpy()
    if fitted:
        wanted_omega, wanted_idf = reference.crossmodal(states, codes)
        assert weights.n_weighted == (~np.isnan(wanted_omega)).sum() > 10
        np.testing.assert_allclose(omega, wanted_omega, atol=1e-5)
        np.testing.assert_allclose(idf, wanted_idf, atol=1e-6)
    for row, side_states, side_codes in zip(rows_of(tmp_path / "run"), states, codes, strict=True):
        wanted = reference.pair_scores(*side_states, *side_codes, omega, idf, 0.4)
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-5), row["key"]
        assert (row["n_image_tokens"], row["n_text_tokens"]) == (len(side_codes[0]), len(side_codes[1]))


def test_rows_say_where_the_sample_is(tiny, make_shard, tmp_path, quiet):
    shard = make_shard(n=3)
    run_score(tiny[0], [shard], tmp_path / "run", quiet)
    content = shard.read_bytes()
    for i, row in enumerate(rows_of(tmp_path / "run")):
        assert (row["key"], row["shard"], row["row"], row["ok"], row["reason"]) == (
            f"{i:09d}",
            str(shard),
            i,
            True,
            None,
        )
        assert (row["uid"], row["width"], row["height"]) == (f"{i:032x}", 96, 80)
        piece = content[row["offset"] : row["offset"] + row["nbytes"]]
        assert piece[:100].rstrip(b"\0").decode() == f"{i:09d}.jpg"
        assert picture(i) in piece


def test_codes_are_the_strongest_features(tiny, make_shard, tmp_path, quiet):
    card, backbone, sae = tiny
    shard = make_shard(n=4)
    run_score(card, [shard], tmp_path / "run", quiet)
    _, codes = states_and_codes(backbone, sae, shard, 4)
    for row, sides in zip(pq.read_table(tmp_path / "run" / "codes" / "00000.parquet").to_pylist(), codes, strict=True):
        for side, dense in zip(("image", "text"), sides, strict=True):
            ids = row[f"{side}_ids"]
            assert len(ids) == min(256, int((dense.max(0) > 0).sum()))
            np.testing.assert_allclose(row[f"{side}_max"], dense.max(0)[ids], rtol=2e-3)
            np.testing.assert_allclose(row[f"{side}_mean"], dense.mean(0)[ids], rtol=2e-3, atol=1e-6)
            assert row[f"{side}_max"] == sorted(row[f"{side}_max"], reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 7}, {"workers": 1}, {"workers": 4, "batch_size": 32}], ids=str
)
def test_batch_size_and_workers_change_nothing(tiny, make_shard, tmp_path, quiet, options):
    shard = make_shard(n=60)
    run_score(tiny[0], [shard], tmp_path / "default", quiet)
    run_score(tiny[0], [shard], tmp_path / "other", quiet, **options)
    np.testing.assert_allclose(columns_of(tmp_path / "other"), columns_of(tmp_path / "default"), rtol=1e-6, atol=1e-5)


def test_text_context_none_leaves_image_states_alone(tiny, make_shard, tmp_path, quiet):
    card = replace(tiny[0], weights=None)
    shard = make_shard(n=12)
    run_score(card, [shard], tmp_path / "image", quiet)
    run_score(replace(card, text_context="none"), [shard], tmp_path / "none", quiet)
    with_image, without = (columns_of(tmp_path / name) for name in ("image", "none"))
    at = {name: i for i, name in enumerate(SCORES)}
    np.testing.assert_allclose(with_image[at["l1_image"]], without[at["l1_image"]], atol=1e-4)
    assert np.abs(with_image[at["l1_text"]] - without[at["l1_text"]]).min() > 0


def test_a_second_run_goes_on_where_the_first_stopped(tiny, make_shard, tmp_path, quiet):
    first, second = make_shard("00000.tar", n=5), make_shard("00001.tar", n=5, seed=50)
    run = tmp_path / "run"
    assert run_score(tiny[0], [first], run, quiet).n_shards == 1
    before = (run / "scores" / "00000.parquet").stat().st_mtime_ns
    summary = run_score(tiny[0], [first, second], run, quiet)
    assert (summary.n_shards, summary.n_skipped) == (1, 1)
    assert (run / "scores" / "00000.parquet").stat().st_mtime_ns == before
    assert [item["name"] for item in json.loads((run / "manifest.json").read_text())["inputs"]] == ["00000", "00001"]

    make_shard("00000.tar", n=6)  # the input changed: it is scored again
    summary = run_score(tiny[0], [first, second], run, quiet)
    assert (summary.n_shards, summary.n_new, summary.n_samples, summary.n_skipped) == (1, 6, 11, 1)


def test_other_settings_are_refused(tiny, make_shard, tmp_path, quiet):
    shard = make_shard(n=2)
    run_score(tiny[0], [shard], tmp_path / "run", quiet)
    with pytest.raises(RunError) as error:
        run_score(replace(tiny[0], threshold=9.0), [shard], tmp_path / "run", quiet)
    assert f"threshold was {tiny[0].threshold}, is now 9.0" in str(error.value) and "use another --run" in str(
        error.value
    )


def test_shards_of_the_same_name_keep_apart(tiny, make_shard, tmp_path, quiet):
    one = make_shard(n=2)
    other = write_tar(tmp_path / "00000.tar", good("x", 7))
    summary = run_score(tiny[0], [one, other], tmp_path / "run", quiet)
    assert summary.n_shards == 2
    tables = sorted((tmp_path / "run" / "scores").iterdir())
    assert {read_table_metadata(path)["shard"] for path in tables} == {str(one), str(other)}


def test_limit_counts_over_all_shards(tiny, make_shard, tmp_path, quiet):
    shards = [make_shard(f"0000{i}.tar", n=4, seed=9 * i) for i in range(3)]
    summary = run_score(tiny[0], shards, tmp_path / "run", quiet, limit=6)
    assert (summary.n_samples, summary.n_shards) == (6, 2)
    assert run_score(tiny[0], shards, tmp_path / "run", quiet, limit=6).n_new == 0


BAD = {
    "no pixels": ([("b.jpg", b""), ("b.txt", b"x")], "image is empty"),
    "not an image": ([("b.jpg", b"hello"), ("b.txt", b"x")], "image cannot be decoded: it is no JPEG, PNG or WebP"),
    "cut": ([("b.jpg", picture(1)[:900]), ("b.txt", b"x")], "image cannot be decoded"),
    "1x1": ([("b.png", picture(1, size=(1, 1), kind="PNG")), ("b.txt", b"x")], "image is 1×1 pixels"),
    "bomb": (
        [("b.png", picture(1, size=(9000, 9000), kind="PNG", mode="1")), ("b.txt", b"x")],
        "image has 9000×9000 pixels, more than 64,000,000",
    ),
    "no caption": ([("b.jpg", picture(1))], "no caption"),
    "no image": ([("b.txt", b"x")], "no image"),
    "empty caption": ([("b.jpg", picture(1)), ("b.txt", b" \n ")], "empty caption"),
    "latin-1": (
        [("b.jpg", picture(1)), ("b.txt", "caf\xe9".encode("latin-1"))],
        "caption is not UTF-8: byte 3 of the txt is 0xe9",
    ),
    "long": ([("b.jpg", picture(1)), ("b.txt", b"word " * 20_000)], "caption has 99,999 characters, more than 20,000"),
    "many tokens": (
        [("b.jpg", picture(1)), ("b.txt", b"apple " * 600)],
        "caption has 600 tokens; the model has positions for 512",
    ),
    "two images": ([("b.jpg", picture(1)), ("b.png", picture(2, kind="PNG")), ("b.txt", b"x")], "2 images (jpg, png)"),
    "broken json": ([("b.jpg", picture(1)), ("b.json", b"{")], "no caption: unreadable json"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_a_row_with_a_reason(tiny, tmp_path, quiet, case):
    members, reason = BAD[case]
    shard = write_tar(tmp_path / "00000.tar", [*good("a", 1), *members, *good("c", 2)])
    summary = run_score(tiny[0], [shard], tmp_path / "run", quiet)
    rows = rows_of(tmp_path / "run")
    assert [row["ok"] for row in rows] == [True, False, True]
    assert rows[1]["key"] == "b" and rows[1]["reason"].startswith(reason)
    assert rows[1]["similarity"] is None and rows[1]["nbytes"] > 0
    assert (summary.n_scored, summary.n_samples) == (2, 3)


def test_a_bad_sample_changes_no_other(tiny, tmp_path, quiet):
    fine = [member for i in range(8) for member in good(f"{i}", i)]
    clean = write_tar(tmp_path / "clean.tar", fine)
    dirty = write_tar(tmp_path / "dirty.tar", [*fine[:12], ("bad.jpg", b"x"), ("bad.txt", b"x"), *fine[12:]])
    run_score(tiny[0], [clean, dirty], tmp_path / "run", quiet)
    with_bad = [row for row in rows_of(tmp_path / "run", "dirty") if row["ok"]]
    for one, other in zip(rows_of(tmp_path / "run", "clean"), with_bad, strict=True):
        assert {k: one[k] for k in SCORES if k != "random"} == pytest.approx(
            {k: other[k] for k in SCORES if k != "random"}, abs=1e-5
        )


@pytest.mark.parametrize(
    "record",
    [
        {"caption": "red apple"},
        {"text": "red apple"},
        {"conversations": [{"from": "human", "value": "<image>\nred apple"}]},
    ],
)
@pytest.mark.parametrize(("ext", "kind"), [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_images_and_captions_of_all_kinds(tiny, tmp_path, quiet, record, ext, kind):
    by_txt = [(f"a.{ext}", picture(3, kind=kind)), ("a.txt", b"red apple")]
    by_json = [(f"b.{ext}", picture(3, kind=kind)), ("b.json", json.dumps(record).encode())]
    shard = write_tar(tmp_path / "00000.tar", by_txt + by_json)
    run_score(tiny[0], [shard], tmp_path / "run", quiet)
    one, other = rows_of(tmp_path / "run")
    assert one["similarity"] == pytest.approx(other["similarity"], abs=1e-6)
    assert one["text_hash"] == other["text_hash"]


def test_the_caption_can_be_chosen(tiny, tmp_path, quiet):
    shard = write_tar(
        tmp_path / "00000.tar", [("a.jpg", picture(3)), ("a.txt", b"one"), ("a.json", b'{"alt": "another thing"}')]
    )
    run_score(tiny[0], [shard], tmp_path / "run", quiet, caption="alt")
    assert rows_of(tmp_path / "run")[0]["caption_chars"] == len("another thing")


def test_a_truncated_shard_is_reported_and_the_others_are_kept(tiny, make_shard, tmp_path, quiet):
    fine, cut = make_shard("00000.tar", n=4), make_shard("00001.tar", n=4, seed=20)
    last = make_shard("00002.tar", n=4, seed=40)
    cut.write_bytes(cut.read_bytes()[:-11_000])
    summary = run_score(tiny[0], [fine, cut, last], tmp_path / "run", quiet)
    assert summary.n_shards == 2 and len(summary.failures) == 1
    assert str(cut) in str(summary.failures[0]) and "truncated" in str(summary.failures[0])
    assert isinstance(summary.failures[0], ShardError) and summary.failures[0].offset > 0
    assert sorted(path.name for path in (tmp_path / "run" / "scores").iterdir()) == ["00000.parquet", "00002.parquet"]


def test_nothing_is_written_beside_the_input(tiny, make_shard, tmp_path, quiet):
    shard = make_shard(n=2)
    run_score(tiny[0], [shard], tmp_path / "run", quiet)
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]


def test_states_that_are_not_finite_have_a_reason(tiny, make_shard, tmp_path, quiet, monkeypatch):
    from mmfilter.ops import score as operation

    class Overflowing(operation.Scorer):
        def score(self, activations):
            scored = super().score(activations)
            scored.scores["raw"][0] = np.inf
            return scored

    monkeypatch.setattr(operation, "Scorer", Overflowing)
    run_score(tiny[0], [make_shard(n=3)], tmp_path / "run", quiet, batch_size=1)
    assert {row["reason"] for row in rows_of(tmp_path / "run")} == {"the model's states are not finite"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores_in_float32(tiny, make_shard, tmp_path, quiet):
    shard = make_shard(n=40)
    run_score(tiny[0], [shard], tmp_path / "cpu", quiet, device="cpu")
    run_score(tiny[0], [shard], tmp_path / "gpu", quiet, device="cuda", dtype="float32")
    cpu, gpu = columns_of(tmp_path / "cpu"), columns_of(tmp_path / "gpu")
    assert np.quantile(np.abs(cpu - gpu), 0.99) < 1e-3  # a feature at its threshold may flip
