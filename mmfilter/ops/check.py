"""Check whether the scores mean anything on the user's own pairs: can they tell true captions from shuffled ones?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mmfilter.core.evaluation.evidence import RAW, Evidence, Judgement, weigh
from mmfilter.core.evaluation.few_states import few_states
from mmfilter.core.evaluation.fidelity import Fidelity, FidelityMeter
from mmfilter.core.evaluation.random_sae import random_twin
from mmfilter.core.evaluation.shuffled import shuffle_captions
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.sample import problem_kind
from mmfilter.core.input.shards import open_sources
from mmfilter.core.input.source import Source
from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.pipeline.engine import card_weights, load
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.pair_sample import CAPTION, PairSample
from mmfilter.core.pipeline.reference import REFERENCE_PAIRS, fit_all
from mmfilter.core.pipeline.scorer import pool_pairs
from mmfilter.core.progress import Progress
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights
from mmfilter.core.scores.registry import formulas
from mmfilter.errors import MMFilterError
from mmfilter.ops.check_settings import FEWEST_PAIRS, CheckSettings

STEADY_PAIRS = 200
"""Below this many pairs the report says that its intervals are wide."""
STEADY_WEIGHTS = 100


@dataclass(frozen=True)
class CheckReport:
    """What was compared, and what came of it."""

    scores: dict[str, Evidence]
    """Every score of `formulas`, then the controls `random`, `caption_chars` and `caption_tokens`"""
    fidelity: Fidelity
    """How the SAE reconstructs the true pairs' states"""
    n_pairs: int
    """Pairs scored with their own caption and with another one's"""
    n_left_out: int
    """Pairs for which there was no other caption, since more than half of the pairs share theirs or their image"""
    n_fitted: int
    """Other pairs, on which feature weights were fitted"""
    card_weights: bool
    """Whether the SAE's feature weights are the card's; the random SAE's are always fitted"""
    threshold: float
    """τ of the SAE"""
    random_threshold: float
    """τ of the random SAE"""
    shards: list[str]
    """Where the pairs are from"""
    reasons: Counter[str]
    """Kind of problem -> samples that could not be used"""
    notes: list[str] = field(default_factory=list)

    @property
    def judgement(self) -> Judgement:
        return Judgement(self.scores, self.fidelity)

    @property
    def recommended(self) -> str | None:
        """The score column to rank by, None when none is above chance."""
        return self.judgement.recommended

    @property
    def verdict(self) -> str:
        """The whole in one sentence."""
        return self.judgement.verdict


def check(patterns: Sequence[str], settings: CheckSettings, progress: Progress) -> CheckReport:
    """Compare the scores of true pairs with those of the same images under captions of other pairs.

    A pair is never scored with feature weights that saw it: the card's are used, or weights fitted on
    other pairs of the sample. Raises `ShardError` for a pattern that names nothing, `ModelError` and
    `SAEError` for what cannot be loaded or does not fit, `MMFilterError` when too few pairs are usable.
    """
    sources = open_sources(patterns, settings.inputs)
    backbone, sae = load(settings.card, settings)
    return compare(sources, backbone, sae, settings, progress)


