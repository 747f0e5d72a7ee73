"""Which part of the picture an image token came from, family by family.

Every function returns, for the image tokens of one picture in stream order, a box (x0, y0, x1, y1) in units
of the original picture (0 to 1 from left and from top; parts of a box may lie outside where a family pads), or
None for tokens without a place: row ends, class tokens. The box is where the token's patch lies; the vision
tower's attention mixes patches, so it is a position and no attribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Box = tuple[float, float, float, float]
Boxes = list[Box | None]


@dataclass(frozen=True)
class Picture:
    """One picture as a processor saw it."""

    config: Any
    """The model's"""
    processor: Any
    width: int
    height: int
    """Pixels of the original"""
    tensors: dict[str, torch.Tensor]
    """The picture's row of every tensor that the processor made"""
    n_tokens: int
    """Image tokens of its stream, row ends included"""

    @property
    def side(self) -> int:
        """Side of the grid when all tokens are one square of patches."""
        return math.isqrt(self.n_tokens)


Rule = Callable[[Picture], Boxes]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def grid(rows: int, columns: int, inside: Box = WHOLE) -> Boxes:
    """Cells of a regular grid over `inside`, row by row."""
    x0, y0, x1, y1 = inside
    wide, high = (x1 - x0) / columns, (y1 - y0) / rows
    return [
        (x0 + c * wide, y0 + r * high, x0 + (c + 1) * wide, y0 + (r + 1) * high)
        for r in range(rows)
        for c in range(columns)
    ]


def squashed(picture: Picture) -> Boxes:
    """The whole picture, stretched to a square of patches."""
    return grid(picture.side, picture.side)


def padded(picture: Picture) -> Boxes:
    """The picture centred on a square of its longest edge."""
    longest = max(picture.width, picture.height)
    x, y = (longest - picture.width) / 2 / picture.width, (longest - picture.height) / 2 / picture.height
    return grid(picture.side, picture.side, (-x, -y, 1 + x, 1 + y))


def _centre_crop(picture: Picture, size: int) -> Box:
    """What is left after scaling the shortest edge to `size` and cutting a square out of the middle."""
    shortest = min(picture.width, picture.height)
    width, height = int(size * picture.width / shortest), int(size * picture.height / shortest)
    left, top = (width - size) // 2, (height - size) // 2
    return left / width, top / height, (left + size) / width, (top + size) / height


def cropped(picture: Picture) -> Boxes:
    """LLaVA 1.5: a square out of the picture's middle; its sides are never seen. A class token comes first if kept."""
    vision = picture.config.vision_config
    side = vision.image_size // vision.patch_size
    first: Boxes = [None] * (picture.n_tokens - side * side)
    return first + grid(side, side, _centre_crop(picture, vision.image_size))


def cropped_codes(picture: Picture) -> Boxes:
    """Chameleon: a square out of the middle as one code a cell."""
    return grid(
        picture.side, picture.side, _centre_crop(picture, picture.processor.image_processor.crop_size["height"])
    )


def anyres(picture: Picture) -> Boxes:
    """LLaVA-NeXT and OneVision: the whole picture squashed, then its enlargement row by row, each row ended by a
    newline."""
    vision = picture.config.vision_config
    side = vision.image_size // vision.patch_size
    rows, columns = _enlarged_grid(picture, side)
    base = grid(side, side)
    missing = picture.n_tokens - len(base) - rows * (columns + 1)
    if missing:
        raise ValueError(f"expected {picture.n_tokens - missing} image tokens, the stream has {picture.n_tokens}")
    cells = grid(rows, columns, _unpadded(picture, side))
    return base + [box for row in range(rows) for box in [*cells[row * columns : (row + 1) * columns], None]]


def _canvas(picture: Picture) -> tuple[int, int]:
    """Height and width of the canvas of tiles that the processor chose."""
    from transformers.image_processing_utils import select_best_resolution

    return select_best_resolution(
        (picture.height, picture.width), picture.processor.image_processor.image_grid_pinpoints
    )


