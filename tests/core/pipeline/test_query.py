"""Searching a real run for an image and for words: samples find themselves, and what cannot be looked for is named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfilter.cli.app import main
from mmfilter.core.cards.cards import Card, load_card
from mmfilter.core.codes.code_tables import CodeTables
from mmfilter.core.codes.vectors import SideCodes
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.pipeline.pass_settings import EncodeSettings
from mmfilter.core.pipeline.query import encode_query
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.run.score_tables import ScoreTables
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.ops.score import score
from mmfilter.ops.score_settings import ScoreSettings
from tests.conftest import Quiet, caption, good, picture, write_tar
from tests.zoo import build, save

pytestmark = pytest.mark.slow

CPU = {"device": "cpu"}
N = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """40 pairs scored with text in context (`image`) and alone (`none`), and the picture of number 7."""
    folder = tmp_path_factory.mktemp("query")
    shard = write_tar(folder / "a.tar", [member for i in range(N) for member in good(f"{i:03d}", i)])
    for context in ("image", "none"):
        card = replace(load_card("tiny"), text_context=context)
        score([str(shard)], ScoreSettings(model=card, run=folder / context, **CPU), Quiet())
    (folder / "7.jpg").write_bytes(picture(7))
    return folder


def hits(run: Path, capsys, *arguments: str) -> list[dict]:
    assert main(["search", str(run), *arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("context", ["image", "none"])
def test_codes_of_a_pair_of_the_run_are_those_of_its_table(folder, context):
    stored = CodeTables(ScoreTables(RunDirectory(folder / context))).take(np.array([7]))
    pair = encode_query(folder / context, folder / "7.jpg", caption(7), EncodeSettings(**CPU))
    assert means(pair.image) == pytest.approx(means(stored.image), rel=2e-3) and means(pair.text) == pytest.approx(
        means(stored.text), rel=2e-3
    )
    alone = encode_query(folder / context, folder / "7.jpg", None, EncodeSettings(**CPU))
    assert not len(alone.text.ids) and set(alone.image.ids.tolist()) == set(pair.image.ids.tolist())


@pytest.mark.parametrize("context", ["image", "none"])
def test_an_image_of_the_run_finds_itself(folder, context, capsys):
    found = hits(folder / context, capsys, "--image", str(folder / "7.jpg"), "-n", "3")
    assert found[0]["key"] == "007" and found[0]["cosine"] == pytest.approx(1, abs=1e-5) and found[1]["cosine"] < 0.999
    assert found[0]["cosine"] == found[0]["image"] and "text" not in found[0] and len(found) == 3


def test_words_of_the_run_find_their_sample(folder, capsys):
    found = hits(folder / "none", capsys, "--text", caption(7), "-n", "2")
    assert (
        found[0]["key"] == "007"
        and found[0]["cosine"] == found[0]["text"] == pytest.approx(1, abs=1e-5)
        and found[1]["cosine"] < 0.999
    )
    found = hits(
        folder / "image", capsys, "--text", caption(7), "-n", "1"
    )  # read after a grey image, not after its own
    assert found[0]["key"] == "007" and 0.5 < found[0]["cosine"] < 1


def test_a_pair_is_compared_on_both_sides_or_on_one(folder, capsys):
    pair = ("--image", str(folder / "7.jpg"), "--text", caption(7), "-n", "1")
    for on, sides in (("both", {"image", "text"}), ("image", {"image"}), ("text", {"text"})):
        [found] = hits(folder / "image", capsys, *pair, "--on", on)
        assert (
            found["key"] == "007"
            and found["cosine"] == pytest.approx(1, abs=1e-5)
            and found.keys() & {"image", "text"} == sides
        )


def test_what_cannot_be_looked_for_is_one_line(folder, capsys, tmp_path):
    def error(run: Path, *arguments: str) -> str:
        assert main(["search", str(run), *arguments, "--device", "cpu"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err.removeprefix("mmfilter: ").strip()

    run = folder / "image"
    (tmp_path / "notes.txt").write_text("no picture")
    assert (
        error(run, "--image", str(tmp_path / "none.jpg"))
        == f"image {str(tmp_path / 'none.jpg')!r} cannot be read: No such file or directory"
    )
    assert (
        error(run, "--image", str(tmp_path / "notes.txt"))
        == "the query cannot be looked for: image cannot be decoded: it is no JPEG, PNG or WebP"
    )
    assert error(run, "--text", " ") == "the query cannot be looked for: empty caption"
    assert error(tmp_path / "nowhere", "--text", "cat").startswith(f"{str(tmp_path / 'nowhere')!r} is not a run")


def changed(run: Path, to: Path, **settings: str) -> dict:
    """A copy of the run whose manifest says something else; what it said before."""
    shutil.copytree(run, to)
    manifest = json.loads((to / "manifest.json").read_text())
    before = dict(manifest["settings"])
    manifest["settings"] |= settings
    (to / "manifest.json").write_text(json.dumps(manifest))
    return before


@pytest.mark.parametrize(("name", "said"), [("model", "model"), ("sae", "SAE")])
def test_another_model_or_sae_is_refused(folder, tmp_path, capsys, name, said):
    run = tmp_path / "run"
    before = changed(folder / "none", run, **{f"{name}_hash": "0" * 16})
    assert main(["search", str(run), "--text", "a cat", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == (
        f"mmfilter: {said} {before[name]!r} is not what run {str(run)!r} was scored with "
        f"(hash {before[f'{name}_hash']}, then {'0' * 16}): bring that back, or score anew\n"
    )


def test_a_model_that_moved_is_named_by_option(folder, tmp_path, capsys):
    run = tmp_path / "run"
    before = changed(folder / "none", run, model="/elsewhere/tiny", sae="/elsewhere/tiny/sae")
    words = ["search", str(run), "--text", caption(7), "-n", "1", "--device", "cpu", "--json"]
    for more, said in (([], "model '/elsewhere/tiny'"), (["--model", before["model"]], "SAE '/elsewhere/tiny/sae'")):
        assert main([*words, *more]) == 1
        option = said.split()[0].lower()
        assert (
            capsys.readouterr().err
            == f"mmfilter: {said} of run {str(run)!r} is not there: say with --{option} where it is now\n"
        )
    for more in (["--model", "tiny"], ["--model", before["model"], "--sae", before["sae"]]):
        assert main([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)[0]["key"] == "007"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["clip", "qwen2_vl", "idefics3", "blip2_t5"])
def test_other_families_take_queries_too(family, make_shard, tmp_path):
    specimen = build(family)
    layer = -1 if family == "clip" else 1
    model, shard = save(specimen, tmp_path / "model"), make_shard(n=6)
    width = load_backbone(str(model), layer, prompt=specimen.prompt).d_model
    rows = torch.nn.functional.normalize(torch.randn(64, width, generator=torch.Generator().manual_seed(0)), dim=1)
    SAE(rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(width)).save(tmp_path / "sae")
    card = Card(name="t", model=str(model), layer=layer, sae=str(tmp_path / "sae"), prompt=specimen.prompt)
    run = tmp_path / "run"
    assert score([str(shard)], ScoreSettings(card, run=run, **CPU), Quiet()).n_scored >= 5
    scores = ScoreTables(RunDirectory(run))
    number = int(np.flatnonzero(scores.scored)[0])
    stored = CodeTables(scores).take(np.array([number]))
    (tmp_path / "it.jpg").write_bytes(picture(number))
    pair, image, text = (
        encode_query(run, file, words, EncodeSettings(**CPU))
        for file, words in (
            (tmp_path / "it.jpg", caption(number)),
            (tmp_path / "it.jpg", None),
            (None, caption(number)),
        )
    )
    assert means(pair.image) == pytest.approx(means(stored.image), rel=2e-3) and means(pair.text) == pytest.approx(
        means(stored.text), rel=2e-3
    )
    assert len(image.image.ids) and not len(image.text.ids) and len(text.text.ids) and not len(text.image.ids)
    if family != "blip2_t5":  # an encoder reads the image with the words behind it
        assert means(image.image) == pytest.approx(means(stored.image), rel=2e-3)
    if family == "clip":  # its captions are read alone
        assert means(text.text) == pytest.approx(means(stored.text), rel=2e-3)


def means(side: SideCodes) -> dict[int, float]:
    """Feature -> mean activation."""
    return dict(zip(side.ids.tolist(), side.means.tolist(), strict=True))
