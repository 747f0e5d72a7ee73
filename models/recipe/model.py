"""The tiny model: a genuine LLaVA (CLIP ViT, projector, Llama) small enough to train on a CPU, and its hook.

The hook is the residual stream after decoder layer index 1. Training reads image, caption in context and caption
alone from one packed sequence; users read the same states through transformers' own forward (`export.verify` compares).
"""

from __future__ import annotations

import torch
from scenes import IMAGE_SIZE
from tokenizer import BOS, EOS, IMAGE, MAX_TOKENS, PAD, VOCABULARY
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PATCH = 12
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
WIDTH = 192
HOOK_LAYER = 1
"""Index of the decoder layer whose output the SAE reads."""
PIXEL_MEAN, PIXEL_STD = 0.5, 0.28
PREFIX = 1 + IMAGE_TOKENS
"""Tokens before a caption: ``<s>`` and the image."""


def build_llava() -> LlavaForConditionalGeneration:
    """An untrained model: ViT 6 x 192 on 60 px in patches of 12, Llama 4 x 192 with tied embeddings; 4.95 M
    parameters."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu_pytorch_tanh",
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"  # noqa: SLF001 (how transformers is told)
    return LlavaForConditionalGeneration(config)


def packed_mask(captions_in_context: int) -> torch.Tensor:
    """Who may attend to whom (1, 1, L, L) in [<s>, image, caption 1 … caption n, caption alone].

    Each caption sees the prefix and itself only, the last one ``<s>`` and itself only; all of it causal.
    """
    length = PREFIX + MAX_TOKENS * (captions_in_context + 1)
    mask = torch.zeros(length, length, dtype=torch.bool)
    mask[:PREFIX, :PREFIX] = torch.ones(PREFIX, PREFIX, dtype=torch.bool).tril()
    triangle = torch.ones(MAX_TOKENS, MAX_TOKENS, dtype=torch.bool).tril()
    for block in range(captions_in_context + 1):
        start = PREFIX + block * MAX_TOKENS
        stop = start + MAX_TOKENS
        mask[start:stop, start:stop] = triangle
        mask[start:stop, : PREFIX if block < captions_in_context else 1] = True
    return mask[None, None]


def packed_positions(captions_in_context: int) -> torch.Tensor:
    """Rotary positions (1, L): every caption in context follows the image, the caption alone follows ``<s>``."""
    caption = torch.arange(MAX_TOKENS)
    blocks = [torch.arange(PREFIX), *[caption + PREFIX] * captions_in_context, caption + 1]
    return torch.cat(blocks)[None]


class TinyLlava(nn.Module):
    """The LLaVA and the four scalars of its training losses."""

    def __init__(self) -> None:
        super().__init__()
        self.llava = build_llava()
        self.contrast_scale = nn.Parameter(torch.tensor(2.7))
        self.match_scale = nn.Parameter(torch.tensor(2.3))
        self.match_bias = nn.Parameter(torch.tensor(-2.0))
        self.choice_scale = nn.Parameter(torch.tensor(2.3))

    def image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        """Projected image tokens (b, 25, 192) of normalised pixels (b, 3, 60, 60)."""
        parts = self.llava.model
        tower = getattr(parts.vision_tower, "vision_model", parts.vision_tower)
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers:
            hidden = layer(hidden, attention_mask=None)
        return parts.multi_modal_projector(hidden[:, 1:])

    def hook_states(self, pixels: torch.Tensor, captions: list[torch.Tensor], alone: torch.Tensor) -> torch.Tensor:
        """Residual stream (b, L, 192) at the hook of one packed sequence; ``captions`` see the image, ``alone`` not."""
        decoder = self.llava.model.language_model
        image = self.image_embeddings(pixels)
        start = decoder.embed_tokens(torch.full((len(alone), 1), BOS))
        texts = [decoder.embed_tokens(ids) for ids in (*captions, alone)]
        hidden = torch.cat([start, image.to(start.dtype), *texts], 1)
        rotary = decoder.rotary_emb(hidden, packed_positions(len(captions)))
        mask = packed_mask(len(captions))
        for layer in decoder.layers[: HOOK_LAYER + 1]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return hidden

    def caption_logits(self, hook: torch.Tensor) -> torch.Tensor:
        """Next-token logits (b, 20, 4096) for the first caption in context, from the hook states onwards."""
        decoder = self.llava.model.language_model
        length = PREFIX + MAX_TOKENS
        hidden = hook[:, :length]
        rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        for layer in decoder.layers[HOOK_LAYER + 1 :]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return self.llava.lm_head(decoder.norm(hidden[:, PREFIX - 1 : length - 1]))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [0, 1] as the vision tower takes them."""
    return (images - PIXEL_MEAN) / PIXEL_STD


def is_word(ids: torch.Tensor) -> torch.Tensor:
    """Which tokens are of the caption: neither padding nor ``</s>``."""
    return ids > EOS
