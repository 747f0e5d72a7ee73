"""Evaluate an SAE on the user's own pairs: reconstruction, loss, cross-modal features, and how it carries over to other
states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmfilter.core.cards.cards import Card
from mmfilter.core.evaluation.few_states import few_states
from mmfilter.core.evaluation.fidelity import Fidelity, FidelityMeter
from mmfilter.core.evaluation.random_sae import random_sae, with_fitted_decoder
from mmfilter.core.evaluation.splice import reconstruction, why_no_loss
from mmfilter.core.evaluation.spliced_loss import LossMeter, SplicedLoss
from mmfilter.core.evaluation.weight_spread import WeightSpread, weight_spread
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_sources
from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.model.loading import read_config
from mmfilter.core.pipeline.engine import load, load_model, load_settings
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.pair_sample import CAPTION, PairSample
from mmfilter.core.pipeline.reference import REFERENCE_PAIRS, fit_all
from mmfilter.core.pipeline.scorer import check_fit
from mmfilter.core.progress import Progress
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.errors import MMFilterError, ModelError, SAEError
from mmfilter.ops.evaluate_settings import EvaluateSettings

STEADY_PAIRS = 50
"""Below this many pairs the report says that its figures are unsteady."""
TRAINED, RANDOM = "trained", "random"
"""Names of the SAE and of the random one beside it."""
AHEAD = "the model reads captions in both directions and sees the token that it should predict"


@dataclass(frozen=True)
class Trial:
    """How the SAE, and the random one, do on the states of one model in one context."""

    model: str
    """Card name, folder or hub id"""
    text_only: bool
    """Captions alone, without an image"""
    fidelity: dict[str, Fidelity]
    """Of the SAEs `trained` and `random`; without images only the text side has tokens"""
    loss: SplicedLoss | None
    """The language model's loss on the captions; None where there is no such thing"""
    no_loss: str
    """Why there is none"""
    n_pairs: int


@dataclass(frozen=True)
class Evaluation:
    """What an SAE is worth on the pairs."""

    trials: list[Trial]
    """The card's own model first, then its captions alone and other checkpoints, as asked"""
    weights: dict[str, WeightSpread]
    """Cross-modal weights of the SAEs `trained` and `random`, fitted on these pairs with the card's own model"""
    layer: int
    n_pairs: int
    shards: list[str]
    """Where the pairs are from"""
    reasons: Counter[str]
    """Kind of problem -> samples that could not be used"""
    notes: list[str]

    @property
    def n_features(self) -> int:
        return self.trials[0].fidelity[TRAINED].n_features


def evaluate(patterns: Sequence[str], settings: EvaluateSettings, progress: Progress) -> Evaluation:
    """Evaluate an SAE beside random directions in its shape, on the same pairs and the same states.

    The models are loaded whole and one after the other. The random SAE is set on states of the card's own
    model and stays the same for all. Raises `ShardError` for a pattern that names nothing, `ModelError`
    and `SAEError` for what cannot be loaded or does not fit, `MMFilterError` when no pair is usable.
    """
    sources = open_sources(patterns, settings.inputs)
    backbone, sae = load(settings.card, settings, whole=True)
    for other in settings.others:
        check_also(other, backbone, sae, settings)
    contexts = contexts_of(backbone, settings)
    with PairSample() as sample:
        sample.gather(
            sources,
            settings.sample,
            DecodeSettings(settings.caption),
            workers=settings.workers,
            progress=progress,
        )
        if not len(sample):
            raise MMFilterError(f"the shards hold no usable pair to evaluate the SAE on ({_counted(sample.reasons)})")
        saes, weights = beside_random(backbone, sae, sample, settings, progress)
        trials, reasons = [], Counter(sample.reasons)
        for text_only, view in contexts:
            tried, refused = trial(view, settings.card.name, saes, sample, settings, progress, text_only=text_only)
            trials.append(tried)
            reasons.update({} if text_only else refused)
        del backbone, contexts, view  # the next model wants the memory
        for other in settings.others:
            trials += also_trials(other, saes, sample, settings, progress)
        limits = notes(sample, trials, settings)
        return Evaluation(trials, weights, settings.card.layer, trials[0].n_pairs, sample.shards, reasons, limits)


def check_also(other: Card, backbone: Backbone, sae: SAE, settings: EvaluateSettings) -> None:
    """Raise, before anything is computed, when the other model is of another architecture or width; reads its
    configuration only."""
    config = read_config(other.model, revision=other.revision, settings=load_settings(settings))
    kinds = [
        " with ".join(dict.fromkeys((c.model_type, c.get_text_config().model_type)))
        for c in (config, backbone.model.config)
    ]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"--also {other.name!r} is {kinds[0]}, and {settings.card.name!r} is {kinds[1]}: an SAE is carried over "
            "between checkpoints of one architecture"
        )
    width = getattr(config.get_text_config(), "hidden_size", sae.d_model)
    if backbone.joint_stream is not None and width != sae.d_model:
        raise SAEError(
            f"SAE takes states of width {sae.d_model}, --also {other.name!r} gives {width}: it is larger or smaller "
            "than the SAE's own model"
        )


