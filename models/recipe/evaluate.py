"""How well the scores tell true pairs from shuffled ones: the sweep over SAEs, the choice, the report, a cross-check.

    python models/recipe/evaluate.py sweep     every SAE and threshold on the choice split
    python models/recipe/evaluate.py report    the model as exported, on both splits, with controls
    python models/recipe/evaluate.py check     mmfilter's scores against a float64 computation of their definitions

All states, codes, weights and scores are mmfilter's own; only the cross-check computes them again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evaluate_raw import auc
from export import PROMPT
from model import HOOK_LAYER
from pairs import Split, make_tar
from sae import train_sae
from weights import reference_tar

from mmfilter.core.evaluation.fidelity import FidelityMeter
from mmfilter.core.evaluation.random_sae import random_twin
from mmfilter.core.input.decode import DecodeSettings
from mmfilter.core.input.shards import open_source
from mmfilter.core.model.backbone import Activations, Backbone
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.pipeline.feed import Batch
from mmfilter.core.pipeline.model_pass import ModelPass
from mmfilter.core.pipeline.scorer import pool_pairs
from mmfilter.core.progress import Silence
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.core.scores.crossmodal import PER_SIDE, STRONGEST, FeatureWeights, Reference, load_weights
from mmfilter.core.scores.pooled_pairs import PooledPairs
from mmfilter.core.scores.registry import formulas
from mmfilter.core.sides import IMAGE, TEXT

ROOT = Path(__file__).parents[2]
WIDTHS, KS, TOKENS = (1024, 2048, 4096), (16, 24, 32), (60_000, 160_000, 400_000)
TAU_QUANTILES = (0.0, 0.25, 0.5, 0.75)
REPORTED = (
    "similarity",
    "support",
    "saev",
    "cooccurrence",
    "l0",
    "caption length",
    "raw",
    "similarity, idf of each side",
)
OF_RANDOM_SAE = ("similarity", "support", "saev")
CONTROL_SEED, CONTROL_STEP = 3, 4
"""Of the random SAE, and which batches set its threshold and τ"""


@dataclass(frozen=True)
class States:
    """What the model made of a shard, kept so that many SAEs can be tried on it."""

    batches: list[Activations]
    rows: np.ndarray
    """(pairs,) place in the shard of each pair, in the order of the batches"""
    caption_chars: np.ndarray
    facts: list[dict]
    """The pairs' JSON, in the order of the batches"""

    @property
    def shuffled(self) -> np.ndarray:
        return np.array([f["shuffled"] for f in self.facts])


def states_of(shard: Path, backbone: Backbone) -> States:
    """Run the whole shard through the model up to the hook."""
    facts = [json.loads(raw.members["json"]) for raw in open_source(str(shard)).samples()]
    batches, rows, chars = [], [], []

    def add(batch: Batch, activations: Activations) -> None:
        batches.append(activations)
        rows.extend(pair.row for pair in batch.pairs)
        chars.extend(len(pair.caption) for pair in batch.pairs)

    with ModelPass(backbone, DecodeSettings(), batch_size=64, workers=2) as model_pass:
        model_pass.over(open_source(str(shard)).samples(), str(shard), add, Silence())
    return States(batches, np.array(rows), np.array(chars), [facts[row] for row in rows])


def weights_of(states: States, sae: SAE) -> FeatureWeights:
    """Feature weights on kept states; the same as `weights.fit` up to ties."""
    reference = Reference(sae.n_features, sae.d_model)
    for observe in (True, False):
        first = 0
        for batch in states.batches:
            token = (first + batch.sample) * (1 << 24) + batch.side * (1 << 23) + batch.position
            if observe:
                reference.observe(sae.encode(batch.states), token, batch.sample, batch.side, batch.n_samples)
            else:
                reference.add_states(batch.states, token)
            first += batch.n_samples
        if observe:
            reference.choose()
    return reference.weights({})


