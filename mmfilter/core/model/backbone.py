"""A multimodal model truncated after one layer, and the residual states of a pair's tokens.

Any Hugging Face model in which image tokens take the place of a placeholder id in one causal stream
(LLaVA and its kin). Layers behind the hook layer are neither loaded nor run.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmfilter.core.model.codes import IMAGE, TEXT
from mmfilter.core.model.families import newline_mask
from mmfilter.core.model.prompts import CAPTION, SENTINEL, CaptionEscaper, caption_mask, default_prompt, listening
from mmfilter.errors import ModelError

TextContext = Literal["image", "none"]
LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this many tokens and by at least one. On a CPU the vectorised softmax
treats the last few positions of an odd length otherwise, and a batch without padding takes another attention
path; with both out of the way a pair's float32 states do not depend on what it was batched with."""

LAYERS_BY_CONFIG = {"llava", "llava_next", "gemma3", "qwen3_vl", "qwen3_5", "mllama"}
"""Families that load exactly with fewer layers in the config; elsewhere layers are dropped after loading."""


@dataclass(frozen=True)
class Inputs:
    """A batch, ready for the model, on the CPU."""

    tensors: dict[str, torch.Tensor]
    side: torch.Tensor
    """(batch, length) int8: IMAGE, TEXT, or −1 for neither (BOS, template, padding)"""
    text_only: tuple[dict[str, torch.Tensor], torch.Tensor] | None = None
    """The same captions without an image, and their `side`, for text context `none`"""

    @property
    def tokens(self) -> torch.Tensor:
        """(batch, 2): number of image and of text tokens."""
        text = self.side if self.text_only is None else self.text_only[1]
        return torch.stack([(self.side == IMAGE).sum(1), (text == TEXT).sum(1)], 1)


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


class _Stop(BaseException):
    """Ends a forward pass behind the hook layer; no `except Exception` in a model may swallow it."""