def compare(
    sources: Sequence[Source], backbone: Backbone, sae: SAE, settings: CheckSettings, progress: Progress
) -> CheckReport:
    """`check` with the model and the SAE at hand."""
    card = settings.card
    with PairSample() as sample:
        n_pairs = settings.sample + min(settings.sample, REFERENCE_PAIRS)
        decoding = DecodeSettings(settings.caption)
        sample.gather(sources, n_pairs, decoding, workers=settings.workers, progress=progress)
        fitting, scored, source = deal(sample, settings)
        with ModelPass(
            backbone, DecodeSettings(CAPTION), batch_size=settings.batch_size, workers=settings.workers
        ) as model_pass:
            few = few_states(sample, fitting, model_pass, seed=settings.seed)
            twin = random_twin(sae, few, card.threshold, seed=settings.seed)
            given = card_weights(card, sae)
            fitted = fit(sample, fitting, model_pass, [twin.sae] if given else [sae, twin.sae], progress)
            ways = [Way(sae, given or fitted[0], card.threshold), Way(twin.sae, fitted[-1], twin.threshold)]
            comparison = Comparison(sample, scored, source, backbone, ways)
            comparison.run(model_pass, progress)
    n_left_out, reasons = int((source < 0).sum()), sample.reasons + comparison.reasons
    require(comparison.n_pairs, sample, reasons, n_left_out)
    return CheckReport(
        scores=comparison.evidence(draws=settings.bootstrap, seed=settings.seed),
        fidelity=comparison.fidelity,
        n_pairs=comparison.n_pairs,
        n_left_out=n_left_out,
        n_fitted=fitted[0].n_samples,
        card_weights=given is not None,
        threshold=card.threshold,
        random_threshold=twin.threshold,
        shards=sample.shards,
        reasons=reasons,
        notes=notes(sample, comparison, n_left_out, fitted[0].n_samples),
    )


