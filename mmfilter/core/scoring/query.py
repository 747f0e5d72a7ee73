"""Codes of an image or of words that are in no run, made as the codes of a run were made.

Model, layer, prompt and SAE are those that the run's manifest names, and have to be the same to the byte.
A model takes pairs, so a query with one side only goes in with a neutral other one, whose codes are left
out: with `TEXT_ALONE`, which leaves the image before it as it is in models that read from left to right,
or with `IMAGE_ALONE`. Where the run's text states come from the pass with the image in context, words
alone are thus read after a grey image, and are less close to a run's captions than beside their own image.
"""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmfilter.core.codes.vectors import SIDES, Codes, SideCodes
from mmfilter.core.data import artifacts
from mmfilter.core.data.artifacts import RunDirectory
from mmfilter.core.data.decode import DecodeSettings
from mmfilter.core.data.shards import RawSample
from mmfilter.core.model.backbone import Backbone, Inputs
from mmfilter.core.model.cards import Card
from mmfilter.core.model.codes import pool
from mmfilter.core.model.loading import model_hash
from mmfilter.core.model.sae import SAE
from mmfilter.core.model.sae_options import make_options
from mmfilter.core.scoring.engine import DeviceSettings, load
from mmfilter.core.scoring.feed import Feed
from mmfilter.core.scoring.scorer import explained_memory, strongest
from mmfilter.errors import ModelError, RunError, SelectionError

TEXT_ALONE = "picture"
"""The caption of an image that comes without words"""
IMAGE_ALONE = (224, 224), (128, 128, 128)
"""Size and colour of the image of words that come without one"""


def encode_query(run: Path, image: Path | None, text: str | None, device: DeviceSettings) -> Codes:
    """Codes of one image, of words, or of both as a pair: one sample at position −1, a side that is not asked for empty.

    Raises `SelectionError` for a query that cannot be read or in which no feature fires, `RunError` when
    the model or the SAE is no longer what the run was scored with, `ModelError` and `SAEError` when it
    cannot be loaded.
    """
    raw = _sample(image, text)
    settings = _settings(RunDirectory(run))
    backbone, sae = load(run_card(settings), device)
    _check_same(run, settings, backbone, sae)
    wanted = [side for side, given in zip(SIDES, (image, text), strict=True) if given is not None]
    codes = _codes(_prepared(backbone, raw), backbone, sae, wanted)
    if not any(len(getattr(codes, side).ids) for side in wanted):
        raise SelectionError("no feature of the SAE fires on the query, so it is near to nothing")
    return codes


def run_card(settings: dict[str, Any]) -> Card:
    """What the run was scored with, as a card; `settings` are those of its manifest."""
    return Card(
        name="run",
        model=settings["model"],
        revision=settings["revision"],
        layer=settings["layer"],
        prompt=settings["prompt"],
        text_context=settings["text_context"],
        sae=settings["sae"],
        sae_options=make_options(settings.get("sae_options") or {}),
    )


def _settings(run: RunDirectory) -> dict[str, Any]:
    run.score_tables()  # says so when it is no run
    return artifacts.read_json(run.manifest)["settings"]


def _check_same(run: Path, settings: dict[str, Any], backbone: Backbone, sae: SAE) -> None:
    """Raise `RunError` when the model's or the SAE's files are not those of the run."""
    now = {"model": model_hash(settings["model"], backbone.model.config), "sae": sae.hash}
    for name, said in (("model", "model"), ("sae", "SAE")):
        if now[name] != settings[f"{name}_hash"]:
            raise RunError(
                f"{said} {settings[name]!r} has changed since run {str(run)!r} was scored with it (hash {settings[f'{name}_hash']}, now {now[name]}): "
                f"bring the old one back, or score into another --run"
            )


def _sample(image: Path | None, text: str | None) -> RawSample:
    """The query as a shard would hold it, so that it is read and checked like any sample."""
    try:
        payload = _grey() if image is None else image.read_bytes()
    except OSError as error:
        raise SelectionError(f"image {str(image)!r} cannot be read: {error.strerror or error}") from error
    caption = (TEXT_ALONE if text is None else text).encode("utf-8", "surrogatepass")
    return RawSample(key="query", row=0, offset=0, nbytes=0, members={"jpg": payload, "txt": caption}, problem=None)


def _grey() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", *IMAGE_ALONE).save(file, "PNG")
    return file.getvalue()


def _prepared(backbone: Backbone, raw: RawSample) -> Inputs:
    """The query as the model takes it; raises `SelectionError` saying why it cannot."""
    with closing(Feed(backbone, DecodeSettings("txt"), batch_size=1, workers=1)) as feed:
        for window in feed.windows([raw], "query"):
            batches = list(window.batches)
            if window.pairs[0].reason is not None:
                raise SelectionError(f"the query cannot be looked for: {window.pairs[0].reason}")
    return batches[0].inputs


@torch.inference_mode()
def _codes(inputs: Inputs, backbone: Backbone, sae: SAE, wanted: list[str]) -> Codes:
    with explained_memory(1):
        activations = backbone.activations(inputs)
        if not torch.isfinite(activations.states).all():
            raise ModelError("the model's states of the query are not finite; try --dtype float32")
        pooled = pool(sae.encode(activations.states), activations.sample, activations.side, activations.n_samples)
    sides = [SideCodes.empty(1)] * len(SIDES)
    for number, side in enumerate(SIDES):
        if side in wanted:
            [(ids, _, means)] = strongest(pooled[number])
            sides[number] = SideCodes.of_lengths(np.array([len(ids)]), ids, means)
    return Codes(np.array([-1]), *sides)