def contexts_of(backbone: Backbone, settings: EvaluateSettings) -> list[tuple[bool, Backbone]]:
    """(whether without images, the model in that context) for each trial of a model."""
    contexts = [(False, backbone)]
    if settings.text_only:
        if backbone.joint_stream is None:
            raise ModelError(
                f"{backbone.model.config.model_type!r} is a dual encoder, whose captions never see an image: leave out "
                "--text-only"
            )
        contexts.append((True, backbone.with_text_context("none")))
    return contexts


def beside_random(
    backbone: Backbone, sae: SAE, sample: PairSample, settings: EvaluateSettings, progress: Progress
) -> tuple[dict[str, SAE], dict[str, WeightSpread]]:
    """The SAE and random directions in its shape, and the cross-modal weights of both."""
    numbers = range(len(sample))
    with pass_over(backbone, settings) as model_pass:
        some = torch.cat([batch.states for batch in few_states(sample, numbers, model_pass, seed=settings.seed)])
        some = some[some.isfinite().all(1)]
        twin = with_fitted_decoder(random_sae(sae, some, seed=settings.seed, max_active=sae.n_features), some)
        saes = {TRAINED: sae, RANDOM: twin}
        progress.start("fitting feature weights", None)
        part = ("sample", lambda: sample.read(numbers[:REFERENCE_PAIRS]))
        fitted = fit_all([part], REFERENCE_PAIRS, model_pass, list(saes.values()), progress)
    return saes, {name: weight_spread(weights) for name, weights in zip(saes, fitted, strict=True)}


def also_trials(
    other: Card, saes: Mapping[str, SAE], sample: PairSample, settings: EvaluateSettings, progress: Progress
) -> Iterator[Trial]:
    """The trials of another checkpoint."""
    backbone = load_model(other, settings, whole=True)
    check_fit(backbone, saes[TRAINED])
    for text_only, view in contexts_of(backbone, settings):
        yield trial(view, other.name, saes, sample, settings, progress, text_only=text_only)[0]


def trial(
    backbone: Backbone,
    name: str,
    saes: Mapping[str, SAE],
    sample: PairSample,
    settings: EvaluateSettings,
    progress: Progress,
    *,
    text_only: bool,
) -> tuple[Trial, Counter[str]]:
    """One pass over the pairs, and the kinds of problem with those that the model does not take."""
    meters = {which: FidelityMeter(sae) for which, sae in saes.items()}
    no_loss = why_no_loss(backbone)
    stream = None if no_loss else backbone.joint_stream
    ways = {which: reconstruction(sae) for which, sae in saes.items()}
    losses = None if stream is None else LossMeter(stream, ways)
    n_pairs = 0

    def add(batch: Batch, activations: Activations) -> None:
        """The states to the meters, and the captions' stream, spliced, to the losses."""
        nonlocal n_pairs
        for meter in meters.values():
            meter.add(activations.states, activations.side)
        if losses is not None:
            losses.add(*(batch.inputs.text_only or (batch.inputs.tensors, batch.inputs.side)))
        n_pairs += len(batch.pairs)

    progress.start(f"{name}, captions alone" if text_only else name, sample.nbytes(range(len(sample))))
    with pass_over(backbone, settings, captions_alone=text_only) as model_pass:
        reasons = model_pass.over(sample.read(range(len(sample))), "sample", add, progress)
    if not n_pairs:
        raise MMFilterError(f"{name!r} takes none of the pairs ({_counted(reasons)})")
    if losses is not None and losses.sees_ahead:
        losses, no_loss = None, AHEAD
    found = {which: meter.fidelity for which, meter in meters.items()}
    return Trial(name, text_only, found, losses.loss if losses else None, no_loss, n_pairs), reasons


def pass_over(backbone: Backbone, settings: EvaluateSettings, *, captions_alone: bool = False) -> ModelPass:
    """The pass over pairs of the sample."""
    return ModelPass(
        backbone,
        DecodeSettings(CAPTION),
        batch_size=settings.batch_size,
        workers=settings.workers,
        captions_alone=captions_alone,
    )


def notes(sample: PairSample, trials: Sequence[Trial], settings: EvaluateSettings) -> list[str]:
    """What limits the evaluation."""
    found = [f"{error}; the pairs before that are used" for error in sample.failures]
    n_pairs = trials[0].n_pairs
    if n_pairs < STEADY_PAIRS:
        found.append(
            f"evaluated on only {n_pairs:,} pairs; {STEADY_PAIRS} or more make the figures steady, and about 1,000 the "
            "cross-modal weights"
        )
    if settings.card.text_context == "none" and trials[0].loss is not None:
        found.append(
            "with text context 'none' captions do not see the image, so the caption loss says nothing of image tokens"
        )
    for tried in trials:
        if tried.loss is not None and tried.loss.n_left_out:
            found.append(
                f"{tried.loss.n_left_out:,} pairs of {tried.model!r} are left out of the caption loss: it is not "
                "finite, or predicts no token of them"
            )
    return found


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common(3)) or "they are empty"