def deal(sample: PairSample, settings: CheckSettings) -> tuple[list[int], list[int], np.ndarray]:
    """(pairs to fit on, pairs to score, the place among the latter of the pair whose caption each gets).

    Dealt at random and image by image, so that no image is on both sides; raises when there are too few.
    """
    by_image: dict[str, list[int]] = {}
    for number, pair in enumerate(sample.pairs):
        by_image.setdefault(pair.image_hash, []).append(number)
    groups = list(by_image.values())
    fitting: list[int] = []
    rest: list[int] = []
    for place in np.random.default_rng(settings.seed).permutation(len(groups)):
        few = len(fitting) + len(groups[place]) <= min(REFERENCE_PAIRS, len(sample) // 2)
        (fitting if few else rest).extend(groups[place])
    scored = sorted(rest[: settings.sample])
    pairs = [sample.pairs[number] for number in scored]
    source = shuffle_captions([pair.caption for pair in pairs], [pair.image_hash for pair in pairs], seed=settings.seed)
    require(int((source >= 0).sum()), sample, sample.reasons, int((source < 0).sum()))
    return sorted(fitting), scored, source


def require(n_pairs: int, sample: PairSample, reasons: Counter[str], n_left_out: int) -> None:
    """Raise `MMFilterError` when there are too few pairs to say anything."""
    if n_pairs >= FEWEST_PAIRS:
        return
    said = f"{sample.n_read:,} samples hold {sample.n_read - sum(reasons.values()):,} usable pairs"
    if reasons:
        said += f" ({', '.join(f'{count:,}: {reason}' for reason, count in reasons.most_common(3))})"
    if n_left_out:
        said += f", and {n_left_out:,} of those to compare share their caption or image with most others"
    raise MMFilterError(
        f"{said}; a check needs at least {2 * FEWEST_PAIRS}, half of them to fit feature weights on: name more shards"
    )


def fit(
    sample: PairSample, fitting: list[int], model_pass: ModelPass, saes: list[SAE], progress: Progress
) -> list[FeatureWeights]:
    """Feature weights of each SAE, on true pairs that are not scored."""
    progress.start("fitting feature weights", None)
    part = ("sample", lambda: sample.read(fitting[:REFERENCE_PAIRS]))
    return fit_all([part], REFERENCE_PAIRS, model_pass, saes, progress)


@dataclass(frozen=True)
class Way:
    """An SAE with what its scores need."""

    sae: SAE
    weights: FeatureWeights
    threshold: float


class Comparison:
    """Scores of pairs under their own and under another's caption, in one pass over the model.

    Row 2i of the pass is pair i as it is, row 2i + 1 the same image with the other caption.
    """

    def __init__(
        self, sample: PairSample, scored: list[int], source: np.ndarray, backbone: Backbone, ways: Sequence[Way]
    ) -> None:
        kept = np.flatnonzero(source >= 0)
        self._sample, self._backbone = sample, backbone
        self._numbers = [scored[place] for place in kept for _ in (0, 1)]
        self._sources = [scored[which] for place in kept for which in (place, source[place])]
        self._ways = [Way(way.sae, way.weights.to(backbone.device), way.threshold) for way in ways]
        self._meter = FidelityMeter(ways[0].sae)
        self._columns = [{name: np.full((2, len(kept)), np.nan) for name in formulas()} for _ in ways]
        self._tokens = np.zeros((2, len(kept)))
        self.reasons: Counter[str] = Counter()
        """Kind of problem -> pairs that the model has no scores of"""

    @property
    def fidelity(self) -> Fidelity:
        """Of the first SAE, on the true pairs."""
        return self._meter.fidelity

    @property
    def finite(self) -> np.ndarray:
        """(pairs,) bool: pairs with all scores, of both captions."""
        return np.isfinite(np.stack([column for columns in self._columns for column in columns.values()])).all((0, 1))

    @property
    def n_pairs(self) -> int:
        """Pairs with all scores, of both captions."""
        return int(self.finite.sum())

    def evidence(self, *, draws: int, seed: int) -> dict[str, Evidence]:
        """On the first SAE's scores beside the second's, and on the controls."""
        chars = np.array([len(self._sample.pairs[number].caption) for number in self._sources]).reshape(-1, 2).T
        noise = np.random.default_rng(seed).random(chars.shape)
        every = self._columns[0] | {"random": noise, "caption_chars": chars, "caption_tokens": self._tokens}
        through_sae = {name: values for name, values in self._columns[1].items() if name != RAW}
        finite = self.finite
        columns, random = ({name: values[:, finite] for name, values in part.items()} for part in (every, through_sae))
        return weigh(columns, random, columns["caption_tokens"][0], draws=draws, seed=seed)

    def run(self, model_pass: ModelPass, progress: Progress) -> None:
        """The pass."""
        progress.start("comparing pairs", self._sample.nbytes(self._numbers))
        captions = [self._sample.pairs[number].caption for number in self._sources]
        bad: dict[int, str] = {}
        for window in model_pass.windows(self._sample.read(self._numbers, captions), "sample"):
            for batch in window.batches:
                model_pass.through(batch, self._add)
            bad |= {pair.row // 2: problem_kind(pair.reason) for pair in window.pairs if pair.reason is not None}
            progress.advance(len(window.pairs), window.nbytes)
        self.reasons.update(bad.values())
        self.reasons["the model's states are not finite"] += int((~self.finite).sum()) - len(bad)
        self.reasons = +self.reasons

    def _add(self, batch: Batch, activations: Activations) -> None:
        rows = np.array([pair.row for pair in batch.pairs])
        at = (rows % 2, rows // 2)
        for way, columns in zip(self._ways, self._columns, strict=True):
            pairs = pool_pairs(activations, way.sae.encode(activations.states), way.weights, way.threshold)
            for name, score in formulas().items():
                columns[name][at] = score(pairs).float().cpu().numpy()
        self._tokens[at] = pairs.text.n_tokens.cpu().numpy()
        true = torch.from_numpy(rows % 2 == 0).to(activations.sample.device)[activations.sample]
        self._meter.add(activations.states[true], activations.side[true])


def notes(sample: PairSample, comparison: Comparison, n_left_out: int, n_fitted: int) -> list[str]:
    """What limits the report."""
    found = [f"{error}; the pairs before that are used" for error in sample.failures]
    if comparison.n_pairs < STEADY_PAIRS:
        found.append(
            f"only {comparison.n_pairs:,} pairs are compared, so the intervals are wide; {STEADY_PAIRS:,} or more make "
            "them useful"
        )
    if n_left_out:
        found.append(
            f"{n_left_out:,} pairs are left out: they share their caption or image with more than half of the pairs"
        )
    if n_fitted < STEADY_WEIGHTS:
        found.append(f"the feature weights come from only {n_fitted:,} pairs; about 1,000 make them steady")
    fidelity = comparison.fidelity
    if fidelity.fraction_dead > 0.5:
        found.append(
            f"{fidelity.n_dead:,} of the SAE's {fidelity.n_features:,} features fire on no token of these pairs"
        )
    return found
