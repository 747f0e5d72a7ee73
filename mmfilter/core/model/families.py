"""Where families of models differ from the rule: tokens that carry the image id and are no part of the image."""

from __future__ import annotations

from typing import Any

import torch

NEWLINE_FAMILIES = ("llava_next", "llava_onevision")
"""After the tokens of the whole image come the rows of its enlargement, each ended by one learned constant."""


def newline_mask(processor: Any, config: Any, tensors: dict[str, torch.Tensor], is_image: torch.Tensor) -> torch.Tensor:
    """(batch, length) bool: image-newline tokens among `is_image`; all False in families that have none."""
    mask = torch.zeros_like(is_image)
    if config.model_type not in NEWLINE_FAMILIES or "image_sizes" not in tensors:
        return mask
    for i, (height, width) in enumerate(tensors["image_sizes"].tolist()):
        rows, columns = enlarged_grid(processor, config, height, width)
        positions = is_image[i].nonzero()[:, 0]
        base = len(positions) - rows * (columns + 1)
        ends = base + torch.arange(1, rows + 1) * (columns + 1) - 1
        mask[i, positions[ends]] = True
    return mask


def enlarged_grid(processor: Any, config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of the enlarged image, without its padding."""
    from transformers.image_processing_utils import select_best_resolution

    vision = config.vision_config
    best = select_best_resolution([height, width], processor.image_processor.image_grid_pinpoints)
    side = vision.image_size // vision.patch_size
    scale = [length // vision.image_size for length in best]
    tokens, rows = processor._get_unpadded_features(height, width, side, side, *scale)
    return rows, tokens // rows
