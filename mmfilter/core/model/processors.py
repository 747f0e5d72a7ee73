"""A model's processor: image processor and tokenizer, without torchvision where it is not installed.

torchvision is often missing or of another build than torch, and transformers then refuses every
processor that can *also* take videos (Qwen-VL, LLaVA-OneVision, InternVL, SmolVLM, Gemma 4, …), though images
need nothing of it. For images alone a stand-in for the video processor is enough.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoProcessor, processing_utils
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import cached_file, is_torchvision_available

_PATCHING = threading.Lock()


class ImagesOnly(ImageProcessingMixin):
    """Stands where a processor wants its video processor; refuses videos."""

    model_input_names: ClassVar[list[str]] = []
    num_frames = fps = None

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        raise ImportError("videos need torchvision")

    @classmethod
    def from_pretrained(cls, *_args: Any, **_kwargs: Any) -> ImagesOnly:
        return cls()


def load_processor(source: str, **options: Any) -> Any:
    """The processor of a local folder or hub id; `options` as `AutoProcessor.from_pretrained` takes them."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(source, **options)
    with images_only():
        loader = pixtral_processor() if _class_name(source, options) == "PixtralProcessor" else AutoProcessor
        return loader.from_pretrained(source, **options)


def pixtral_processor() -> Any:
    """Pixtral's processor class, which asks torchvision's twin for the one function that the PIL twin has too."""
    package, twin = "transformers.models.pixtral", "transformers.models.pixtral.image_processing_pixtral"
    borrowed = twin not in sys.modules and not is_torchvision_available()
    if borrowed:
        sys.modules[twin] = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    try:
        return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
    finally:
        if borrowed:
            del sys.modules[twin]


@contextmanager
def images_only() -> Iterator[None]:
    """Processors that are made or loaded in the block take `ImagesOnly` for their video processor."""
    mixin, mapping = processing_utils.ProcessorMixin, type(processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING)
    check, find = mixin.check_argument_for_proper_class, mapping.__getitem__

    def checked(self: Any, name: str, argument: Any) -> Any:
        return type(argument) if isinstance(argument, ImagesOnly) else check(self, name, argument)

    def processor_class(self: Any, modality: str) -> Any:
        return ImagesOnly if modality == "video_processor" else find(self, modality)

    with (
        _PATCHING,
        _in_place_of(mixin, "check_argument_for_proper_class", checked),
        _in_place_of(mapping, "__getitem__", processor_class),
    ):
        yield


@contextmanager
def _in_place_of(owner: type, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """A class's method replaced in the block."""
    own = getattr(owner, name)
    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _class_name(source: str, options: dict[str, Any]) -> str | None:
    """What the checkpoint calls its processor's class."""
    known = {name: options[name] for name in ("revision", "local_files_only") if name in options}
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            path = cached_file(source, file, _raise_exceptions_for_missing_entries=False, **known)
        except (OSError, EntryNotFoundError, LocalEntryNotFoundError):
            continue
        if path and (name := json.loads(Path(path).read_text("utf-8")).get("processor_class")):
            return name
    return None
