"""What all models have in common: batches in, residual states of a pair's tokens out.

Models with one stream of image and text tokens are in `language_backbone`, dual encoders in `towers`, loading in
`loading`.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from mmfilter.core.model.boxes import Boxes
from mmfilter.core.sides import IMAGE, TEXT

TextContext = Literal["image", "none"]


@dataclass(frozen=True)
class ModelInputs:
    """A batch, ready for the model, on the CPU."""

    tensors: dict[str, torch.Tensor]
    side: torch.Tensor
    """(batch, length) int8: IMAGE, TEXT, or −1 for neither (BOS, template, padding)"""
    text_only: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None
    """The same captions without an image, and their `side`, for text context `none`"""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """(width, height) of every picture, in pixels"""

    @property
    def tokens(self) -> torch.Tensor:
        """(batch, 2): number of image and of text tokens."""
        text = self.side if self.text_only is None else self.text_only[1]
        return torch.stack([(self.side == IMAGE).sum(1), (text == TEXT).sum(1)], 1)

    @property
    def lengths(self) -> torch.Tensor:
        """(batch,): positions of the model's that each pair takes, padding aside."""
        if "attention_mask" not in self.tensors:
            return torch.full((len(self.side),), self.longest)
        return self.tensors["attention_mask"].sum(1)

    @property
    def longest(self) -> int:
        """Positions that the batch takes, padding included."""
        return self.tensors["input_ids"].shape[1]


@dataclass(frozen=True)
class Activations:
    """Residual states of the image and text tokens of a batch, as one list of tokens."""

    states: torch.Tensor
    """(n_tokens, d_model), in the model's dtype"""
    sample: torch.Tensor
    """(n_tokens,) int64: which pair of the batch"""
    side: torch.Tensor
    """(n_tokens,) int64: IMAGE or TEXT"""
    position: torch.Tensor
    """(n_tokens,) int64: place in the pair's stream"""
    n_samples: int


class Backbone(Protocol):
    """What scoring, evaluation and training ask of a model, whatever its architecture."""

    model: Any
    """The model itself, of whatever class transformers has for it"""
    layer: int
    """The layer whose states are taken, −1 for the space that two towers share"""
    prompt: str
    """What stands around a caption"""
    text_context: TextContext
    """What the captions' states see"""

    @property
    def joint_stream(self) -> JointStream | None:
        """The model as one stream of image and caption tokens; None for dual encoders, whose captions see no image."""

    @property
    def device(self) -> torch.device:
        """Where the states come out."""

    @property
    def d_model(self) -> int:
        """Width of a state."""

    @property
    def max_tokens(self) -> int:
        """Longest stream that the model has positions for."""

    def n_caption_tokens(self, caption: str) -> int:
        """Length of the caption in tokens."""

    def n_image_tokens(self, width: int, height: int, /) -> int:
        """How many tokens an image will take, to sort batches by; 0 where that is not known or does not matter."""

    def prepare(self, images: Sequence[Image.Image], captions: Sequence[str]) -> ModelInputs:
        """Pre-process and tokenise a batch; safe in any thread."""

    def activations(self, inputs: ModelInputs) -> Activations:
        """States of the image and text tokens of a batch."""

    def boxes(self, inputs: ModelInputs, i: int) -> Boxes:
        """For each image token of pair `i`, in order: the part (x0, y0, x1, y1) of the picture, in units of its
        width and height, that the token's patch covers; None for a token without a place (a class token).

        Raises `ModelError` for families whose tokens have no place.
        """

    def with_text_context(self, text_context: TextContext) -> Backbone:
        """The same model, its weights shared, with the captions in another context; raises `ModelError` where it cannot
        be."""


class JointStream(Backbone, Protocol):
    """A backbone where image and caption go through the blocks of one model together."""

    @property
    def hooked(self) -> torch.nn.Module:
        """The block whose output is the hook layer's."""

    def parts(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """What may go through the model together, as (rows of the batch, their tensors)."""

    def call(self, tensors: dict[str, torch.Tensor]) -> Any:
        """What the model itself makes of a batch's tensors."""


class OwnProcessor:
    """A processor of which every thread has a copy: fast tokenizers must not be shared between threads."""

    def __init__(self, processor: Any) -> None:
        self._shared = processor
        self._local = threading.local()

    @property
    def processor(self) -> Any:
        """This thread's own copy."""
        if not hasattr(self._local, "processor"):
            self._local.processor = copy.deepcopy(self._shared)
        return self._local.processor

    def n_caption_tokens(self, caption: str) -> int:
        """Length of the caption in tokens."""
        return len(self.processor.tokenizer(caption, add_special_tokens=False)["input_ids"])
