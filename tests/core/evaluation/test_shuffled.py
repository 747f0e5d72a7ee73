"""Shuffled captions: nobody keeps a true caption, every caption is handed out once, as few as possible are left out."""

from __future__ import annotations

import numpy as np
import pytest

from mmfilter.core.evaluation.shuffled import shuffle_captions


def images(n: int) -> list[str]:
    return [f"image {i}" for i in range(n)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_captions_that_differ_all_move(n, seed):
    source = shuffle_captions([f"caption {i}" for i in range(n)], images(n), seed=seed)
    assert sorted(source) == list(range(n)) and (source != np.arange(n)).all()


@pytest.mark.parametrize("seed", range(20))
def test_nobody_keeps_the_words_of_the_own_caption(seed):
    rng = np.random.default_rng(seed)
    captions = [f"caption {i}" for i in rng.zipf(1.5, 80) % 30]
    source = shuffle_captions(captions, images(80), seed=seed)
    kept = np.flatnonzero(source >= 0)
    assert all(captions[i] != captions[source[i]] for i in kept)
    assert sorted(source[kept]) == sorted(kept)  # those who get a caption give theirs
    most = max(map(captions.count, captions))
    assert len(kept) == min(
        80, 2 * (80 - most)
    )  # as many as there can be: each of the most frequent needs one that is not


def test_case_and_spaces_do_not_make_another_caption():
    source = shuffle_captions(["A  dog\n", "a dog", "a cat", "A CAT"], images(4), seed=0)
    assert all({i, int(source[i])} not in ({0, 1}, {2, 3}) for i in range(4))


@pytest.mark.parametrize("seed", range(10))
def test_captions_of_one_image_stay_away_from_it(seed):
    """Five captions an image, as in COCO: all of them are true."""
    of_five = [f"image {i // 5}" for i in range(50)]
    source = shuffle_captions([f"caption {i}" for i in range(50)], of_five, seed=seed)
    assert sorted(source) == list(range(50))
    assert all(of_five[i] != of_five[source[i]] for i in range(50))


def test_a_caption_of_most_pairs_leaves_some_out():
    source = shuffle_captions(["image"] * 7 + ["a", "b", "c"], images(10), seed=0)
    assert (source >= 0).sum() == 6 and (source[7:] >= 0).all()
    assert (shuffle_captions(["the same"] * 5, images(5), seed=0) == -1).all()
    assert shuffle_captions(["alone"], ["image"], seed=0).tolist() == [-1]
    assert shuffle_captions([], [], seed=0).tolist() == []


def test_the_seed_decides():
    captions = [f"caption {i}" for i in range(50)]
    once, again, other = (shuffle_captions(captions, images(50), seed=seed) for seed in (1, 1, 2))
    assert (once == again).all() and (once != other).any()


def test_any_other_caption_is_as_likely():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), shuffle_captions(list("abcde"), images(5), seed=seed)] += 1
    assert (np.diag(counts) == 0).all()
    assert abs(counts[~np.eye(5, dtype=bool)] / 2000 - 0.25).max() < 0.05
