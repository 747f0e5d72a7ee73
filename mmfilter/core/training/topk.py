"""Which features are active: the exact k strongest of each token, or the exact k·B strongest of a batch.

Both look at the maxima of groups of features first. A group is a set of features at equal distance, so
that the maxima are an element-wise maximum of a few long rows; the k strongest of a token lie in the k
groups with the largest maxima, and only those are looked into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from mmfilter.core.sae.token_codes import TokenCodes
from mmfilter.core.training import collective

Chunks = Callable[[], Iterable[tuple[int, torch.Tensor]]]
"""Gives (first token, h (tokens, features)) of every chunk of a batch, again at each call"""
Triples = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Token, feature, value; each (entries,)"""
Refine = Callable[[TokenCodes], TokenCodes]
"""Gives candidates their exact values, where h is rounded"""
GROUP = 16
"""Features of a group when looking for what lies above a bound"""
MARGIN = 0.9
"""Part of the last threshold above which the next one is looked for"""
SURPLUS = 4
"""Candidates for each place, at most, before the bound is raised"""


def strongest_of_each(chunks: Chunks, k: int, n_tokens: int, n_features: int) -> TokenCodes:
    """The k largest of each token, exactly k a token in the order of the tokens; they may be negative."""
    return _joined([_topk(start, pre, k) for start, pre in chunks()], n_tokens, n_features)


def _topk(start: int, pre: torch.Tensor, k: int) -> Triples:
    tokens, n = pre.shape
    size = _divisor(n, int((n / k) ** 0.5))  # as many maxima to sort as members of the chosen groups
    maxima = pre.view(tokens, size, n // size).amax(1)
    groups = maxima.topk(k, dim=1, sorted=False).indices
    members = (groups.unsqueeze(1) + torch.arange(0, n, n // size, device=pre.device).view(1, -1, 1)).flatten(1)
    value, place = pre.gather(1, members).topk(k, dim=1, sorted=False)
    token = torch.arange(start, start + tokens, device=pre.device).repeat_interleave(k)
    return token, members.gather(1, place).flatten(), value.flatten()


def _divisor(n: int, at_most: int) -> int:
    """Largest power of two that divides n and is at most that."""
    size = 1
    while n % (2 * size) == 0 and 2 * size <= at_most:
        size *= 2
    return size


class BatchTopK:
    """Chooses the k·B strongest positive activations, batch after batch.

    The threshold of a batch is close to the last one's, so one pass over the chunks collects what lies above
    a bound a little below it; where that turns out to be too little, the pass is repeated with a lower bound.
    So the choice is exact whatever the bound was, and it is made over all processes together. Activations
    equal to the smallest one chosen are chosen too.
    """

    def __init__(self) -> None:
        self._bound: float | None = None

    def choose(
        self,
        chunks: Chunks,
        k: int,
        n_tokens: int,
        n_features: int,
        *,
        device: torch.device,
        refine: Refine | None = None,
    ) -> tuple[TokenCodes, torch.Tensor]:
        """The chosen codes and the threshold: the smallest chosen activation, or 0 if all that is positive is too
        little."""
        first = _first_bound(chunks, k) if self._bound is None else self._bound
        wanted = k * collective.total(n_tokens, device)
        for bound in (first, first / 2, first / 4, 0.0):
            candidates = _joined(_above_all(chunks(), bound, wanted), n_tokens, n_features)
            if collective.total(len(candidates), candidates.value.device) >= wanted:
                break
        if refine is not None:
            candidates = refine(candidates).positive()
        threshold = kth_largest(candidates.value, wanted)
        self._bound = MARGIN * float(threshold)
        return candidates.where(candidates.value >= threshold), threshold


def _first_bound(chunks: Chunks, k: int) -> float:
    """MARGIN of the k-th largest activation of a token, in the mean over the first chunk; the same in every process."""
    _, pre = next(iter(chunks()))
    bound = MARGIN * pre.topk(k, dim=1).values[:, -1].float().mean().clamp(min=0)
    collective.maximum_(bound)
    return float(bound)


def _above_all(chunks: Iterable[tuple[int, torch.Tensor]], bound: float, wanted: int) -> list[Triples]:
    """What is positive and at least `bound`, of each chunk; the bound rises where so many are held that it must be too
    low."""
    parts: list[Triples] = []
    for start, pre in chunks:
        parts.append(_above(start, pre, max(bound, torch.finfo(pre.dtype).tiny)))
        if sum(len(value) for *_, value in parts) > SURPLUS * wanted:
            values = torch.cat([value for *_, value in parts])
            bound = float(values.kthvalue(len(values) - wanted + 1).values)
            parts = [_at_least(bound, *part) for part in parts]
    return parts


def _at_least(bound: float, token: torch.Tensor, feature: torch.Tensor, value: torch.Tensor) -> Triples:
    inside = value >= bound
    return token[inside], feature[inside], value[inside]


def _above(start: int, pre: torch.Tensor, bound: float) -> Triples:
    tokens, n = pre.shape
    size = _divisor(n, GROUP)
    token, group = (pre.view(tokens, size, n // size).amax(1) >= bound).nonzero(as_tuple=True)
    members = group.unsqueeze(1) + torch.arange(0, n, n // size, device=pre.device)
    values = pre[token.unsqueeze(1), members]
    which, place = (values >= bound).nonzero(as_tuple=True)
    return token[which] + start, members[which, place], values[which, place]


def _joined(parts: list[Triples], n_tokens: int, n_features: int) -> TokenCodes:
    token, feature, value = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenCodes(token, feature, value if value.dtype == torch.float64 else value.float(), n_tokens, n_features)


def kth_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of positive floats over all processes, exactly; 0 where there are fewer than k.

    Positive floats are in the order of their bits, so each round counts sixteen bits of the values that agree
    with those found so far; only the counts are exchanged.
    """
    width = 8 * values.element_size()
    bits = values.view(torch.int32 if width == 32 else torch.int64)
    if collective.total(len(values), values.device) < k:
        return values.new_zeros(())
    prefix = 0
    for shift in range(width - 16, -1, -16):
        digit = (bits >> shift) & 0xFFFF
        counts = torch.bincount(digit, minlength=1 << 16)
        collective.sum_(counts)
        at_least = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(at_least, k))
        if place:
            k -= int(at_least[place - 1])
        best = 0xFFFF - place
        prefix = prefix << 16 | best
        bits = bits[digit == best]
    return torch.tensor(prefix, dtype=bits.dtype, device=values.device).view(values.dtype)