def idf_each_side(weights: FeatureWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Rarity by the samples in which a feature fires on the image side, and on the text side."""
    n = 1 + weights.n_samples
    return tuple(torch.log(n / (1 + counts.float())) for counts in (weights.image_samples, weights.text_samples))


def similarity_each_side(pairs: PooledPairs) -> torch.Tensor:
    """`similarity` with an idf of its own for each side."""
    image, text = idf_each_side(pairs.weights)
    return torch.nn.functional.cosine_similarity(pairs.image.mean * image, pairs.text.mean * text, dim=1)


def scores_of(states: States, sae: SAE, weights: FeatureWeights, thresholds: list[float]) -> dict[str, np.ndarray]:
    """Every score of every pair; `saev` and `cooccurrence` once more for each further threshold, as ``saev@i``."""
    columns: dict[str, list[torch.Tensor]] = {}
    for batch in states.batches:
        codes = sae.encode(batch.states)
        for i, threshold in enumerate(thresholds):
            pairs = pool_pairs(batch, codes, weights, threshold)
            names = list(formulas()) if i == 0 else []
            scores = {name: formulas()[name](pairs) for name in names} | {
                f"{n}@{i}": formulas()[n](pairs) for n in ("saev", "cooccurrence")
            }
            if i == 0:
                scores["similarity, idf of each side"] = similarity_each_side(pairs)
            for name, values in scores.items():
                columns.setdefault(name, []).append(values)
    return {name: torch.cat(parts).numpy() for name, parts in columns.items()} | {
        "caption length": states.caption_chars
    }


def aucs(scores: dict[str, np.ndarray], shuffled: np.ndarray) -> dict[str, float]:
    """AUC of true against shuffled pairs of each score."""
    return {name: round(auc(values[~shuffled], values[shuffled]), 4) for name, values in scores.items()}


def interval(values: np.ndarray, shuffled: np.ndarray, *, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the AUC, resampling pairs."""
    rng, n = np.random.default_rng(seed), len(values)
    areas = []
    for _ in range(draws):
        rows = rng.integers(0, n, n)
        v, s = values[rows], shuffled[rows]
        areas.append(auc(v[~s], v[s]))
    return tuple(np.quantile(areas, (0.025, 0.975)).tolist())


def thresholds_of(states: States, sae: SAE, weights: FeatureWeights) -> list[float]:
    """τ: 0 and quantiles of the positive maxima, both sides of all pairs together."""
    positive = []
    for batch in states.batches:
        pairs = pool_pairs(batch, sae.encode(batch.states), weights, 0.0)
        positive += [side.maximum[side.maximum > 0] for side in (pairs.image, pairs.text)]
    values = torch.cat(positive).numpy()
    return [0.0, *np.quantile(values, TAU_QUANTILES[1:]).round(3).tolist()]


# --- the sweep -------------------------------------------------------------------------------


def sweep(build: Path, model: Path, widths: list[int], tokens: list[int]) -> None:
    """Train SAEs of every width and k for several numbers of tokens; one line each with what it does on the choice
    split."""
    backbone = load_backbone(str(model), HOOK_LAYER, prompt=PROMPT)
    split = states_of(make_tar(build / "eval" / "choice.tar", "choice"), backbone)
    reference = states_of(reference_tar(build), backbone)
    print(
        "| features | k | tokens | FVU image | FVU text | L0 image | L0 text "
        "| weighted | similarity | support | saev | τ |\n" + "|---" * 12 + "|"
    )
    for n_tokens in tokens:
        folder = build / "sweep" / str(n_tokens)
        if not folder.exists():
            train_sae(
                build,
                model,
                folder,
                "--tokens",
                str(n_tokens),
                "--widths",
                ",".join(map(str, widths)),
                "--k",
                ",".join(map(str, KS)),
            )
        for path in sorted(folder.glob("width-*")):
            print(
                sweep_line(
                    load_sae(path), json.loads((path / "manifest.json").read_text())["settings"], split, reference
                ),
                flush=True,
            )


def sweep_line(sae: SAE, settings: dict, split: States, reference: States) -> str:
    """A line of a Markdown table: fidelity on the split's pairs, AUCs, and the threshold at which `saev` is best."""
    weights = weights_of(reference, sae)
    thresholds = thresholds_of(reference, sae, weights)
    by_score = aucs(scores_of(split, sae, weights, thresholds), split.shuffled)
    best = max(range(len(thresholds)), key=lambda i: by_score[f"saev@{i}"])
    meter = FidelityMeter(sae)
    for batch in split.batches:
        meter.add(batch.states, batch.side)
    image, text = meter.fidelity.image, meter.fidelity.text
    facts = [
        sae.n_features,
        settings["k"],
        settings["tokens"],
        *(f"{value:.3f}" for value in (image.fvu, text.fvu)),
        f"{image.l0:.1f}",
        f"{text.l0:.1f}",
    ]
    chosen = (by_score["similarity"], by_score["support"], by_score[f"saev@{best}"], thresholds[best])
    cells = [*facts, weights.n_weighted, *chosen]
    return "| " + " | ".join(map(str, cells)) + " |"


# --- the report ------------------------------------------------------------------------------


def report(build: Path, model: Path, threshold: float) -> dict[Split, dict[str, list[float]]]:
    """AUC with its interval of each reported score on both splits, for the exported model."""
    backbone, sae = load_backbone(str(model), HOOK_LAYER, prompt=PROMPT), load_sae(model / "sae")
    weights, reference = load_weights(model / "sae" / "weights.safetensors"), states_of(reference_tar(build), backbone)
    control = random_twin(sae, reference.batches[::CONTROL_STEP], threshold, seed=CONTROL_SEED)
    control_weights = weights_of(reference, control.sae)
    result = {}
    for name in ("choice", "report"):
        split = states_of(make_tar(build / "eval" / f"{name}.tar", name), backbone)
        scores = scores_of(split, sae, weights, [threshold])
        beside = scores_of(split, control.sae, control_weights, [control.threshold])
        wanted = {s: scores[s] for s in REPORTED} | {f"{s} of a random SAE": beside[s] for s in OF_RANDOM_SAE}
        shuffled = split.shuffled
        result[name] = {
            s: [auc(values[~shuffled], values[shuffled]), *interval(values, shuffled)] for s, values in wanted.items()
        }
    return result


# --- the cross-check -------------------------------------------------------------------------


def reference_scores(
    batch: Activations, sae: SAE, omega: np.ndarray, idf: np.ndarray, threshold: float
) -> list[dict[str, float]]:
    """The definitions again, one pair at a time, in float64 NumPy, from the residual states onwards."""
    W, b, mean, cut = (tensor.double().numpy() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold))
    states, sample, side = batch.states.double().numpy(), batch.sample.numpy(), batch.side.numpy()
    rows = []
    for s in range(batch.n_samples):
        codes = {
            which: token_codes(states[(sample == s) & (side == which)], W, b, mean, cut) for which in (IMAGE, TEXT)
        }
        u, v = codes[IMAGE].max(0), codes[TEXT].max(0)
        both = (u > threshold) & (v > threshold)
        means = [codes[which].mean(0) * idf for which in (IMAGE, TEXT)]
        raw = [states[(sample == s) & (side == which)].mean(0) for which in (IMAGE, TEXT)]
        active = sum((codes[which] > 0).sum() for which in (IMAGE, TEXT))
        rows.append(
            {
                "saev": np.nansum(np.where(both, omega, 0.0)),
                "cooccurrence": both.sum(),
                "similarity": cosine(*means),
                "support": np.minimum(u, v).sum() / max(v.sum(), 1e-12),
                "raw": cosine(*raw),
                "l0": active / sum(len(codes[which]) for which in (IMAGE, TEXT)),
            }
        )
    return rows


