"""Image-caption pairs drawn from rendered icons: which icons, on what background, in which disguise.

The disguises (colour shifts, outlines, blur, geometry) are strong on purpose: the model has to recognise another
vendor's drawing of the same thing, and what it lacks there is not fit but generalisation.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import COLOURS, held_out, pair_caption, train_caption, words_of
from icons import HELD_OUT_SET, MONO_SETS

IMAGE_SIZE = 60
"""Pixels a side, after compositing."""
COLOUR_NAMES = list(COLOURS)
COLOUR_VALUES = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
FROM_YIQ = torch.linalg.inv(TO_YIQ)


@dataclass(frozen=True)
class Item:
    """One icon in a scene: its row, its tint, its centre in [-1, 1]² and its scale (1 = fills the image)."""

    icon: int
    tint: str | None
    centre: tuple[float, float]
    scale: float


@dataclass
class Scene:
    """A pair before rendering. ``background`` is an RGB triple in [0, 1]."""

    concept: str
    caption: str
    background: tuple[float, float, float]
    items: list[Item] = field(default_factory=list)


class Icons:
    """The rendered icons with their words, and the splits by concept and by set."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.pixels, self.sets, self.concepts = data["pixels"], data["set"], data["concept"]
        self.words = [words_of(c, n) for c, n in zip(self.concepts.tolist(), data["names"].tolist(), strict=True)]
        self.names = np.array([w.name for w in self.words])
        self.mono = np.isin(self.sets, MONO_SETS)
        new = np.array([held_out(c) for c in self.concepts.tolist()])
        unseen_set = self.sets == HELD_OUT_SET
        self.train = np.flatnonzero(~new & ~unseen_set)
        self.new_concepts = np.flatnonzero(new & ~unseen_set)
        self.other_vendor = np.flatnonzero(unseen_set)
        self.other_vendor_new = np.flatnonzero(unseen_set & new)
        self.weights = self._weights()

    def _weights(self) -> np.ndarray:
        """Sampling weights of the training icons: a concept counts as the root of its drawings, mono icons for less."""
        _, inverse, counts = np.unique(self.concepts[self.train], return_inverse=True, return_counts=True)
        weight = counts[inverse] ** -0.5 * np.where(self.mono[self.train], 0.35, 1.0)
        return weight / weight.sum()


def _tint(icons: Icons, icon: int, avoid: str | None, rng: random.Random) -> str | None:
    if not icons.mono[icon]:
        return None
    return rng.choice([c for c in COLOUR_NAMES if c != avoid])


def _background(rng: random.Random) -> tuple[str | None, tuple[float, float, float]]:
    """White for two in five, a named colour for two in five, else any colour; the name is None for the last."""
    draw = rng.random()
    if draw < 0.4:
        return "white", (1.0, 1.0, 1.0)
    if draw < 0.8:
        name = rng.choice(COLOUR_NAMES)
        return name, tuple(c / 255 for c in COLOURS[name])
    return None, (rng.random(), rng.random(), rng.random())


def train_scene(icons: Icons, icon: int, partner: int, rng: random.Random, *, pair_share: float = 0.12) -> Scene:
    """A training pair: one icon, or two side by side or stacked for ``pair_share`` of the scenes."""
    background, rgb = _background(rng)
    mentioned = background if background and rng.random() < 0.18 else None
    tint = _tint(icons, icon, background, rng)
    concept = str(icons.names[icon])
    if rng.random() < pair_share:
        other = _tint(icons, partner, background, rng)
        wide = rng.random() < 0.5
        centres = ((-0.5, 0.0), (0.5, 0.0)) if wide else ((0.0, -0.5), (0.0, 0.5))
        items = [Item(icon, tint, centres[0], 0.5), Item(partner, other, centres[1], 0.5)]
        sides = ((icons.words[icon].name, tint), (icons.words[partner].name, other))
        phrases = [f"{colour} {name}" if colour else name for name, colour in sides]
        caption = pair_caption(*phrases, rng, side_by_side=wide, background=mentioned)
        return Scene(f"{concept}+{icons.names[partner]}", caption, rgb, items)
    caption = train_caption(icons.words[icon], rng, tint=tint, background=mentioned)
    return Scene(concept, caption, rgb, [Item(icon, tint, (0.0, 0.0), rng.uniform(0.6, 1.05))])


def train_scenes(icons: Icons, count: int, numbers: np.random.Generator, rng: random.Random) -> list[Scene]:
    """``count`` training pairs by the sampling weights."""
    drawn = numbers.choice(icons.train, (2, count), p=icons.weights)
    return [train_scene(icons, int(a), int(b), rng) for a, b in drawn.T]


def _rand(n: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=generator)


