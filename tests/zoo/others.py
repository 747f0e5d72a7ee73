"""Families of other shapes: early fusion with VQ tokens, Q-Formers, encoder-decoders, cross-attention, two towers."""

from __future__ import annotations

from typing import Any

import transformers as T
from tokenizers import AddedToken

from tests.zoo.build import CLIP_VISION, SIGLIP_VISION, SMALL_VISION, TEXT, VOCABULARY, Specimen, family, pil, tokenizer
from tests.zoo.llava import clip_images

IDS = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}


@family
def chameleon() -> Specimen:
    """Also Anole, which is a Chameleon whose image head was trained on."""
    names = tuple("IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(i)) + "Z" for i in range(16))
    tok = tokenizer(
        {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}, names, sep_token="</s>"
    )
    quantiser = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "resolution": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": None,
    }
    vocabulary = {name: tok.convert_tokens_to_ids(name) for name in (*names, "<image>")}
    config = T.ChameleonConfig(**TEXT, vocabulary_map=vocabulary, vq_config=quantiser)
    images = pil("ChameleonImageProcessor")(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return Specimen(
        T.ChameleonForConditionalGeneration(config),
        T.ChameleonProcessor(images, tok, image_seq_length=64),
        "<image>{caption}",
    )


@family
def janus() -> Specimen:
    tok = tokenizer(
        {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    )
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 64,
        "patch_size": 16,
        "projection_dim": 32,
        "num_image_tokens": 16,
    }
    quantiser = {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 32,
        "image_token_embed_dim": 32,
        "num_patches": 4,
    }
    config = T.JanusConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config=vision,
        vq_config=quantiser,
        image_token_id=tok.image_token_id,
    )
    images = pil("JanusImageProcessor")(size={"height": 64, "width": 64}, min_size=14)
    prompt = "<|User|>: <image_placeholder>\n{caption}\n\n<|Assistant|>:"
    return Specimen(T.JanusForConditionalGeneration(config), T.JanusProcessor(images, tok, num_image_tokens=16), prompt)


@family
def emu3() -> Specimen:
    codes = tuple(f"<|visual token {i:06d}|>" for i in range(16))
    named = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
        "eol_token": "<|extra_200|>",
    }
    tok = tokenizer(named, codes, bos=False)
    vocabulary = {name: tok.convert_tokens_to_ids(name) for name in (*codes, "<image>", "<|extra_200|>")}
    quantiser = {
        "codebook_size": 16,
        "embed_dim": 4,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "hidden_size": 32,
    }
    config = T.Emu3Config(
        vocabulary_map=vocabulary, text_config={**TEXT, "attention_dropout": 0.0}, vq_config=quantiser
    )
    images = pil("Emu3ImageProcessor")(min_pixels=48 * 48, max_pixels=64 * 64)
    return Specimen(
        T.Emu3ForConditionalGeneration(config),
        T.Emu3Processor(images, tok),
        "You are. USER: <image>{caption} ASSISTANT:",
    )


@family
def mllama() -> Specimen:
    tok = tokenizer({"image_token": "<|image|>"}, ("<|python_tag|>",))
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {**TEXT, "vocab_size": len(tok) - 1, "cross_attention_layers": [1, 3], "rope_parameters": rope}
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "intermediate_size": 64,
        "vision_output_dim": 96,
        "image_size": 56,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }
    config = T.MllamaConfig(text_config=text, vision_config=vision, image_token_index=tok.image_token_id)
    images = pil("MllamaImageProcessor")(size={"height": 56, "width": 56}, max_image_tiles=4)
    return Specimen(T.MllamaForConditionalGeneration(config), T.MllamaProcessor(images, tok), "<|image|>{caption}")


OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
    **IDS,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_heads": 4,
    "pad_token_id": 256,
    "eos_token_id": 258,
    "decoder_start_token_id": 256,
    "dropout_rate": 0.0,
}


def _blip(config: Any, model: Any, text: dict, *, instruct: bool) -> Specimen:
    tok = tokenizer()
    tok.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    q_former = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": 32,
        "pad_token_id": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    made = config(
        vision_config=SMALL_VISION,
        qformer_config=q_former,
        text_config=text,
        num_query_tokens=5,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )
    images = pil("BlipImageProcessor")(size={"height": 56, "width": 56})
    processor = (
        T.InstructBlipProcessor(images, tok, tokenizer(), num_query_tokens=5)
        if instruct
        else T.Blip2Processor(images, tok, num_query_tokens=5)
    )
    return Specimen(model(made), processor, "Question: {caption} Answer:")


@family
def blip2_opt() -> Specimen:
    return _blip(T.Blip2Config, T.Blip2ForConditionalGeneration, OPT, instruct=False)


@family
def blip2_t5() -> Specimen:
    return _blip(T.Blip2Config, T.Blip2ForConditionalGeneration, T5, instruct=False)


@family
def instructblip_llama() -> Specimen:
    return _blip(
        T.InstructBlipConfig, T.InstructBlipForConditionalGeneration, {"model_type": "llama", **TEXT}, instruct=True
    )


@family
def instructblip_t5() -> Specimen:
    return _blip(T.InstructBlipConfig, T.InstructBlipForConditionalGeneration, T5, instruct=True)


@family
def florence2() -> Specimen:
    tok = tokenizer({"image_token": "<image>"}, bos=False)
    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 512,
        "decoder_start_token_id": 258,
        "dropout": 0.0,
        **IDS,
    }
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }
    config = T.Florence2Config(
        text_config=text, vision_config=vision, image_token_id=tok.image_token_id, is_encoder_decoder=True
    )
    images = pil("CLIPImageProcessor")(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 65
    return Specimen(T.Florence2ForConditionalGeneration(config), T.Florence2Processor(images, tok), "{caption}")


TOWER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    **IDS,
}


@family
def clip() -> Specimen:
    tok = tokenizer(side="right", eos=True)
    text = {**TOWER, "max_position_embeddings": 77, "projection_dim": 24}
    config = T.CLIPConfig(text_config=text, vision_config={**CLIP_VISION, "hidden_size": 48}, projection_dim=24)
    return Specimen(T.CLIPModel(config), T.CLIPProcessor(clip_images(), tok), "{caption}")


@family
def siglip() -> Specimen:
    config = T.SiglipConfig(
        text_config={**TOWER, "max_position_embeddings": 64}, vision_config={**SIGLIP_VISION, "vision_use_head": True}
    )
    images = pil("SiglipImageProcessor")(size={"height": 56, "width": 56})
    return Specimen(T.SiglipModel(config), T.SiglipProcessor(images, tokenizer(bos=False, side="right")), "{caption}")


@family
def siglip2() -> Specimen:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_patches": 16,
        "patch_size": 16,
    }
    config = T.Siglip2Config(text_config={**TOWER, "max_position_embeddings": 64}, vision_config=vision)
    images = pil("Siglip2ImageProcessor")(patch_size=16, max_num_patches=16)
    pieces = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"<0x{i:02X}>" for i in range(256)),
    ]
    tok = T.Siglip2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_eos_token=True)
    return Specimen(T.Siglip2Model(config), T.Siglip2Processor(images, tok), "{caption}", ((120, 80), (64, 140)))
