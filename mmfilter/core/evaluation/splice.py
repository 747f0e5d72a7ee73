"""What a model's next-token loss on captions becomes when the states behind the hook layer are replaced.

The states of image and caption tokens are replaced, and only theirs: the SAE is about them, and zeroing
BOS as well would take away the place where attention rests, which makes any reconstruction look good.
SAELens replaces all but special tokens by the reconstruction and everything by zero; dictionary_learning
replaces everything in both. Figures of different choices cannot be compared.

A caption token counts where the model predicts it from what comes before it: the logits at position p
are for the token at p + 1, and only tokens of the caption are predicted. The language model's head sees
the positions of captions only, so no logits of a thousand image tokens are ever made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mmfilter.core.model.backbone import Backbone, JointStream
from mmfilter.core.model.stream import is_encoder_decoder
from mmfilter.core.sae.autoencoder import DENSE_CHUNK_ELEMENTS, SAE
from mmfilter.core.sides import TEXT

Replacement = Callable[[torch.Tensor], torch.Tensor]
"""From states (tokens, d_model) to those that stand in for them."""
LEAK = 0.1
"""Change of a logit, in standard deviations of the logits, above which a token is seen from before it. Rounding
changes them by less, in bfloat16 too, where experts are grouped otherwise."""


@dataclass(frozen=True)
class CaptionLoss:
    """Cross entropy of a batch's captions, in nats."""

    total: torch.Tensor
    """(batch,) float64: sum over the caption's predicted tokens"""
    n_tokens: torch.Tensor
    """(batch,) int64: tokens predicted"""


def why_no_loss(backbone: Backbone) -> str:
    """Why the model has no next-token loss on captions; empty where it has one, as far as its configuration says."""
    config = backbone.model.config
    name = repr(config.model_type)
    if backbone.joint_stream is None:
        return f"{name} is a dual encoder and predicts no tokens"
    if is_encoder_decoder(config):
        return f"{name} is an encoder-decoder: captions go through its encoder, which predicts no tokens"
    if getattr(config.get_text_config(), "altup_num_inputs", 1) > 1:
        return f"{name} keeps several versions of its stream, of which the SAE reconstructs one"
    if not isinstance(backbone.model.get_output_embeddings(), torch.nn.Module):
        return f"{name} has no head that predicts tokens"
    return ""


def zeros(states: torch.Tensor) -> torch.Tensor:
    """Zero-ablation."""
    return torch.zeros_like(states)


def reconstruction(sae: SAE) -> Replacement:
    """The SAE's reconstruction with all active features, in bounded memory."""
    chunk = max(1, DENSE_CHUNK_ELEMENTS // sae.n_features)

    def reconstruct(states: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [sae.decode(sae.encode(part, max_active=sae.n_features), part) for part in states.split(chunk)]
        )

    return reconstruct


@torch.inference_mode()
def caption_loss(
    stream: JointStream, tensors: dict[str, torch.Tensor], side: torch.Tensor, instead: Replacement | None = None
) -> CaptionLoss:
    """Loss of the captions of a batch through a whole model, the states of its tokens as they are or replaced.

    `tensors` and `side` (batch, length) as in `ModelInputs`, of either of its streams.
    """
    n_tokens = predicted_tokens(side).sum(1)
    total = torch.zeros(len(side), dtype=torch.float64)
    for rows, part in stream.parts(tensors):
        of_tokens = torch.nn.functional.cross_entropy(*_logits(stream, part, side[rows], instead), reduction="none")
        owner = predicted_tokens(side[rows]).nonzero()[:, 0]
        total[rows] = total[rows].index_add(0, owner, of_tokens.double().cpu())
    return CaptionLoss(total, n_tokens)


def predicted_tokens(side: torch.Tensor) -> torch.Tensor:
    """(batch, length − 1) bool: positions whose next token is of the caption."""
    return side[:, 1:] == TEXT


def _logits(
    stream: JointStream, tensors: dict[str, torch.Tensor], side: torch.Tensor, instead: Replacement | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """((tokens, vocabulary) float32, (tokens,)): what the model says of every caption token, row by row, and which
    token it is."""
    predicted = predicted_tokens(side)
    head = stream.model.get_output_embeddings()
    handles = [head.register_forward_pre_hook(lambda _head, args: (_before(args[0], predicted), *args[1:]))]
    if instead is not None:
        handles.append(
            stream.hooked.register_forward_hook(lambda _block, _args, output: _replaced(output, side >= 0, instead))
        )
    try:
        logits = stream.call(tensors).logits[0].float()
    finally:
        for handle in handles:
            handle.remove()
    return logits, tensors["input_ids"][:, 1:][predicted].to(logits.device)


def _before(hidden: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """(1, tokens, d_model): the positions from which caption tokens are predicted."""
    return hidden[:, :-1][predicted.to(hidden.device)][None]


def _replaced(output: Any, where: torch.Tensor, instead: Replacement) -> Any:
    """A block's output with the states at `where` (batch, length) replaced."""
    states = output[0] if isinstance(output, (tuple, list)) else output
    where = where.to(states.device)
    states = states.clone()
    states[where] = instead(states[where]).to(states.dtype)
    return (states, *output[1:]) if isinstance(output, (tuple, list)) else states


@torch.inference_mode()
def sees_ahead(stream: JointStream, tensors: dict[str, torch.Tensor], side: torch.Tensor) -> bool | None:
    """Whether changing a caption's last token changes what the model says of the tokens before it; None where the batch
    cannot tell.

    Models that read their prompt in both directions (PaliGemma) see the token that they should predict,
    and their loss on it is not a language model's. Needs no knowledge of the family.
    """
    rows, part = next(stream.parts(tensors))
    text = side[rows] == TEXT
    each, first = torch.arange(len(text)), text.int().argmax(1)
    last = text.shape[1] - 1 - text.flip(1).int().argmax(1)
    ids = part["input_ids"].clone()
    ids[each, last] = ids[each, first]
    if torch.equal(ids, part["input_ids"]):  # captions of one token
        return None
    before = _logits(stream, part, side[rows], None)[0]
    after = _logits(stream, part | {"input_ids": ids}, side[rows], None)[0]
    return bool((after - before).abs().max() > LEAK * before[before.isfinite()].std())
