"""The scores once more: plain float64 on dense arrays, one pair at a time, straight from the definitions.

Written without a look at `mmfilter.core`, so that the two can only agree by both being right.
"""

from __future__ import annotations

import numpy as np

AT_MOST = 50


def dense_codes(states: np.ndarray, sae: dict[str, np.ndarray], *, k: int | None, subtract: bool) -> np.ndarray:
    """f_t(j) of every token, (tokens, features): active features, positive, the 50 strongest a token."""
    x = states.astype(np.float64)
    if subtract:
        x = x - sae["b_dec"]
    pre = x @ sae["W_enc"] + sae["b_enc"]
    f = np.maximum(pre, 0)
    if "threshold" in sae:
        f = np.where(pre > sae["threshold"], f, 0)
    for row in f:
        keep = min(AT_MOST, k or AT_MOST)
        row[np.argsort(-row, kind="stable")[keep:]] = 0
    return f


def pair_scores(image_states, text_states, image_codes, text_codes, omega, idf, threshold) -> dict[str, float]:
    """All scores of one pair from the states and dense codes of its two sides."""
    u, v = image_codes.max(0), text_codes.max(0)
    both = [j for j in range(len(u)) if u[j] > threshold and v[j] > threshold]
    n_image, n_text = len(image_codes), len(text_codes)

    def cosine(a, b):
        norm = np.sqrt((a * a).sum()) * np.sqrt((b * b).sum())
        return float((a * b).sum() / norm) if norm else 0.0

    l0 = {"image": (image_codes > 0).sum(), "text": (text_codes > 0).sum()}
    l1 = {"image": image_codes.sum(), "text": text_codes.sum()}
    return {
        "saev": float(sum(omega[j] for j in both if not np.isnan(omega[j]))),
        "cooccurrence": float(len(both)),
        "l0": (l0["image"] + l0["text"]) / (n_image + n_text),
        "l0_image": l0["image"] / n_image,
        "l0_text": l0["text"] / n_text,
        "l1": (l1["image"] + l1["text"]) / (n_image + n_text),
        "l1_image": l1["image"] / n_image,
        "l1_text": l1["text"] / n_text,
        "similarity": cosine(image_codes.mean(0) * idf, text_codes.mean(0) * idf),
        "support": float(np.minimum(u, v).sum() / v.sum()) if v.sum() else 0.0,
        "raw": cosine(image_states.mean(0), text_states.mean(0)),
    }


def crossmodal(
    states: list[tuple[np.ndarray, np.ndarray]], codes: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """(ω, idf) from the (image, text) states and codes of a reference sample, by brute force."""
    all_states = np.concatenate([side for pair in states for side in pair]).astype(np.float64)
    all_codes = np.concatenate([side for pair in codes for side in pair])
    is_text = np.concatenate([np.full(len(side), which) for pair in codes for which, side in enumerate(pair)]).astype(
        bool
    )
    unit = all_states / np.linalg.norm(all_states, axis=1, keepdims=True)
    omega = np.full(all_codes.shape[1], np.nan)
    for j in range(all_codes.shape[1]):
        order = np.argsort(-all_codes[:, j], kind="stable")[:30]
        order = order[all_codes[order, j] > 0]
        text, image = order[is_text[order]][:5], order[~is_text[order]][:5]
        if len(text) == 5 and len(image) == 5:
            omega[j] = np.mean([unit[t] @ unit[i] for t in text for i in image])
    df = sum(((image > 0).any(0) | (text > 0).any(0)).astype(int) for image, text in codes)
    return omega, np.log((1 + len(codes)) / (1 + df))
