"""What all families of the zoo share: a byte-level tokenizer, weights that mix tokens, saving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from mmfilter.core.model.processors import images_only

VOCABULARY = 600
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
SIGLIP_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
SMALL_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


@dataclass
class Specimen:
    """One tiny model and how to prompt it."""

    model: Any
    processor: Any
    prompt: str
    sizes: tuple[tuple[int, int], ...] = ((80, 60), (50, 90))
    """(width, height) of pictures that suit it"""


ZOO: dict[str, Callable[[], Specimen]] = {}


def family(build: Callable[[], Specimen]) -> Callable[[], Specimen]:
    """Enter a family in the zoo under its function's name."""
    ZOO[build.__name__] = build
    return build


def tokenizer(
    named: dict[str, str] | None = None,
    extra: tuple[str, ...] = (),
    *,
    bos: bool = True,
    side: str = "left",
    eos: bool = False,
    **options: Any,
) -> Any:
    """256 byte tokens without merges, the usual four control tokens, and the family's own.

    `named` become attributes (`image_token`, `image_token_id`) as on real multimodal tokenizers.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    fast.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", *(named or {}).values(), *extra]
    fast.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in dict.fromkeys(special)])
    plain = processors.ByteLevel(trim_offsets=False)
    ends = [(text, fast.token_to_id(text)) for text in ("<s>", "</s>")]
    single = "<s> $A </s>" if eos else "<s> $A"
    template = processors.TemplateProcessing(single=single, pair="<s> $A $B", special_tokens=ends)
    fast.post_processor = processors.Sequence([plain, template]) if bos else plain
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side=side,
        extra_special_tokens=dict(named or {}),
        **options,
    )


def pil(name: str) -> Any:
    """The image processor class that needs no torchvision."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def enliven(model: torch.nn.Module) -> None:
    """Weights of a scale at which attention is far from uniform, so that a wrong mask or position shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or not weight.numel():
                continue
            if (
                weight.abs().max() < 1e-6 and "bias" not in name and "norm" not in name
            ):  # projections and gates that start at 0
                weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if "gate" in name else 0.05))
            if weight.dim() >= 4 and weight.std() < 0.1:  # convolutions
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            if weight.dim() == 2 and "emb" not in name and weight.shape[1] > 4:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (1.5 / weight.shape[1] ** 0.5))
            elif weight.dim() == 2 and "emb" in name and weight.std() < 0.1:
                weight.mul_(20)


def fit_codebook(specimen: Specimen) -> None:
    """Make the codes of a VQ tokenizer latents that it meets, so that different places get different codes."""
    quantiser = specimen.model.model.vqmodel
    caught: list[torch.Tensor] = []
    handle = quantiser.quantize.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    with torch.no_grad():
        quantiser.encode(**specimen.processor.image_processor([picture(0, (96, 96))], return_tensors="pt"))
        handle.remove()
        book = quantiser.quantize.embedding.weight
        places = caught[0].movedim(-3, -1).reshape(-1, book.shape[1])  # channels last
        book.copy_(places[torch.linspace(0, len(places) - 1, len(book)).long()])


def build(name: str) -> Specimen:
    """A family's specimen, the same every time."""
    torch.manual_seed(0)
    with images_only():
        specimen = ZOO[name]()
    specimen.model.eval()
    enliven(specimen.model)
    if hasattr(specimen.model.config, "vocabulary_map"):
        fit_codebook(specimen)
    return specimen


def save(specimen: Specimen, folder: Path) -> Path:
    """Write the specimen as its publisher would."""
    specimen.model.save_pretrained(folder)
    specimen.processor.save_pretrained(folder)
    return folder


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth random picture of (width, height)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BILINEAR)
