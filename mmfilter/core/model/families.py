"""Where families of models differ from the rule, one small entry each.

The rule (`backbone`): image tokens take the place of one id in the stream of a causal language model. What a
family needs beyond it is said here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmfilter.core.model import boxes
from mmfilter.core.model.boxes import Rule


@dataclass(frozen=True)
class Family:
    """One family's differences."""

    boxes: Rule | None = None
    """From image tokens to parts of the picture; None where tokens have no place"""
    no_place: str = ""
    """Why tokens have no place"""
    constant_row_ends: bool = False
    """Tokens without a place are learned constants (image newlines): neither image nor text"""
    one_size: bool = False
    """A picture's tokens change with the padding to its batch: only pictures of one size go together"""
    placeholder: str = "image_token"
    """Attribute of the processor that holds what a prompt writes for an image; empty: nothing is written"""
    refused: str = ""
    """Why the family cannot be scored"""


LATENTS = "a Q-Former or perceiver turns the picture into latent tokens that have no place in it"

FAMILIES: dict[str, Family] = {
    "llava": Family(boxes.cropped),
    "vipllava": Family(boxes.cropped),
    "llava_next": Family(boxes.anyres, constant_row_ends=True),
    "llava_onevision": Family(boxes.anyres, constant_row_ends=True),
    "pixtral": Family(boxes.rows_with_breaks),
    "mistral3": Family(boxes.rows_with_breaks),
    "chameleon": Family(boxes.cropped_codes),
    "janus": Family(boxes.padded),
    "deepseek_vl": Family(boxes.padded),
    "emu3": Family(boxes.code_rows, constant_row_ends=True, one_size=True),
    "qwen2_vl": Family(boxes.merged_patches),
    "qwen2_5_vl": Family(boxes.merged_patches),
    "qwen3_vl": Family(boxes.merged_patches),
    "qwen3_vl_moe": Family(boxes.merged_patches),
    "qwen3_5": Family(boxes.merged_patches),
    "glm4v": Family(boxes.merged_patches),
    "gemma3": Family(boxes.pan_and_scan, placeholder="boi_token"),
    "gemma3n": Family(boxes.squashed),
    "gemma4": Family(boxes.pooled_patches),
    "paligemma": Family(boxes.squashed),
    "idefics2": Family(no_place=LATENTS),
    "idefics3": Family(boxes.tagged_tiles),
    "smolvlm": Family(boxes.tagged_tiles),
    "internvl": Family(boxes.tiles_then_whole),
    "aya_vision": Family(boxes.tiles_then_whole),
    "ovis2": Family(boxes.whole_then_tiles),
    "blip-2": Family(no_place=LATENTS, placeholder=""),
    "instructblip": Family(no_place=LATENTS, placeholder=""),
    "florence2": Family(
        no_place="its vision tower attends in windows; where a token's patch lies was not established", placeholder=""
    ),
    "mllama": Family(
        refused=(
            "it reads the picture through cross-attention layers, so its text stream has no image tokens to compare "
            "with the caption's"
        )
    ),
    "idefics": Family(
        refused=(
            "it reads the picture through cross-attention layers, so its text stream has no image tokens to compare "
            "with the caption's"
        )
    ),
    "git": Family(
        refused="it puts image tokens in front of the text inside the model, where its processor's ids do not show them"
    ),
}
UNKNOWN = Family(no_place="this family is not in the table of those that were verified")


def family_name(config: Any) -> str:
    """The entry's name: the model type, except for Pixtral, which is published as a LLaVA."""
    vision = getattr(getattr(config, "vision_config", None), "model_type", None)
    return "pixtral" if config.model_type == "llava" and vision == "pixtral" else config.model_type


def family_of(config: Any) -> Family:
    """The entry of a model's family, `UNKNOWN` where there is none."""
    return FAMILIES.get(family_name(config), UNKNOWN)
