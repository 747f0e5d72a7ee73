"""Load a model from a local folder or the hub's cache, truncated after one layer unless the whole is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from mmfilter.core.model.backbone import Backbone, TextContext
from mmfilter.core.model.families import UNKNOWN, family_of
from mmfilter.core.model.language_backbone import LanguageBackbone
from mmfilter.core.model.probe import check_roles
from mmfilter.core.model.processors import load_processor
from mmfilter.core.model.stream import cut_after, stream_layers
from mmfilter.core.model.towers import CLIP_LIKE, SIGLIP_LIKE, TwoTowers
from mmfilter.errors import MissingExtra, MMFilterError, ModelError

ATTENTION = "sdpa"
REMOTE_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True)
class LoadSettings:
    """How to load; none of it changes what the states mean."""

    device: str = "cpu"
    """Device for the whole model, unless `device_map` spreads it"""
    dtype: torch.dtype = torch.float32
    """Type of weights and states"""
    device_map: str | None = None
    """`auto` spreads a model that is larger than one device over all of them"""
    attention: str = ATTENTION
    """Attention implementation: sdpa, eager, flash_attention_2, flex_attention"""
    compile: bool = False
    """Compile the blocks, of dual encoders those of both towers: slow to start, faster after that"""
    trust_remote_code: bool = False
    """Run model code that the checkpoint brings along"""
    whole: bool = False
    """Keep what is behind the layer, the language model's head too"""


def load_backbone(
    source: str,
    layer: int,
    *,
    revision: str | None = None,
    prompt: str | None = None,
    text_context: TextContext = "image",
    settings: LoadSettings | None = None,
) -> Backbone:
    """Load a local folder or a hub id up to `layer`, or whole; raises `ModelError` with the next step."""
    settings = settings or LoadSettings()
    model, processor = _loaded(source, layer, revision, settings)
    if not settings.device_map:
        model = model.to(settings.device)
    backbone: TwoTowers | LanguageBackbone
    if _is_dual(model.config):
        backbone = TwoTowers(model, processor, layer)
    else:
        backbone = LanguageBackbone(
            model, processor, layer, prompt=prompt, text_context=text_context, whole=settings.whole
        )
        if backbone.family is UNKNOWN:
            check_roles(backbone)
    if settings.compile:
        for block in backbone.blocks:
            block.compile(dynamic=True)
    return backbone


def _loaded(source: str, layer: int, revision: str | None, settings: LoadSettings) -> tuple[Any, Any]:
    """The model, cut after its layer unless the whole is asked for, and its processor."""
    local = Path(source).is_dir()
    options = {"revision": revision, "trust_remote_code": settings.trust_remote_code, "local_files_only": local}
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # layers left out on purpose are no news
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if refused := family_of(config).refused:
            raise ModelError(f"model type {config.model_type!r} cannot be scored: {refused}")
        model_class = _model_class(config, source, revision, settings)
        if not (_is_dual(config) or settings.whole):
            model_class = truncated(model_class, layer)
        model, report = _load(model_class, source, config, settings, options)
        processor = load_processor(source, **options)
    except MMFilterError:
        raise
    except Exception as error:  # tokenizers and model code raise anything
        raise _loading_error(source, settings, error, local=local) from error
    finally:
        transformers.logging.set_verbosity(level)
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"model {source!r} lacks {len(missing)} weights, first {missing[0]!r}")
    complete_processor(processor, config)
    return model, processor


def _is_dual(config: Any) -> bool:
    """Whether the model is a dual encoder."""
    return config.model_type in (*CLIP_LIKE, *SIGLIP_LIKE)


def read_config(source: str, *, revision: str | None = None, settings: LoadSettings | None = None) -> Any:
    """The configuration of a local folder or hub id, without its weights; raises `ModelError` with the next step."""
    settings = settings or LoadSettings()
    local = Path(source).is_dir()
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=settings.trust_remote_code, local_files_only=local
        )
    except Exception as error:  # configuration code of a checkpoint raises anything
        raise _loading_error(source, settings, error, local=local) from error


def _load(
    model_class: Any, source: str, config: Any, settings: LoadSettings, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    spread = {"device_map": settings.device_map} if settings.device_map else {}
    chosen = dict(
        config=config, dtype=settings.dtype, use_safetensors=True, output_loading_info=True, **spread, **options
    )
    chosen.pop("trust_remote_code")
    try:
        return model_class.from_pretrained(source, attn_implementation=settings.attention, **chosen)
    except ValueError as error:
        if settings.attention != ATTENTION or "scaled_dot_product_attention" not in str(error):
            raise
        return model_class.from_pretrained(source, attn_implementation="eager", **chosen)  # a family without sdpa


def _model_class(config: Any, source: str, revision: str | None, settings: LoadSettings) -> Any:
    """The real class of the checkpoint: its own code's where that is trusted, else the one transformers has."""
    remote = getattr(config, "auto_map", None) or {}
    if settings.trust_remote_code and (name := next((name for name in REMOTE_CLASSES if name in remote), None)):
        return get_class_from_dynamic_module(remote[name], source, revision=revision)
    mapping = MODEL_MAPPING if _is_dual(config) else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if type(config) in mapping:
        return mapping[type(config)]
    raise ModelError(
        f"model type {config.model_type!r} cannot be scored: transformers has no image-text model of this type"
    )


def truncated(model_class: Any, layer: int) -> Any:
    """The same class without the blocks behind `layer`.

    They are dropped when the model is built and still empty, so that their weights are neither read from
    the checkpoint nor given memory. Asking the config for fewer layers would do in some families only
    (Gemma 3n and 4 check the number against other settings).
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        cut_after(stream_layers(self), layer)

    return type(
        model_class.__name__,
        (model_class,),
        {"__init__": __init__, "__module__": model_class.__module__, "__doc__": model_class.__doc__},
    )


def _loading_error(source: str, settings: LoadSettings, error: Exception, *, local: bool) -> Exception:
    """What went wrong as one line with the next step."""
    message = " ".join(str(error).split())
    if settings.device_map and "accelerate" in message:
        return MissingExtra("--device-map", "device-map")
    if settings.attention.startswith("flash") and "flash" in message.lower():
        return ModelError(f"--attn {settings.attention} is not available here ({message[:120]}); use --attn sdpa")
    if "trust_remote_code" in message:
        step = "give --trust-remote-code if you trust its authors"
    elif local:
        step = "it must hold config.json, *.safetensors, tokenizer and processor files"
    else:
        step = f"fetch it with: hf download {source}"
    return ModelError(f"model {source!r} cannot be loaded ({message[:200]}); {step}")


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
