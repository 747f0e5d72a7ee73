"""Shuffled captions: every pair gets the caption of another pair, one that is not its own under any guise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shuffle_captions(captions: Sequence[str], images: Sequence[str], *, seed: int) -> np.ndarray:
    """(n,) int64: the pair whose caption each pair gets, −1 for a pair that is left out.

    No pair gets a caption with the words of its own (case and spaces aside) or a caption of the same
    image (`images` names the content): data such as COCO has five captions an image, and all of them
    are true. Pairs that are tied by a shared caption or image, directly or through others, form a group,
    and a caption never stays in its group. The captions handed out are those of the pairs that get one,
    each once, so that true and shuffled pairs hold the same captions and the same images.

    Pairs are left out only when one group holds more than half of them: then as many of its pairs stay
    as there are others.
    """
    group = _groups([[_plain(caption) for caption in captions], images])
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(group))
    size = np.bincount(group) if len(group) else np.zeros(1, dtype=np.int64)
    place = rng.permutation(len(size))
    line = order[
        np.lexsort((place[group[order]], -size[group[order]]))
    ]  # largest group first, groups and pairs in random order
    largest, rest = int(size.max()), len(line) - int(size.max())
    line = line[max(0, largest - rest) :]
    source = np.full(len(group), -1, dtype=np.int64)
    # a step as long as the largest group leaves every group, since each is one stretch of the line
    source[line] = np.roll(line, -min(largest, rest))
    return source


def _plain(caption: str) -> str:
    return " ".join(caption.split()).casefold()


def _groups(names: Sequence[Sequence[str]]) -> np.ndarray:
    """(n,) numbers of the groups of items that share a name in one of the lists, directly or through others."""
    parent = list(range(len(names[0])))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for column in names:
        first: dict[str, int] = {}
        for item, name in enumerate(column):
            a, b = root(first.setdefault(name, item)), root(item)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root(item) for item in range(len(parent))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1].reshape(-1)
