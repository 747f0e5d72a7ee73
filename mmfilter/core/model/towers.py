"""Dual encoders (CLIP, SigLIP): image and text tokens from two towers, in the one space that they share.

There is no joint stream; what both towers have in common is the space behind their projections, and that is where
an SAE can see both. Every token is taken there as the model takes its pooled one:

    CLIP      post-layernorm and visual projection of the class token and of every patch; text projection of every
              caption token and of the end-of-text token. Class and end-of-text token are the model's embeddings.
    SigLIP    the attention-pooling head over all patches (the model's embedding) and over each patch alone;
              the text head of every caption token and of the last position (the model's embedding).

Patches and single words were not trained to lie there; the embeddings were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from mmfilter.core.model.backbone import Activations, ModelInputs, OwnProcessor, TextContext
from mmfilter.core.model.boxes import Boxes, Picture, cropped, grid
from mmfilter.core.model.prompts import CAPTION, CaptionEscaper
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import ModelError

CLIP_LIKE, SIGLIP_LIKE = ("clip", "metaclip_2"), ("siglip", "siglip2")
SHARED_SPACE = -1
"""The layer of a dual encoder"""


class TwoTowers(OwnProcessor):
    """A dual encoder; takes and gives what every `Backbone` does."""

    text_context: TextContext = "none"
    prompt: str = CAPTION

    def __init__(self, model: Any, processor: Any, layer: int = SHARED_SPACE) -> None:
        super().__init__(processor)
        if layer != SHARED_SPACE:
            raise ModelError(
                f"{model.config.model_type!r} has two towers and no layer {layer} in common: its SAE sits on the "
                "shared space, --layer -1"
            )
        self.model, self.layer = model.eval(), layer
        self._is_clip = model.config.model_type in CLIP_LIKE
        self._escape = CaptionEscaper(processor.tokenizer)

    @property
    def joint_stream(self) -> None:
        """None: captions go through a tower of their own."""
        return None

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The blocks of both towers."""
        return [*self.model.text_model.encoder.layers, *self.model.vision_model.encoder.layers]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def d_model(self) -> int:
        """Width of the shared space."""
        return self.model.config.projection_dim if self._is_clip else self.model.config.vision_config.hidden_size

    @property
    def max_tokens(self) -> int:
        """Longest caption that the text tower has positions for."""
        return self.model.config.text_config.max_position_embeddings

    def n_image_tokens(self, _width: int, _height: int) -> int:
        """0: every picture takes as many, and they do not share a stream with the text."""
        return 0

    def with_text_context(self, text_context: TextContext) -> TwoTowers:
        """Itself; raises `ModelError` for captions that see the image."""
        if text_context != "none":
            raise ModelError(f"{self.model.config.model_type!r} is a dual encoder, whose captions never see an image")
        return self

    def prepare(self, images: Sequence[Image.Image], captions: Sequence[str]) -> ModelInputs:
        """Pre-process and tokenise a batch; `side` has the text tower's positions, then the image tower's."""
        # SigLIP was trained on captions padded to its full length, on the side that its tokenizer says
        padding: dict[str, Any] = (
            {"padding": True} if self._is_clip else {"padding": "max_length", "max_length": self.max_tokens}
        )
        texts = [self._escape(caption) for caption in captions]
        tensors = dict(
            self.processor(text=texts, images=list(images), truncation=False, return_tensors="pt", **padding)
        )
        side = torch.cat([self._text_side(tensors), self._image_side(tensors)], 1)
        return ModelInputs(tensors, side, sizes=[image.size for image in images])

    def _text_side(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = tensors["input_ids"]
        is_text = ~torch.isin(ids, torch.tensor(self.processor.tokenizer.all_special_ids))
        has_words = is_text.any(1, keepdim=True)
        is_text.scatter_(1, self._embedding_position(ids)[:, None], value=True)
        return torch.where(is_text & has_words, TEXT, -1).to(torch.int8)

    def _embedding_position(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch,): the position whose state is the text's embedding."""
        if not self._is_clip:
            return torch.full((len(ids),), ids.shape[1] - 1)
        eos = self.model.config.text_config.eos_token_id
        return (
            ids.argmax(1) if eos == 2 else (ids == eos).int().argmax(1)
        )  # 2: configs of old conversions, as transformers reads them

    def _image_side(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if "pixel_attention_mask" in tensors:  # SigLIP 2: as many patches as the picture's shape asks for
            real = tensors["pixel_attention_mask"].bool()
        else:
            vision = self.model.config.vision_config
            real = torch.ones(
                len(tensors["pixel_values"]), (vision.image_size // vision.patch_size) ** 2, dtype=torch.bool
            )
        embedding = torch.ones(len(real), 1, dtype=torch.bool)
        return torch.where(torch.cat([embedding, real], 1), IMAGE, -1).to(torch.int8)

    def boxes(self, inputs: ModelInputs, i: int) -> Boxes:
        """As `Backbone.boxes`; the first token is the whole picture's embedding and has no place."""
        n_tokens = int((inputs.side[i] == IMAGE).sum())
        if "spatial_shapes" in inputs.tensors:
            rows, columns = inputs.tensors["spatial_shapes"][i].tolist()
            return [None, *grid(rows, columns)]
        side = round((n_tokens - 1) ** 0.5)
        if not self._is_clip:
            return [None, *grid(side, side)]
        return cropped(Picture(self.model.config, self.processor, *inputs.sizes[i], {}, n_tokens))

    @torch.inference_mode()
    def activations(self, inputs: ModelInputs) -> Activations:
        """Both towers' tokens in the shared space."""
        tensors = {name: self._moved(tensor) for name, tensor in inputs.tensors.items()}
        states = self._clip(tensors) if self._is_clip else self._siglip(tensors)
        hidden = torch.cat(states, 1)
        side = inputs.side.to(hidden.device)
        sample, position = (side >= 0).nonzero(as_tuple=True)
        return Activations(hidden[sample, position], sample, side[sample, position].long(), position, len(side))

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True)

    def _clip(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        text = model.text_model(tensors["input_ids"], attention_mask=tensors["attention_mask"]).last_hidden_state
        image = model.vision_model(tensors["pixel_values"]).last_hidden_state
        return model.text_projection(text), model.visual_projection(model.vision_model.post_layernorm(image))

    def _siglip(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        mask = {"attention_mask": tensors["attention_mask"]} if "attention_mask" in tensors else {}
        text = model.text_model(tensors["input_ids"], **mask).last_hidden_state
        shape = {name: tensors[name] for name in ("pixel_attention_mask", "spatial_shapes") if name in tensors}
        seen = model.vision_model(tensors["pixel_values"], **shape)
        patches = seen.last_hidden_state
        alone = model.vision_model.head(patches.reshape(-1, 1, patches.shape[-1])).view(patches.shape)
        return model.text_model.head(text), torch.cat([seen.pooler_output[:, None], alone], 1)