def _enlarged_grid(picture: Picture, side: int) -> tuple[int, int]:
    """Rows and columns of tokens of the enlarged picture, without its padding."""
    scale = [length // picture.config.vision_config.image_size for length in _canvas(picture)]
    tokens, rows = picture.processor._get_unpadded_features(  # noqa: SLF001 (transformers' own arithmetic)
        picture.height, picture.width, side, side, *scale
    )
    return rows, tokens // rows


def _unpadded(picture: Picture, _side: int) -> Box:
    """The part of the picture that the enlargement's kept cells cover: cells that are padding only are cut away."""
    high, wide = _canvas(picture)
    patch = picture.config.vision_config.patch_size
    scale = min(wide / picture.width, high / picture.height)
    # the picture on the canvas, in pixels: scaled to fit, centred
    if wide / picture.width < high / picture.height:
        width, height = wide, min(math.ceil(picture.height * scale), high)
    else:
        width, height = min(math.ceil(picture.width * scale), wide), high
    left, top = (wide - width) // 2, (high - height) // 2
    # the cells that the model keeps of (high, wide) / patch
    rows, columns = high // patch, wide // patch
    if picture.width / picture.height > columns / rows:
        cut_x, cut_y = 0, (rows - int(round(picture.height * (columns / picture.width), 7))) // 2
    else:
        cut_x, cut_y = (columns - int(round(picture.width * (rows / picture.height), 7))) // 2, 0
    x0, y0 = (cut_x * patch - left) / width, (cut_y * patch - top) / height
    x1, y1 = ((columns - cut_x) * patch - left) / width, ((rows - cut_y) * patch - top) / height
    return x0, y0, x1, y1


def code_rows(picture: Picture) -> Boxes:
    """Emu3: one code a cell, each row ended by an end-of-line token."""
    rows, columns = (int(length) // picture.processor.downsample_ratio for length in picture.tensors["image_sizes"])
    cells = grid(rows, columns)
    return [box for row in range(rows) for box in [*cells[row * columns : (row + 1) * columns], None]]


def merged_patches(picture: Picture) -> Boxes:
    """Qwen-VL and GLM-4V: the whole picture, resized to a multiple of the patch, 2 × 2 patches a token."""
    frames, rows, columns = picture.tensors["image_grid_thw"].tolist()
    merge = picture.config.vision_config.spatial_merge_size
    return grid(rows // merge, columns // merge) * frames


def pan_and_scan(picture: Picture) -> Boxes:
    """Gemma 3: the whole picture squashed; with pan and scan its crops follow, along the longer edge."""
    each = picture.config.mm_tokens_per_image
    side, crops = math.isqrt(each), picture.n_tokens // each - 1
    boxes = grid(side, side)
    across, down = (crops, 1) if picture.width >= picture.height else (1, crops)
    for i in range(crops):
        wide, high = (
            math.ceil(picture.width / across) / picture.width,
            math.ceil(picture.height / down) / picture.height,
        )
        x, y = (i * wide, 0.0) if down == 1 else (0.0, i * high)
        boxes += grid(side, side, (x, y, min(x + wide, 1.0), min(y + high, 1.0)))
    return boxes


def pooled_patches(picture: Picture) -> Boxes:
    """Gemma 4: the whole picture at its own aspect ratio, square neighbourhoods of patches pooled."""
    places = picture.tensors["image_position_ids"]
    places = places[(places >= 0).all(-1)]
    kernel = picture.config.vision_config.pooling_kernel_size
    columns, rows = ((places.max(0).values + 1) // kernel).tolist()
    return grid(rows, columns)


def tagged_tiles(picture: Picture) -> Boxes:
    """Idefics3 and SmolVLM: tiles, each announced by `<row_r_col_c>` in the text, then the whole picture."""
    tokenizer, side = picture.processor.tokenizer, math.isqrt(picture.processor.image_seq_len)
    tags = {tokenizer.convert_tokens_to_ids(f"<row_{r}_col_{c}>"): (r, c) for r in range(1, 7) for c in range(1, 7)}
    tags.pop(tokenizer.unk_token_id, None)
    tiles = [tags[token] for token in picture.tensors["input_ids"].tolist() if token in tags]
    rows, columns = (max((tile[i] for tile in tiles), default=0) for i in (0, 1))
    boxes: Boxes = []
    for row, column in tiles:
        boxes += grid(side, side, ((column - 1) / columns, (row - 1) / rows, column / columns, row / rows))
    return boxes + grid(side, side)


def _tiles(rows: int, columns: int, side: int) -> Boxes:
    return [
        box
        for r in range(rows)
        for c in range(columns)
        for box in grid(side, side, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows))
    ]


def tiles_then_whole(picture: Picture) -> Boxes:
    """InternVL and Aya Vision: tiles row by row, the whole picture last."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    images = picture.processor.image_processor
    tile = (images.size["height"], images.size["width"])
    columns, rows = get_optimal_tiled_canvas(
        (picture.height, picture.width), tile, images.min_patches, images.max_patches
    )
    several = rows * columns > 1
    side = math.isqrt(picture.n_tokens // (rows * columns + several))
    return _tiles(rows, columns, side) + (grid(side, side) if several else [])


def whole_then_tiles(picture: Picture) -> Boxes:
    """Ovis2: the whole picture first, then tiles row by row."""
    from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid

    images = picture.processor.image_processor
    columns, rows = get_min_tile_covering_grid(
        (picture.height, picture.width), images.size["height"], images.max_patches
    )
    several = rows * columns > 1
    side = math.isqrt(picture.n_tokens // (rows * columns + several))
    return (grid(side, side) if several else []) + _tiles(rows, columns, side)


def rows_with_breaks(picture: Picture) -> Boxes:
    """Pixtral and Mistral 3: the whole picture at its own aspect ratio; row breaks are tokens of their own."""
    patch = picture.processor.patch_size * picture.processor.spatial_merge_size
    rows, columns = (int(length) // patch for length in picture.tensors["image_sizes"])
    return grid(rows, columns)