class Backbone:
    """One model up to the output of decoder layer `layer` (counted from 0)."""

    def __init__(self, model: Any, processor: Any, layer: int, *, prompt: str | None = None, text_context: TextContext = "image") -> None:
        self.model, self.layer, self.text_context = model.eval(), layer, text_context
        self._processor = processor
        self._local = threading.local()
        self.image_token_id = _image_token_id(model.config)
        self.image_token = processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.prompt = prompt or default_prompt(processor, getattr(processor, "image_token", self.image_token))
        if CAPTION not in self.prompt:
            raise ModelError(f"prompt {self.prompt!r} has no {CAPTION}: say where the caption goes")
        self._escape = CaptionEscaper(processor.tokenizer)
        self._layers = decoder_layers(model)
        if not 0 <= layer < len(self._layers):
            raise ModelError(f"layer {layer} is not in the model, which has layers 0 to {len(self._layers) - 1}")
        del self._layers[layer + 1 :]
        self._suffixes = self._learn_suffixes()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def d_model(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def max_tokens(self) -> int:
        """Longest stream that the model has positions for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)

    @property
    def processor(self) -> Any:
        """This thread's own copy: fast tokenizers must not be shared between threads."""
        if not hasattr(self._local, "processor"):
            self._local.processor = copy.deepcopy(self._processor)
        return self._local.processor

    def n_caption_tokens(self, caption: str) -> int:
        """Length of the caption in tokens."""
        return len(self.processor.tokenizer(caption, add_special_tokens=False)["input_ids"])

    def n_image_tokens(self, width: int, height: int) -> int:
        """How many tokens an image will take, to sort batches by; 0 where the processor does not say."""
        count = getattr(self.processor, "_get_num_multimodal_tokens", None)
        return 0 if count is None else count(image_sizes=[(height, width)])["num_image_tokens"][0]

    def prepare(self, images: Sequence[Image.Image], captions: Sequence[str]) -> Inputs:
        """Pre-process and tokenise a batch (right padding, no truncation); safe in any thread."""
        captions = [self._escape(caption) for caption in captions]
        texts = [self.prompt.replace(CAPTION, caption) for caption in captions]
        tensors, mask = self._process(texts, captions, self._suffixes["image"], images=list(images))
        side = torch.full(mask.shape, -1, dtype=torch.int8)
        is_image = tensors["input_ids"] == self.image_token_id
        side[is_image & ~newline_mask(self.processor, self.model.config, tensors, is_image)] = IMAGE
        if self.text_context == "image":
            side[mask] = TEXT
            return Inputs(tensors, side)
        alone = [self._text_prompt.replace(CAPTION, caption) for caption in captions]
        text_tensors, text_mask = self._process(alone, captions, self._suffixes["none"])
        return Inputs(tensors, side, (text_tensors, torch.where(text_mask, TEXT, -1).to(torch.int8)))

    @property
    def _text_prompt(self) -> str:
        return self.prompt.replace(getattr(self._processor, "image_token", self.image_token), "")

    def _process(self, texts: list[str], captions: list[str], suffix: str, **images: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        processor = self.processor
        options = {"padding": True, "padding_side": "right", "truncation": False, "return_tensors": "pt"}
        with listening(processor) as heard:
            tensors = dict(processor(text=texts, **images, **options))
        said, encoding = heard[-1]
        tensors.pop("labels", None)
        mask = caption_mask(said, encoding, captions, suffix, tensors["input_ids"])
        return _pad(tensors, mask, processor.tokenizer.pad_token_id or 0)

    def _learn_suffixes(self) -> dict[str, str]:
        """What the finished text has behind the caption, with an image and without."""
        grey = Image.new("RGB", (64, 64), (127, 127, 127))
        suffixes = {}
        for context, prompt, images in (("image", self.prompt, {"images": [grey]}), ("none", self._text_prompt, {})):
            if context == "none" and self.text_context != "none":
                continue
            with listening(self.processor) as heard:
                self.processor(text=[prompt.replace(CAPTION, SENTINEL)], return_tensors="pt", **images)
            text = heard[-1][0][0]
            suffixes[context] = text[text.rindex(SENTINEL) + len(SENTINEL) :]
        return suffixes

    @torch.inference_mode()
    def activations(self, inputs: Inputs) -> Activations:
        """States after the hook layer, of image and text tokens only."""
        parts = [self._collect(inputs.tensors, inputs.side)]
        if inputs.text_only is not None:
            parts.append(self._collect(*inputs.text_only))
        states, sample, side, position = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        return Activations(states, sample, side, position, len(inputs.side))

    def _collect(self, tensors: dict[str, torch.Tensor], side: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.forward(tensors)
        side = side.to(hidden.device)
        sample, position = (side >= 0).nonzero(as_tuple=True)
        return hidden[sample, position], sample, side[sample, position].long(), position

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The truncated forward pass: (batch, length, d_model) after the hook layer."""
        caught: list[torch.Tensor] = []

        def stop(_module: Any, _args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, (tuple, list)) else output)
            raise _Stop

        handle = self._layers[self.layer].register_forward_hook(stop)
        try:
            self.model(**self._to_device(tensors), use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        if not caught:
            raise ModelError(f"layer {self.layer} never ran: this model does not send pairs through it")
        return caught[0]

    def _to_device(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.to(self.device, dtype, non_blocking=True)

        return {name: moved(tensor) for name, tensor in tensors.items()}


def _pad(tensors: dict[str, torch.Tensor], mask: torch.Tensor, pad_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Pad everything that has a column per token on the right, up to the next `LENGTH_MULTIPLE`."""
    shape = tensors["input_ids"].shape
    missing = LENGTH_MULTIPLE - shape[1] % LENGTH_MULTIPLE

    def padded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape != shape:
            return tensor
        return torch.nn.functional.pad(tensor, (0, missing), value=pad_id if name == "input_ids" else 0)

    return {name: padded(name, tensor) for name, tensor in tensors.items()}, padded("", mask)


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The blocks in which image and text tokens live together."""
    decoder = model.get_decoder()
    while hasattr(decoder, "get_decoder") and decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ModelError(f"{type(model).__name__} has no list of decoder layers that can be hooked")
    return layers


def _image_token_id(config: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        if isinstance(getattr(config, name, None), int):
            return getattr(config, name)
    vocabulary = getattr(config, "vocabulary_map", None) or {}
    if "<image>" in vocabulary:
        return vocabulary["<image>"]
    raise ModelError(f"model type {config.model_type!r} has no image tokens in its text stream: it cannot be scored")


def load_backbone(
    source: str,
    layer: int,
    *,
    revision: str | None = None,
    prompt: str | None = None,
    text_context: TextContext = "image",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a local folder or a hub id up to `layer`; raises `ModelError` with the next step."""
    local = Path(source).is_dir()
    options = {"revision": revision, "trust_remote_code": False, "local_files_only": local}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # layers left out on purpose are no news
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        shorten(config, layer)
        model, report = AutoModelForImageTextToText.from_pretrained(
            source, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        processor = AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(_why_not(source, local, error)) from error
    finally:
        transformers.logging.set_verbosity(level)
    if report["missing_keys"]:
        raise ModelError(f"model {source!r} lacks {len(report['missing_keys'])} weights, first {sorted(report['missing_keys'])[0]!r}")
    complete_processor(processor, config)
    return Backbone(model.to(device), processor, layer, prompt=prompt, text_context=text_context)


def _why_not(source: str, local: bool, error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:200]
    step = "it must hold config.json, *.safetensors, tokenizer and processor files" if local else f"fetch it with: hf download {source}"
    return f"model {source!r} cannot be loaded ({first}); {step}"


def shorten(config: Any, layer: int) -> None:
    """Ask for no more decoder layers than needed, where the family allows it."""
    text = config.get_text_config()
    total = getattr(text, "num_hidden_layers", None)
    if config.model_type not in LAYERS_BY_CONFIG or not isinstance(total, int):
        return
    if not 0 <= layer < total:
        raise ModelError(f"layer {layer} is not in the model, which has layers 0 to {total - 1}")
    text.num_hidden_layers = layer + 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: layer + 1]


def complete_processor(processor: Any, config: Any) -> None:
    """Old LLaVA folders keep the patch size in the model's config only."""
    vision = getattr(config, "vision_config", None)
    if getattr(processor, "patch_size", 0) is None and vision is not None:
        processor.patch_size = vision.patch_size
        processor.vision_feature_select_strategy = getattr(config, "vision_feature_select_strategy", "default")
        processor.num_additional_image_tokens = 1


def model_hash(source: str, config: Any) -> str:
    """Digest of a local model's weights and configs; for a hub id, of the id and the commit that was loaded."""
    digest = hashlib.sha256()
    if not Path(source).is_dir():
        digest.update(f"{source}@{getattr(config, '_commit_hash', None)}".encode())
        return digest.hexdigest()[:16]
    for path in sorted(Path(source).iterdir()):
        if path.suffix in (".json", ".safetensors") and path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    return digest.hexdigest()[:16]
