"""LLaVA and its kin: a vision tower, a projector, placeholders in the stream of a causal language model."""

from __future__ import annotations

from typing import Any

import transformers as T

from mmfilter.core.model.processors import ImagesOnly, pixtral_processor
from tests.zoo.build import CLIP_VISION, SIGLIP_VISION, SMALL_VISION, TEXT, Specimen, family, pil, tokenizer

USER = "USER: <image>\n{caption} ASSISTANT:"
PINPOINTS = [[56, 112], [112, 56], [112, 112]]
WIDE = ((160, 60), (100, 120))


def clip_images() -> Any:
    return pil("CLIPImageProcessor")(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})


def llava_processor(tok: Any, images: Any, cls: Any = T.LlavaProcessor) -> Any:
    return cls(images, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)


@family
def llava() -> Specimen:
    tok = tokenizer({"image_token": "<image>"})
    config = T.LlavaConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=CLIP_VISION, image_token_index=tok.image_token_id
    )
    return Specimen(T.LlavaForConditionalGeneration(config), llava_processor(tok, clip_images()), USER)


@family
def vipllava() -> Specimen:
    tok = tokenizer({"image_token": "<image>"})
    config = T.VipLlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=CLIP_VISION,
        image_token_index=tok.image_token_id,
        vision_feature_layers=[-2, 1],
    )
    return Specimen(T.VipLlavaForConditionalGeneration(config), llava_processor(tok, clip_images()), USER)


def _llava_next(text: str) -> Specimen:
    tok = tokenizer({"image_token": "<image>"})
    config = T.LlavaNextConfig(
        text_config={"model_type": text, **TEXT},
        vision_config=CLIP_VISION,
        image_token_index=tok.image_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    images = pil("LlavaNextImageProcessor")(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
    )
    return Specimen(
        T.LlavaNextForConditionalGeneration(config), llava_processor(tok, images, T.LlavaNextProcessor), USER, WIDE
    )


@family
def llava_next_mistral() -> Specimen:
    return _llava_next("mistral")


@family
def llava_next_llama3() -> Specimen:
    return _llava_next("llama")


@family
def llava_onevision() -> Specimen:
    tok = tokenizer({"image_token": "<image>", "video_token": "<video>"}, bos=False)
    config = T.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=SIGLIP_VISION,
        image_token_index=tok.image_token_id,
        video_token_index=tok.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    images = pil("LlavaOnevisionImageProcessor")(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS)
    processor = T.LlavaOnevisionProcessor(
        images, tok, video_processor=ImagesOnly(), num_image_tokens=16, vision_feature_select_strategy="full"
    )
    return Specimen(T.LlavaOnevisionForConditionalGeneration(config), processor, "<s>user <image>\n{caption}</s>", WIDE)


@family
def paligemma() -> Specimen:
    tok = tokenizer({"image_token": "<image>"}, bos=False)
    config = T.PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, "vocab_size": 1800, "head_dim": 8},
        vision_config={**SIGLIP_VISION, "projection_dim": 32},
        projection_dim=32,
        hidden_size=32,
        image_token_index=tok.image_token_id,
        vocab_size=1800,
    )
    images = pil("SiglipImageProcessor")(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    return Specimen(T.PaliGemmaForConditionalGeneration(config), T.PaliGemmaProcessor(images, tok), "<image>{caption}")


@family
def deepseek_vl() -> Specimen:
    tok = tokenizer({"image_token": "<image_placeholder>"})
    config = T.DeepseekVLConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=SIGLIP_VISION, image_token_id=tok.image_token_id
    )
    images = pil("DeepseekVLImageProcessor")(size={"height": 56, "width": 56})
    return Specimen(
        T.DeepseekVLForConditionalGeneration(config),
        T.DeepseekVLProcessor(images, tok, num_image_tokens=16),
        "User: <image_placeholder>{caption}",
    )


def _pixtral(model: Any, config: Any, merge: int, **options: Any) -> Specimen:
    tok = tokenizer({"image_token": "[IMG]"}, ("[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"))
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 128,
        "patch_size": 16,
    }
    made = config(
        text_config={"model_type": "mistral", **TEXT, "head_dim": 8},
        vision_config=vision,
        image_token_index=tok.image_token_id,
        **options,
    )
    processor = pixtral_processor()(
        pil("PixtralImageProcessor")(size={"longest_edge": 128}, patch_size=16),
        tok,
        patch_size=16,
        spatial_merge_size=merge,
    )
    return Specimen(model(made), processor, "[INST][IMG]{caption}[/INST]", ((120, 80), (64, 140)))