def token_codes(states: np.ndarray, W: np.ndarray, b: np.ndarray, mean: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """(tokens, features): activations above the threshold, the 50 strongest of a token."""
    pre = (states - mean) @ W + b
    codes = np.where(pre > np.maximum(cut, 0), pre, 0.0)
    fiftieth = np.sort(codes, 1)[:, -50][:, None]
    return np.where(codes >= fiftieth, codes, 0.0)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def reference_omega(states: States, sae: SAE) -> tuple[np.ndarray, np.ndarray]:
    """(omega, idf) by their definitions: the 30 strongest tokens, and all 25 cosines of 5 text and 5 image tokens."""
    W, b, mean, cut = (tensor.double().numpy() for tensor in (sae.W_enc, sae.b_enc, sae.b_dec, sae.threshold))
    x = torch.cat([batch.states for batch in states.batches]).double().numpy()
    side = torch.cat([batch.side for batch in states.batches]).numpy()
    first = np.cumsum([0, *(batch.n_samples for batch in states.batches)])[:-1]
    sample = np.concatenate([batch.sample.numpy() + n for batch, n in zip(states.batches, first, strict=True)])
    codes = np.concatenate([token_codes(part, W, b, mean, cut).astype(np.float32) for part in np.array_split(x, 40)])
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    omega, fires = np.full(codes.shape[1], np.nan), np.zeros(codes.shape[1])
    for j in range(codes.shape[1]):
        fires[j] = len(np.unique(sample[codes[:, j] > 0]))
        top = np.argsort(-codes[:, j], kind="stable")[:STRONGEST]
        top = top[codes[top, j] > 0]
        image, text = top[side[top] == IMAGE][:PER_SIDE], top[side[top] == TEXT][:PER_SIDE]
        if len(image) == len(text) == PER_SIDE:
            omega[j] = (unit[image] @ unit[text].T).mean()
    return omega, np.log((1 + sample.max() + 1) / (1 + fires))


def check(build: Path, model: Path, threshold: float, *, pairs: int = 200) -> dict[str, float]:
    """Largest relative difference of each of mmfilter's scores, omega and idf from the float64 computation."""
    backbone, sae = load_backbone(str(model), HOOK_LAYER, prompt=PROMPT), load_sae(model / "sae")
    reference, weights = states_of(reference_tar(build), backbone), load_weights(model / "sae" / "weights.safetensors")
    omega, idf = reference_omega(reference, sae)
    split, seen, worst = states_of(make_tar(build / "eval" / "report.tar", "report"), backbone), 0, {}
    for batch in split.batches:
        ours = pool_pairs(batch, sae.encode(batch.states), weights, threshold)
        again = reference_scores(batch, sae, omega, idf, threshold)
        for name in again[0]:
            wanted = np.array([row[name] for row in again], dtype=float)
            off = np.abs(formulas()[name](ours).double().numpy() - wanted) / np.maximum(1e-3, np.abs(wanted))
            worst[name] = max(worst.get(name, 0.0), float(off.max()))
        seen += batch.n_samples
        if seen >= pairs:
            break
    same = np.isnan(omega) == np.isnan(weights.omega.numpy())
    worst["omega"] = float(np.nanmax(np.abs(omega - weights.omega.numpy())[same]))
    return worst | {
        "idf": float(np.abs(idf - weights.idf.numpy()).max()),
        "weighted in one only": int((~same).sum()),
        "pairs": seen,
    }


def main() -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description="Evaluate the tiny model's scores.")
    parser.add_argument("what", choices=("sweep", "report", "check"))
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "recipe")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--threshold", type=float, help="default: that of models/tiny.yaml")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    options = parser.parse_args()
    if options.what == "sweep":
        sweep(options.build, options.model, options.widths, options.tokens)
        return
    threshold = options.threshold
    if threshold is None:
        import yaml

        threshold = yaml.safe_load((ROOT / "models" / "tiny.yaml").read_text())["threshold"]
    print(
        json.dumps((report if options.what == "report" else check)(options.build, options.model, threshold), indent=1)
    )


if __name__ == "__main__":
    main()
