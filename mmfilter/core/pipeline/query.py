"""Codes of an image or of words that are in no run, made as the codes of a run were made.

Model, layer, prompt and SAE are those that the run's manifest names, and have to be the same to the byte.

A model takes pairs, so a query of one side goes in with a neutral other one, whose codes are left out.
An image comes with the words `TEXT_ALONE`: in models that read from left to right, and in dual encoders,
its codes are those that it has beside any caption; in encoders (BLIP-2 with T5, PaliGemma's prefix) they
are not quite. Words come with the grey `IMAGE_ALONE`: their codes are those of a run with text context
`none`; in a run with text context `image` they are less close to a caption than beside its own image.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmfilter.core.cards.cards import Card, card_names, load_card
from mmfilter.core.cards.sae_options import make_options
from mmfilter.core.codes.vectors import Codes, SideCodes
from mmfilter.core.files import read_json
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.sample import RawSample
from mmfilter.core.model.backbone import Backbone, ModelInputs
from mmfilter.core.model.loading import model_hash
from mmfilter.core.pipeline.engine import load
from mmfilter.core.pipeline.feed import Feed
from mmfilter.core.pipeline.model_pass import memory_errors
from mmfilter.core.pipeline.pass_settings import EncodeSettings
from mmfilter.core.pipeline.scorer import strongest
from mmfilter.core.run.directory import RunDirectory
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.token_codes import pool
from mmfilter.core.sides import SIDES
from mmfilter.errors import ModelError, RunError, SelectionError

TEXT_ALONE = "picture"
"""The caption of an image that comes without words"""
IMAGE_ALONE = (224, 224), (128, 128, 128)
"""Size and colour of the image of words that come without one"""


def encoder(settings: EncodeSettings) -> Callable[[Path, Path | None, str | None], Codes]:
    """(run, image, words) to codes; the model is loaded when it is called."""
    return lambda run, image, text: encode_query(run, image, text, settings)


def encode_query(run: Path, image: Path | None, text: str | None, settings: EncodeSettings) -> Codes:
    """Codes of one image, of words, or of both as a pair: one sample at position −1, a side that is not asked for
    empty.

    Raises `SelectionError` for a query that cannot be read or in which no feature fires, `RunError` when
    the model or the SAE is not what the run was scored with, `ModelError` and `SAEError` when it cannot be
    loaded.
    """
    raw = _sample(image, text)
    scored_with = _scored_with(RunDirectory(run))
    card = run_card(scored_with, settings.model, settings.sae)
    _check_there(run, card)
    backbone, sae = load(card, settings)
    _check_same(run, scored_with, card, backbone, sae)
    wanted = [side for side, given in zip(SIDES, (image, text), strict=True) if given is not None]
    codes = _codes(_prepared(backbone, raw), backbone, sae, wanted)
    if not any(len(getattr(codes, side).ids) for side in wanted):
        raise SelectionError("no feature of the SAE fires on the query, so it is near to nothing")
    return codes


def run_card(scored_with: dict[str, Any], model: str | None = None, sae: str | None = None) -> Card:
    """What the run was scored with, as a card, from the settings in its manifest; `model` and `sae` say where they are
    now."""
    if model in card_names():
        card = load_card(model)
        model, sae = card.model, sae or card.sae
    return Card(
        name="run",
        model=model or scored_with["model"],
        revision=scored_with["revision"],
        layer=scored_with["layer"],
        prompt=scored_with["prompt"],
        text_context=scored_with["text_context"],
        sae=sae or scored_with["sae"],
        sae_options=make_options(scored_with.get("sae_options") or {}),
    )


def _scored_with(run: RunDirectory) -> dict[str, Any]:
    run.score_tables()  # says so when it is not a run
    settings: dict[str, Any] = read_json(run.manifest)["settings"]
    return settings


def _check_there(run: Path, card: Card) -> None:
    """Raise `RunError` when the run was scored with files that are not on this machine."""
    for option, said, path in (("--model", "model", card.model), ("--sae", "SAE", card.sae)):
        if os.path.isabs(path) and not os.path.exists(path):
            raise RunError(f"{said} {path!r} of run {str(run)!r} is not there: say with {option} where it is now")


def _check_same(run: Path, scored_with: dict[str, Any], card: Card, backbone: Backbone, sae: SAE) -> None:
    """Raise `RunError` when the model's or the SAE's files are not those of the run."""
    for name, said, place, now in (
        ("model", "model", card.model, model_hash(card.model, backbone.model.config)),
        ("sae", "SAE", card.sae, sae.hash),
    ):
        if now != (then := scored_with[f"{name}_hash"]):
            raise RunError(
                f"{said} {place!r} is not what run {str(run)!r} was scored with (hash {now}, then {then}): bring that "
                "back, or score anew"
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


def _prepared(backbone: Backbone, raw: RawSample) -> ModelInputs:
    """The query as the model takes it; raises `SelectionError` saying why it cannot."""
    with closing(Feed(backbone, DecodeSettings("txt"), batch_size=1, workers=1)) as feed:
        for window in feed.windows([raw], "query"):
            batches = list(window.batches)
            if window.pairs[0].reason is not None:
                raise SelectionError(f"the query cannot be looked for: {window.pairs[0].reason}")
    return batches[0].inputs


@torch.inference_mode()
def _codes(inputs: ModelInputs, backbone: Backbone, sae: SAE, wanted: list[str]) -> Codes:
    with memory_errors(1):
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
