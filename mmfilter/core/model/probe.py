"""A check that needs no knowledge of the family: which positions of the stream does the picture change?"""

from __future__ import annotations

import torch
from PIL import Image

from mmfilter.core.model.language_backbone import LanguageBackbone
from mmfilter.core.sides import IMAGE
from mmfilter.errors import ModelError


def changed_positions(backbone: LanguageBackbone) -> tuple[torch.Tensor, torch.Tensor]:
    """(length,) bool twice: positions whose embedding differs between two pictures with one caption, and those labelled
    image."""
    noise = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    pictures = [Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST) for pixels in noise]
    inputs = backbone.prepare(pictures, ["a red apple"] * 2)
    first, second = backbone.embedded(inputs.tensors).float()
    return (first - second).abs().amax(-1) > 1e-6 * first.abs().max(), (inputs.side[0] == IMAGE).to(first.device)


def check_roles(backbone: LanguageBackbone) -> None:
    """Raise `ModelError` when what the picture changes is not what the config calls image tokens.

    Run for families that nobody verified: better refused than mislabelled.
    """
    changed, labelled = changed_positions(backbone)
    if not changed.any() or (changed & ~labelled).any():
        raise ModelError(
            f"model type {backbone.model.config.model_type!r} is not among the verified families, and its image tokens "
            "are not where its config says "
            f"({int(changed.sum())} positions follow the picture, {int(labelled.sum())} are labelled image): it cannot "
            "be scored"
        )
