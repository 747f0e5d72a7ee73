"""A multimodal model truncated after one layer, and the residual states of a pair's tokens.

Any Hugging Face model in which image tokens take the place of a placeholder id in one stream of text; what
families need beyond that is in `families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from mmfilter.core.model.backbone import Activations, ModelInputs, OwnProcessor, TextContext
from mmfilter.core.model.boxes import Boxes, Picture
from mmfilter.core.model.families import family_name, family_of
from mmfilter.core.model.prompts import (
    CAPTION,
    SENTINEL,
    CaptionEscaper,
    caption_mask,
    default_prompt,
    heard_with,
    listening,
)
from mmfilter.core.model.stream import check_layer, cut_after, image_token_id, is_encoder_decoder, stream_layers
from mmfilter.core.sides import IMAGE, TEXT
from mmfilter.errors import ModelError

LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens and by at least one. On a CPU the vectorised softmax
treats the last few positions of an odd length otherwise, and a batch without padding takes another attention
path; with both out of the way a pair's float32 states do not depend on what it was batched with."""


class _Stop(BaseException):
    """Ends a forward pass behind the hook layer; no `except Exception` in a model may swallow it."""


class LanguageBackbone(OwnProcessor):
    """One model up to the output of layer `layer` of its text stream (counted from 0); `whole` keeps what is behind
    it."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        layer: int,
        *,
        prompt: str | None = None,
        text_context: TextContext = "image",
        whole: bool = False,
    ) -> None:
        super().__init__(processor)
        self.model, self.layer, self.text_context, self.whole = model.eval(), layer, text_context, whole
        self.family = family_of(model.config)
        self.image_token_id = image_token_id(model.config)
        self.placeholder = self._placeholder(processor)
        self.prompt = prompt or default_prompt(processor, self.placeholder)
        if CAPTION not in self.prompt:
            raise ModelError(f"prompt {self.prompt!r} has no {CAPTION}: say where the caption goes")
        self._escape = CaptionEscaper(processor.tokenizer)
        self._layers = stream_layers(model)
        (check_layer if whole else cut_after)(self._layers, layer)
        self._suffixes = self._learn_suffixes()

    def _placeholder(self, processor: Any) -> str:
        """What a prompt writes for an image; empty where the processor puts it in by itself."""
        if not self.family.placeholder:
            return ""
        token = getattr(processor, self.family.placeholder, None) or getattr(processor, "image_token", None)
        return str(token or processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def with_text_context(self, text_context: TextContext) -> LanguageBackbone:
        """The same model, its weights shared, with the captions in another context; raises `ModelError` where it cannot
        be."""
        return LanguageBackbone(
            self.model, self._shared, self.layer, prompt=self.prompt, text_context=text_context, whole=self.whole
        )

    @property
    def joint_stream(self) -> LanguageBackbone:
        """Itself: image and caption tokens go through its blocks together."""
        return self

    @property
    def hooked(self) -> torch.nn.Module:
        """The block whose output is the hook layer's."""
        return self._layers[self.layer]

    @property
    def blocks(self) -> torch.nn.ModuleList:
        """The blocks of its stream, without those that were cut off."""
        return self._layers

    @property
    def n_layers(self) -> int:
        """How many blocks these are."""
        return len(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the states come out."""
        return next(self.hooked.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def d_model(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def max_tokens(self) -> int:
        """Longest stream that the model has positions for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

    def n_image_tokens(self, width: int, height: int) -> int:
        """How many tokens an image will take, to sort batches by; 0 where the processor does not say."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        try:
            return 0 if count is None else count(image_sizes=[(height, width)])["num_image_tokens"][0]
        except (ValueError, NotImplementedError):  # a picture that it refuses: `prepare` says why
            return 0

    def prepare(self, images: Sequence[Image.Image], captions: Sequence[str]) -> ModelInputs:
        """Pre-process and tokenise a batch (right padding, no truncation); safe in any thread."""
        captions = [self._escape(caption) for caption in captions]
        texts = [self.prompt.replace(CAPTION, caption) for caption in captions]
        sizes = [image.size for image in images]
        tensors, mask = self._process(texts, captions, self._suffixes["image"], images=[[image] for image in images])
        side = torch.full(mask.shape, -1, dtype=torch.int8)
        is_image = self._image_mask(tensors)
        side[is_image & ~self._row_ends(tensors, is_image, sizes)] = IMAGE
        if self.text_context == "image":
            side[mask] = TEXT
            return ModelInputs(tensors, side, sizes=sizes)
        alone = [self._text_prompt.replace(CAPTION, caption) for caption in captions]
        text_tensors, text_mask = self._process(alone, captions, self._suffixes["none"])
        return ModelInputs(tensors, side, (text_tensors, torch.where(text_mask, TEXT, -1).to(torch.int8)), sizes)

    def _image_mask(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return (tensors["input_ids"] == self.image_token_id) & tensors["attention_mask"].bool()

    def _row_ends(
        self, tensors: dict[str, torch.Tensor], is_image: torch.Tensor, sizes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """(batch, length) bool: image tokens that are learned constants and no part of the picture."""
        mask = torch.zeros_like(is_image)
        if self.family.constant_row_ends:
            for i in range(len(mask)):
                places = is_image[i].nonzero()[:, 0]
                placed = self._boxes(tensors, i, sizes[i], len(places))
                mask[i, places] = torch.tensor([box is None for box in placed])
        return mask

    def boxes(self, inputs: ModelInputs, i: int) -> Boxes:
        """For each image token of pair `i`, in order: the part (x0, y0, x1, y1) of the picture, in units of its
        width and height, that the token's patch covers; None for a token without a place (a class token).

        Raises `ModelError` for families whose tokens have no place.
        """
        is_image = self._image_mask(inputs.tensors)[i]
        placed = self._boxes(inputs.tensors, i, inputs.sizes[i], int(is_image.sum()))
        kept = inputs.side[i][is_image] == IMAGE
        return [box for box, keep in zip(placed, kept.tolist(), strict=True) if keep]

    def _boxes(self, tensors: dict[str, torch.Tensor], i: int, size: tuple[int, int], n_tokens: int) -> Boxes:
        name = family_name(self.model.config)
        if self.family.boxes is None:
            raise ModelError(f"image tokens of {name!r} have no place in the picture: {self.family.no_place}")
        row = {
            key: tensor[i]
            for key, tensor in tensors.items()
            if torch.is_tensor(tensor) and len(tensor) == len(tensors["input_ids"])
        }
        placed = self.family.boxes(Picture(self.model.config, self.processor, *size, row, n_tokens))
        if len(placed) != n_tokens:
            raise ModelError(
                f"{name!r} made {n_tokens} image tokens of a picture of {size[0]} × {size[1]} pixels; its rule expects "
                f"{len(placed)}"
            )
        return placed

    @property
    def _text_prompt(self) -> str:
        return self.prompt.replace(self.placeholder, "") if self.placeholder else self.prompt

    def _process(
        self, texts: list[str], captions: list[str], suffix: str, **images: Any
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        processor = self.processor
        options = {"padding": True, "padding_side": "right", "truncation": False, "return_tensors": "pt"}
        with listening(processor) as heard:
            tensors = dict(processor(text=texts, **images, **options))
        rendered, encoding = heard_with(heard, captions[0])
        tensors.pop("labels", None)
        mask = caption_mask(rendered, encoding, captions, suffix, tensors["input_ids"])
        return _pad(tensors, mask, processor.tokenizer.pad_token_id or 0)

    def _learn_suffixes(self) -> dict[str, str]:
        """What the finished text has behind the caption, with an image and without."""
        grey = Image.new("RGB", (64, 64), (127, 127, 127))
        suffixes = {"image": self._suffix(self.prompt, images=[[grey]])}
        if self.text_context == "none":
            try:
                suffixes["none"] = self._suffix(self._text_prompt)
            except (ValueError, TypeError, AttributeError) as error:
                raise ModelError(
                    f"{type(self._shared).__name__} takes no caption without an image: use --text-context image, and "
                    "no --text-only"
                ) from error
        return suffixes

    def _suffix(self, prompt: str, **images: Any) -> str:
        with listening(self.processor) as heard:
            self.processor(text=[prompt.replace(CAPTION, SENTINEL)], return_tensors="pt", **images)
        text = heard_with(heard, SENTINEL)[0][0]
        return text[text.rindex(SENTINEL) + len(SENTINEL) :]

    @torch.inference_mode()
    def activations(self, inputs: ModelInputs) -> Activations:
        """States after the hook layer, of image and text tokens only."""
        parts = [self._collect(inputs.tensors, inputs.side)]
        if inputs.text_only is not None:
            parts.append(self._collect(*inputs.text_only))
        states, sample, side, position = (
            torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)
        )
        return Activations(states, sample, side, position, len(inputs.side))

    def _collect(self, tensors: dict[str, torch.Tensor], side: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.forward(tensors)
        side = side.to(hidden.device)
        sample, position = (side >= 0).nonzero(as_tuple=True)
        return hidden[sample, position], sample, side[sample, position].long(), position

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The truncated forward pass: (batch, length, d_model) after the hook layer."""
        n, parts = len(tensors["input_ids"]), self.parts(tensors)
        rows, part = next(parts)
        states = self._forward(part)
        if len(rows) == n:
            return states
        hidden = states.new_empty(n, *states.shape[1:])
        hidden[rows.to(hidden.device)] = states
        for rows, part in parts:
            hidden[rows.to(hidden.device)] = self._forward(part)
        return hidden

    def parts(self, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """What may go through the model together, as (rows of the batch, their tensors): all of it, but in some
        families by size."""
        if not self.family.one_size or "image_sizes" not in tensors:
            yield torch.arange(len(tensors["input_ids"])), tensors
            return
        sizes, group = tensors["image_sizes"].unique(dim=0, return_inverse=True)
        for number, (height, width) in enumerate(sizes.tolist()):
            rows = (group == number).nonzero()[:, 0]
            part = {name: tensor[rows] for name, tensor in tensors.items()} if len(sizes) > 1 else dict(tensors)
            if len(sizes) > 1:
                part["pixel_values"] = part["pixel_values"][..., :height, :width]
            yield rows, part

    def _forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self._run(
            tensors, lambda stop: self.hooked.register_forward_hook(lambda _module, _args, output: stop(output))
        )
        if hidden.dim() == 4:  # Gemma 3n keeps several versions of the stream; this one goes on
            hidden = hidden[self.model.config.get_text_config().altup_active_idx]
        return hidden

    @torch.inference_mode()
    def embedded(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """What enters the first block: (batch, length, d_model) token embeddings with image features in place."""

        def entering(stop: Callable[[Any], None]) -> Any:
            return self._layers[0].register_forward_pre_hook(
                lambda _module, args, kwargs: stop(args or kwargs["hidden_states"]), with_kwargs=True
            )

        return self._run(tensors, entering)

    def _run(self, tensors: dict[str, torch.Tensor], hook: Callable[[Callable[[Any], None]], Any]) -> torch.Tensor:
        """Run the model until the hook that `hook` registers is called; what it was called with."""
        caught: list[torch.Tensor] = []

        def stop(states: Any) -> None:
            caught.append(states[0] if isinstance(states, (tuple, list)) else states)
            raise _Stop

        handle = hook(stop)
        try:
            self.call(tensors)
        except _Stop:
            pass
        finally:
            handle.remove()
        if not caught:
            raise ModelError(f"layer {self.layer} never ran: this model does not send pairs through it")
        return caught[0]

    def call(self, tensors: dict[str, torch.Tensor]) -> Any:
        """What the model itself makes of a batch's tensors."""
        return self.model(**self._to_device(tensors), **self.decoder_start(tensors), use_cache=False)

    def decoder_start(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """An encoder-decoder wants a decoder input, though the pass ends in its encoder."""
        if not is_encoder_decoder(self.model.config):
            return {}
        start = getattr(self.model.config.get_text_config(), "decoder_start_token_id", None) or 0
        return {"decoder_input_ids": torch.full((len(tensors["input_ids"]), 1), start, device=self.model.device)}

    def _to_device(self, tensors: dict[str, Any]) -> dict[str, Any]:
        device = self.model.device

        def moved(tensor: Any) -> Any:
            if not torch.is_tensor(tensor):
                return tensor
            return tensor.to(device, self.dtype if tensor.is_floating_point() else tensor.dtype, non_blocking=True)

        return {name: moved(tensor) for name, tensor in tensors.items()}


def _pad(
    tensors: dict[str, torch.Tensor], mask: torch.Tensor, pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pad everything that has a column per token on the right, up to the next `LENGTH_MULTIPLE`."""
    shape = tensors["input_ids"].shape
    missing = LENGTH_MULTIPLE - shape[1] % LENGTH_MULTIPLE

    def padded(name: str, tensor: Any) -> Any:
        if getattr(tensor, "shape", None) != shape:
            return tensor
        return torch.nn.functional.pad(tensor, (0, missing), value=pad_id if name == "input_ids" else 0)

    return {name: padded(name, tensor) for name, tensor in tensors.items()}, padded("", mask)
