"""A quick look during training: can the pooled raw states tell right captions from shuffled ones?

Only training icons in new disguises and concepts held out of the training sets, never the set kept for the report.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from captions import CHOICE_TEMPLATES, test_caption
from model import MAX_TOKENS, PREFIX, TinyLlava, is_word, normalised
from scenes import COLOUR_NAMES, Icons, Item, Scene, draw
from tokenizer import encode


def plain_scenes(icons: Icons, rows: np.ndarray, templates: tuple[str, ...], rng: random.Random) -> list[Scene]:
    """One centred icon each, half on white and half on a plain colour, captioned by the templates."""
    scenes = []
    for row in rows.tolist():
        tint = rng.choice([c for c in COLOUR_NAMES if c != "white"]) if icons.mono[row] else None
        white = rng.random() < 0.5 or tint is not None
        rgb = (1.0, 1.0, 1.0) if white else (rng.random(), rng.random(), rng.random())
        caption = test_caption(icons.words[row], templates, rng, tint=tint)
        items = [Item(row, tint, (0.0, 0.0), rng.uniform(0.75, 1.0))]
        scenes.append(Scene(str(icons.names[row]), caption, rgb, items))
    return scenes


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive outranks a negative; ties count half."""
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    n = len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def _pooled(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.normalize((states.float() * is_word(ids)[..., None]).sum(1), dim=-1)


@torch.no_grad()
def raw_aucs(model: TinyLlava, icons: Icons, tokenizer, *, count: int = 256, seed: int = 5) -> dict[str, float]:
    """AUC of the raw cosine, caption alone and in context, on trained and on held-out concepts."""
    result = {}
    for split, rows in (("trained", icons.train), ("new", icons.new_concepts)):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows = np.random.default_rng(seed).permutation(rows)[:count]
        scenes = plain_scenes(icons, rows, CHOICE_TEMPLATES, rng)
        pixels = normalised(draw(icons, scenes, generator, disguise=split == "trained"))
        ids = encode(tokenizer, [s.caption for s in scenes])
        other = ids.roll(1, 0)
        with torch.autocast("cpu", torch.bfloat16):
            hook = model.hook_states(pixels, [ids, other], ids)
        image = F.normalize(hook[:, 1:PREFIX].float().mean(1), dim=-1)
        right, wrong, alone = hook[:, PREFIX:].split(MAX_TOKENS, 1)
        text = _pooled(alone, ids)
        cosines = [
            (image * t).sum(1).numpy() for t in (text, text.roll(1, 0), _pooled(right, ids), _pooled(wrong, other))
        ]
        result[f"{split}_alone"] = round(auc(cosines[0], cosines[1]), 4)
        result[f"{split}_context"] = round(auc(cosines[2], cosines[3]), 4)
    return result