@family
def pixtral() -> Specimen:
    """Pixtral-12B is published as a LLaVA."""
    return _pixtral(
        T.LlavaForConditionalGeneration,
        T.LlavaConfig,
        1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


@family
def mistral3() -> Specimen:
    return _pixtral(T.Mistral3ForConditionalGeneration, T.Mistral3Config, 2, spatial_merge_size=2)


@family
def internvl() -> Specimen:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tok = tokenizer(named, bos=False)
    vision = {**SMALL_VISION, "image_size": [56, 56], "patch_size": [14, 14]}
    config = T.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=vision,
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = pil("GotOcr2ImageProcessor")(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    processor = T.InternVLProcessor(images, tok, ImagesOnly(), image_seq_length=4)
    return Specimen(
        T.InternVLForConditionalGeneration(config),
        processor,
        "<|im_start|>user\n<IMG_CONTEXT>\n{caption}<|im_end|>\n",
        WIDE,
    )


@family
def aya_vision() -> Specimen:
    extra = (
        "<|START_OF_IMG|>",
        "<|END_OF_IMG|>",
        "<|IMG_PATCH|>",
        "<|IMG_LINE_BREAK|>",
        "TILE_GLOBAL",
        *(f"TILE_{i}" for i in range(1, 13)),
    )
    tok = tokenizer({"image_token": "<image>"}, extra)
    text = {
        "model_type": "cohere2",
        **TEXT,
        "head_dim": 8,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "sliding_window": 32,
    }
    config = T.AyaVisionConfig(
        text_config=text,
        vision_config=SIGLIP_VISION,
        image_token_index=tok.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    images = pil("GotOcr2ImageProcessor")(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    processor = T.AyaVisionProcessor(images, tok, patch_size=14, img_size=56, downsample_factor=2)
    return Specimen(T.AyaVisionForConditionalGeneration(config), processor, "<s><image>{caption}", WIDE)


@family
def ovis2() -> Specimen:
    names = ("<img>", "</img>", "<pre>", "<col>", "<row>")
    tok = tokenizer(
        {"image_token": "<image>"}, ("<IMG_ATOM>", "<IMG>", "</IMG>", "<COL>", "<ROW>", "<PRE>", *names), bos=False
    )
    vision = {**SMALL_VISION, "vocab_size": 32, "hidden_stride": 2, "num_visual_indicator_tokens": 5}
    config = T.Ovis2Config(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config=vision,
        image_token_id=tok.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=[tok.convert_tokens_to_ids(name) for name in names],
        vocab_size=TEXT["vocab_size"],
        hidden_size=32,
    )
    images = pil("Ovis2ImageProcessor")(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=4)
    return Specimen(
        T.Ovis2ForConditionalGeneration(config),
        T.Ovis2Processor(images, tok, image_seq_length=4),
        "<|im_start|>user\n<image>\n{caption}",
        WIDE,
    )


def _idefics(config: Any, model: Any, processor: Any, images: str, *video: Any) -> Specimen:
    rows = tuple(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7))
    tok = tokenizer(
        {"image_token": "<image>"},
        ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows),
        bos=False,
    )
    made = config(
        text_config={"model_type": "llama", **TEXT},
        vision_config=SMALL_VISION,
        scale_factor=2,
        image_token_id=tok.image_token_id,
    )
    made_images = pil(images)(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return Specimen(
        model(made),
        processor(made_images, tok, *video, image_seq_len=4),
        "<s>User:<image>{caption}<end_of_utterance>\n",
    )


@family
def idefics3() -> Specimen:
    return _idefics(T.Idefics3Config, T.Idefics3ForConditionalGeneration, T.Idefics3Processor, "Idefics3ImageProcessor")


@family
def smolvlm() -> Specimen:
    return _idefics(
        T.SmolVLMConfig, T.SmolVLMForConditionalGeneration, T.SmolVLMProcessor, "SmolVLMImageProcessor", ImagesOnly()
    )


@family
def idefics2() -> Specimen:
    tok = tokenizer(
        {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>"}, ("<end_of_utterance>",)
    )
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 6,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "num_key_value_heads": 1,
    }
    config = T.Idefics2Config(
        text_config={"model_type": "mistral", **TEXT},
        vision_config=SMALL_VISION,
        perceiver_config=perceiver,
        image_token_id=tok.image_token_id,
    )
    images = pil("Idefics2ImageProcessor")(size={"longest_edge": 56, "shortest_edge": 28}, do_image_splitting=False)
    processor = T.Idefics2Processor(images, tok, image_seq_len=6)
    return Specimen(T.Idefics2ForConditionalGeneration(config), processor, "User:<image>{caption}<end_of_utterance>\n")
