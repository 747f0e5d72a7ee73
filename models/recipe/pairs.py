"""Image-caption pairs in WebDataset tars: two evaluation splits and the reference sample of the feature weights.

``choice``: concepts held out of the training sets, by which settings are picked. ``report``: every icon of the set kept
apart, looked at after the choice. Both carry half of their captions shuffled among samples.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from captions import CHOICE_TEMPLATES, COLOURS, REPORT_TEMPLATES, held_out, test_caption, words_of
from icons import HELD_OUT_SET, MONO_SETS, TRAIN_SETS, Icon, icons_of, render
from PIL import Image
from scenes import Icons, draw, train_scenes

SIDE, QUALITY = 128, 90
CHOICE_DRAWS = 2
"""Pairs made of each held-out icon, with other captions and backgrounds."""
REFERENCE_SEED, REFERENCE_PAIRS = 11, 1000
TRAINING_SEED, TRAINING_PAIRS, STRETCH = 1_000_000, 20_000, 250
Split = Literal["choice", "report"]


@dataclass
class Pair:
    """One sample: encoded image, caption, and what is known of it."""

    image: bytes
    extension: str
    caption: str
    concept: str
    set: str
    new: bool
    """Whether the concept was held out of training"""
    shuffled: bool = False
    """Whether the caption is of another concept"""


def draw_icon(icon: Icon, colour: str | None, rng: random.Random) -> bytes | None:
    """JPEG of the icon, on white for half and for tinted icons, else on any plain colour; None if it cannot be
    drawn."""
    side = round(SIDE * rng.uniform(0.75, 0.95))
    white = rng.random() < 0.5 or colour is not None
    background = (255, 255, 255) if white else tuple(rng.randrange(256) for _ in range(3))
    rgba = render(icon, side)
    if rgba is None:
        return None
    if colour:
        rgba = np.concatenate([np.broadcast_to(np.uint8(COLOURS[colour]), (side, side, 3)), rgba[..., 3:]], 2)
    canvas = Image.new("RGBA", (SIDE, SIDE), background)
    canvas.alpha_composite(Image.fromarray(rgba), ((SIDE - side) // 2,) * 2)
    file = io.BytesIO()
    canvas.convert("RGB").save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def true_pairs(icons: Iterable[Icon], templates: tuple[str, ...], rng: random.Random) -> list[Pair]:
    """A pair of each icon that can be drawn."""
    pairs = []
    for icon in icons:
        colour = rng.choice([c for c in COLOURS if c != "white"]) if icon.set in MONO_SETS else None
        image, words = draw_icon(icon, colour, rng), words_of(icon.concept, "|".join(icon.names))
        if image is not None:
            caption = test_caption(words, templates, rng, tint=colour)
            pairs.append(Pair(image, "jpg", caption, words.name, icon.set, held_out(icon.concept)))
    return pairs


def shuffle_half(pairs: list[Pair], rng: random.Random) -> None:
    """Shuffle the captions of a random half; who gets a caption of the own concept does not count as shuffled."""
    chosen = rng.sample(range(len(pairs)), len(pairs) // 2)
    sources = [(pairs[i].caption, pairs[i].concept) for i in rng.sample(chosen, len(chosen))]
    for i, (caption, concept) in zip(chosen, sources, strict=True):
        pairs[i].shuffled = concept != pairs[i].concept
        pairs[i].caption = caption


def evaluation_pairs(split: Split) -> list[Pair]:
    """The pairs of a split; the same ones at each call."""
    if split == "report":
        rng = random.Random(31)
        pairs = true_pairs(icons_of(HELD_OUT_SET), REPORT_TEMPLATES, rng)
    else:
        rng = random.Random(30)
        icons = [icon for name in TRAIN_SETS for icon in icons_of(name) if held_out(icon.concept)]
        pairs = true_pairs(icons * CHOICE_DRAWS, CHOICE_TEMPLATES, rng)
    rng.shuffle(pairs)
    shuffle_half(pairs, rng)
    return pairs


def reference_pairs(icons: Icons) -> list[Pair]:
    """Training pairs without disguise, on which the feature weights are fitted."""
    return drawn_pairs(icons, REFERENCE_PAIRS, REFERENCE_SEED, disguise=False)


def training_pairs(icons: Icons) -> Iterator[Pair]:
    """Training pairs for the SAE, every other stretch of them in disguise."""
    for start in range(0, TRAINING_PAIRS, STRETCH):
        yield from drawn_pairs(icons, STRETCH, TRAINING_SEED + start, disguise=start % (2 * STRETCH) == 0)


def drawn_pairs(icons: Icons, n: int, seed: int, *, disguise: bool) -> list[Pair]:
    """Freshly drawn training pairs; the same ones for a seed."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    scenes = train_scenes(icons, n, numbers, rng)
    drawn = draw(icons, scenes, torch.Generator().manual_seed(seed), disguise=disguise)
    pixels = (drawn * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pairs = []
    for scene, image in zip(scenes, pixels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        sets = "+".join(str(icons.sets[item.icon]) for item in scene.items)
        pairs.append(Pair(file.getvalue(), "png", scene.caption, scene.concept, sets, new=False))
    return pairs


def write_tar(path: Path, pairs: Iterable[Pair]) -> None:
    """One WebDataset shard, written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, pair in enumerate(pairs):
            facts = {"concept": pair.concept, "set": pair.set, "new": pair.new, "shuffled": pair.shuffled}
            members = (
                (pair.extension, pair.image),
                ("json", json.dumps(facts).encode()),
                ("txt", pair.caption.encode()),
            )
            for extension, content in members:
                member = tarfile.TarInfo(f"{index:06d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    partial.rename(path)


def make_tar(path: Path, split: Split) -> Path:
    """The split's shard, made if it is not there."""
    if not path.exists():
        write_tar(path, evaluation_pairs(split))
    return path


def training_tar(build: Path) -> Path:
    """The shard that the SAE is trained on, made if it is not there."""
    path = build / "train.tar"
    if not path.exists():
        write_tar(path, training_pairs(Icons(build / "icons.npz")))
    return path
