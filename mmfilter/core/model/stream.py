"""Where image and text tokens live together inside a model: the blocks of that stream, and which of its tokens are the
image's."""

from __future__ import annotations

from typing import Any

import torch

from mmfilter.errors import ModelError

BLOCK_LISTS = ("layers", "block", "blocks", "h", "layer")


def is_encoder_decoder(config: Any) -> bool:
    """Whether pairs go through a text *encoder* (BLIP-2 with T5, Florence-2): the joint stream is there."""
    return bool(
        getattr(config, "is_encoder_decoder", False) or getattr(config.get_text_config(), "is_encoder_decoder", False)
    )


def stream_layers(model: Any) -> torch.nn.ModuleList:
    """The blocks through which image and text tokens go together; raises `ModelError` where none can be found."""
    stack = _encoder(model) if is_encoder_decoder(model.config) else _decoder(model)
    for part in (
        stack,
        getattr(stack, "decoder", None),
        getattr(stack, "encoder", None),
        getattr(stack, "model", None),
    ):
        for name in BLOCK_LISTS:
            blocks = getattr(part, name, None)
            if isinstance(blocks, torch.nn.ModuleList) and len(blocks):
                return blocks
    raise ModelError(
        f"{type(model).__name__} has no list of text layers that can be hooked: this family is not supported"
    )


def check_layer(blocks: torch.nn.ModuleList, layer: int) -> None:
    """Raise `ModelError` when there is no such layer."""
    if not 0 <= layer < len(blocks):
        raise ModelError(f"layer {layer} is not in the model, which has layers 0 to {len(blocks) - 1}")


def cut_after(blocks: torch.nn.ModuleList, layer: int) -> None:
    """Drop the blocks behind `layer`; raises `ModelError` when there is no such layer."""
    check_layer(blocks, layer)
    del blocks[layer + 1 :]


def _decoder(model: Any) -> Any:
    decoder = model.get_decoder()
    while (
        hasattr(decoder, "get_decoder") and decoder.get_decoder() is not decoder
    ):  # a language model with its head inside another
        decoder = decoder.get_decoder()
    return decoder


def _encoder(model: Any) -> Any:
    language = (
        getattr(model, "language_model", None)
        or getattr(getattr(model, "model", None), "language_model", None)
        or model
    )
    return language.get_encoder()


def image_token_id(config: Any) -> int:
    """The id that marks image tokens in `input_ids`: the one that the model itself replaces by its image features.

    The processor's own attribute of that name is another token in some families (Gemma 3, Ovis2, Llama 4).
    """
    for holder in (config, getattr(config, "vision_config", None)):
        value = getattr(holder, "image_token_id", None)
        if isinstance(value, int):
            return value
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    if "<image>" in vocabulary:
        return vocabulary["<image>"]
    raise ModelError(
        f"model type {config.model_type!r} names no image token in its config (image_token_id): its image tokens "
        "cannot be told from text; "
        "a newer conversion of the model may name it"
    )