def _some(n: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Boolean (n,): a random choice of about ``share`` of n."""
    return torch.rand(n, generator=generator) < share


def shift_colours(rgb: torch.Tensor, tinted: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Jitter hue, saturation, contrast and brightness of (n, 3, h, w); a tinted icon keeps its named colour."""
    n = len(rgb)
    free = (~tinted).float()
    hue = torch.randn(n, generator=generator) * 0.22 * free
    saturation = torch.where(_some(n, 0.08, generator), torch.zeros(n), _rand(n, 0.55, 1.45, generator))
    saturation = torch.where(tinted, torch.ones(n), saturation)
    value = _rand(n, 0.8, 1.2, generator)
    cos, sin, zero = hue.cos() * saturation, hue.sin() * saturation, torch.zeros(n)
    rotate = torch.stack(
        [torch.stack([value, zero, zero], 1), torch.stack([zero, cos, -sin], 1), torch.stack([zero, sin, cos], 1)], 1
    )
    matrix = FROM_YIQ @ rotate @ TO_YIQ
    mixed = torch.bmm(matrix, rgb.flatten(2)).view_as(rgb)
    contrast = (_rand(n, 0.75, 1.3, generator) * free + (1 - free))[:, None, None, None]
    return ((mixed - 0.5) * contrast + 0.5).clamp(0, 1)


def outline(rgba: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a dark or white line around the chosen ones of (n, 4, h, w), as stickers and some vendors have it."""
    if not chosen.any():
        return rgba
    some = rgba[chosen]
    wide = F.max_pool2d(some[:, 3:], 5, 1, 2)
    shade = (torch.rand(len(some), generator=generator) < 0.5).float()[:, None, None, None]
    line = shade * (wide - some[:, 3:])
    rgba = rgba.clone()
    rgba[chosen] = torch.cat([some[:, :3] * some[:, 3:] + line, wide], 1)
    rgba[chosen, :3] /= rgba[chosen, 3:].clamp(min=1e-3)
    return rgba


def place(rgba: torch.Tensor, items: list[Item], *, disguise: bool, generator: torch.Generator) -> torch.Tensor:
    """Move premultiplied icons (n, 4, 64, 64) to their centre and scale, with an affine wobble in disguise."""
    n = len(items)
    scale = torch.tensor([i.scale for i in items])
    centre = torch.tensor([i.centre for i in items])
    angle, aspect = torch.zeros(n), torch.ones(n)
    shear = torch.zeros(n)
    if disguise:
        centre = centre + _rand(2 * n, -0.08, 0.08, generator).view(n, 2)
        angle = torch.randn(n, generator=generator) * 0.15
        aspect, shear = _rand(n, 0.86, 1.16, generator), torch.randn(n, generator=generator) * 0.08
    cos, sin = angle.cos(), angle.sin()
    inverse = torch.stack(
        [torch.stack([cos, -sin + shear], 1) / (scale * aspect)[:, None], torch.stack([sin, cos], 1) / scale[:, None]],
        1,
    )
    theta = torch.cat([inverse, -(inverse @ centre[:, :, None])], 2)
    grid = F.affine_grid(theta, (n, 4, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", align_corners=False)


def degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, posterise, gamma and noise, each on a part of (n, 3, s, s), as resized and recompressed files show."""
    n, side = len(images), images.shape[-1]
    blurred = _some(n, 0.15, generator)
    if blurred.any():
        small = F.interpolate(images[blurred], scale_factor=0.55, mode="area")
        images[blurred] = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    flat = _some(n, 0.06, generator)
    images[flat] = (images[flat] * 4).round() / 4
    dark = _some(n, 0.3, generator)
    images[dark] = images[dark] ** _rand(int(dark.sum()), 0.7, 1.4, generator)[:, None, None, None]
    noisy = _some(n, 0.4, generator)
    strength = _rand(int(noisy.sum()), 0.0, 0.05, generator)[:, None, None, None]
    images[noisy] += strength * torch.randn(images[noisy].shape, generator=generator)
    return images.clamp(0, 1)


def _tinted_rgb(items: list[Item], rgb: torch.Tensor, *, disguise: bool, generator: torch.Generator) -> torch.Tensor:
    """Paint the mono icons of (n, 3, h, w) in their named colour."""
    colours = torch.stack([COLOUR_VALUES[COLOUR_NAMES.index(i.tint)] if i.tint else torch.zeros(3) for i in items])
    if disguise:
        colours = (colours + 0.05 * torch.randn(colours.shape, generator=generator)).clamp(0, 1)
    tinted = torch.tensor([i.tint is not None for i in items])[:, None, None, None]
    return torch.where(tinted, colours[:, :, None, None], rgb)


def draw(icons: Icons, scenes: list[Scene], generator: torch.Generator, *, disguise: bool) -> torch.Tensor:
    """Render scenes to (n, 3, 60, 60) in [0, 1]; ``disguise`` turns the augmentation on."""
    owner = torch.tensor([s for s, scene in enumerate(scenes) for _ in scene.items])
    items = [item for scene in scenes for item in scene.items]
    rgba = torch.from_numpy(icons.pixels[[i.icon for i in items]]).permute(0, 3, 1, 2).float() / 255
    rgba[:, :3] = _tinted_rgb(items, rgba[:, :3], disguise=disguise, generator=generator)
    if disguise:
        tinted = torch.tensor([i.tint is not None for i in items])
        rgba[:, :3] = shift_colours(rgba[:, :3], tinted, generator)
        rgba = outline(rgba, _some(len(items), 0.12, generator), generator)
    rgba[:, :3] *= rgba[:, 3:]
    placed = place(rgba, items, disguise=disguise, generator=generator)
    canvas = torch.tensor([s.background for s in scenes])[:, :, None, None].repeat(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    second = torch.cat([torch.tensor([False]), owner[1:] == owner[:-1]])
    for layer in (~second, second):
        rows = owner[layer]
        canvas[rows] = canvas[rows] * (1 - placed[layer, 3:]) + placed[layer, :3]
    return degrade(canvas, generator) if disguise else canvas.clamp(0, 1)
