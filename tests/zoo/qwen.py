"""Families whose images take a number of tokens that depends on their size: Qwen-VL, GLM-4V, Gemma."""

from __future__ import annotations

from typing import Any

import transformers as T

from mmfilter.core.model.processors import ImagesOnly
from tests.zoo.build import SIGLIP_VISION, TEXT, VOCABULARY, Specimen, family, pil, tokenizer

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
QWEN_TEXT = {**TEXT, "rope_parameters": ROPE}
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{caption}<|im_end|>\n"
SIZES = ((120, 80), (64, 140))
VISION = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
VISION_3 = {**VISION, "patch_size": 16, "num_position_embeddings": 64}


def _qwen(config: Any, model: Any, processor: Any, text: dict, vision: dict, patch: int) -> Specimen:
    tok = tokenizer(NAMED, ("<|im_start|>", "<|im_end|>"), bos=False)
    ids = {f"{name}_id": getattr(tok, f"{name}_id") for name in NAMED}
    images = pil("Qwen2VLImageProcessor")(
        size={"shortest_edge": (4 * patch) ** 2, "longest_edge": 4 * (4 * patch) ** 2}, patch_size=patch
    )
    return Specimen(
        model(config(text_config=text, vision_config=vision, **ids)),
        processor(images, tok, ImagesOnly()),
        PROMPT,
        SIZES,
    )


@family
def qwen2_vl() -> Specimen:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return _qwen(T.Qwen2VLConfig, T.Qwen2VLForConditionalGeneration, T.Qwen2VLProcessor, QWEN_TEXT, vision, 14)


@family
def qwen2_5_vl() -> Specimen:
    vision = {**VISION, "depth": 2, "patch_size": 14, "fullatt_block_indexes": [1], "window_size": 56}
    return _qwen(T.Qwen2_5_VLConfig, T.Qwen2_5_VLForConditionalGeneration, T.Qwen2_5_VLProcessor, QWEN_TEXT, vision, 14)


@family
def qwen3_vl() -> Specimen:
    vision = {**VISION_3, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    return _qwen(
        T.Qwen3VLConfig, T.Qwen3VLForConditionalGeneration, T.Qwen3VLProcessor, {**QWEN_TEXT, "head_dim": 8}, vision, 16
    )


@family
def qwen3_vl_moe() -> Specimen:
    text = {**QWEN_TEXT, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = {**VISION_3, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    return _qwen(T.Qwen3VLMoeConfig, T.Qwen3VLMoeForConditionalGeneration, T.Qwen3VLProcessor, text, vision, 16)


@family
def qwen3_5() -> Specimen:
    text = {
        **TEXT,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
    }
    return _qwen(
        T.Qwen3_5Config, T.Qwen3_5ForConditionalGeneration, T.Qwen3VLProcessor, text, {**VISION_3, "depth": 2}, 16
    )


@family
def glm4v() -> Specimen:
    ends = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tok = tokenizer({"image_token": "<|image|>", "video_token": "<|video|>"}, ends, bos=False)
    ids = dict(
        zip(
            ("image_start_token_id", "image_end_token_id", "video_start_token_id", "video_end_token_id"),
            tok.convert_tokens_to_ids(list(ends)),
            strict=True,
        )
    )
    vision = {**VISION, "depth": 2, "image_size": 56, "patch_size": 14}
    text = {**TEXT, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}
    config = T.Glm4vConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
        **ids,
    )
    images = pil("Glm4vImageProcessor")(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})
    prompt = "<|user|>\n<|begin_of_image|><|image|><|end_of_image|>{caption}"
    return Specimen(T.Glm4vForConditionalGeneration(config), T.Glm4vProcessor(images, tok, ImagesOnly()), prompt, SIZES)


GEMMA_NAMED = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "audio_token": "<audio_soft_token>",
    "boa_token": "<start_of_audio>",
    "eoa_token": "<end_of_audio>",
}
GEMMA_TEXT = {
    **TEXT,
    "head_dim": 8,
    "sliding_window": 16,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}


@family
def gemma3() -> Specimen:
    tok = tokenizer(GEMMA_NAMED, ("<start_of_turn>", "<end_of_turn>"))
    config = T.Gemma3Config(
        text_config=GEMMA_TEXT,
        vision_config=SIGLIP_VISION,
        mm_tokens_per_image=4,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    images = pil("Gemma3ImageProcessor")(size={"height": 56, "width": 56}, image_seq_length=4)
    prompt = "<start_of_turn>user\n<start_of_image>{caption}<end_of_turn>\n"
    return Specimen(
        T.Gemma3ForConditionalGeneration(config), T.Gemma3Processor(images, tok, image_seq_length=4), prompt
    )


@family
def gemma4() -> Specimen:
    named = {**GEMMA_NAMED, "image_token": "<|image|>", "audio_token": "<|audio|>"}
    tok = tokenizer(named, ("<|video|>",))
    text = {name: value for name, value in GEMMA_TEXT.items() if name != "query_pre_attn_scalar"}
    text |= {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 8,
        "num_global_key_value_heads": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 16,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    }
    ids = {
        f"{name}_id": getattr(tok, f"{name}_id")
        for name in ("boi_token", "eoi_token", "image_token", "audio_token", "boa_token")
    }
    config = T.Gemma4Config(
        text_config=text,
        audio_config=None,
        vision_config=vision,
        video_token_id=tok.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=tok.eoa_token_id,
        **ids,
    )
    images = pil("Gemma4ImageProcessor")(patch_size=16, pooling_kernel_size=2, max_soft_tokens=70)
    processor = T.Gemma4Processor(T.Gemma4AudioFeatureExtractor(), images, tok, ImagesOnly(), image_seq_length=70)
    return Specimen(T.Gemma4ForConditionalGeneration(config), processor, "<|turn>user\n<|image|>{caption}<turn|>\n")
