"""A model of LLaVA-NeXT-7B's shape with random weights: scoring against the bare truncated forward pass, and the SAE's
share.

Speed does not depend on what the weights are. Arms, interleaved in one process on the same batches, ready in memory:

    forward   17 of 32 layers (hook layer 16, as in SAE-V), nothing behind them
    score     the same, then SAE, pooling, scores and codes
    encode    the SAE alone, on states that lie ready

    python benchmarks/large_model.py                  on a GPU, bfloat16
    python benchmarks/large_model.py --shape small    the same code on anything
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import machine
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
)

from mmfilter.core.cards.cards import load_card
from mmfilter.core.model.backbone import ModelInputs
from mmfilter.core.model.language_backbone import LanguageBackbone
from mmfilter.core.model.processors import load_processor
from mmfilter.core.pipeline.scorer import Scorer
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.scores.crossmodal import FeatureWeights

SHAPES = {
    "7b": {"text": (4096, 14336, 32, 8), "vision": (1024, 4096, 24, 16, 336, 14), "layer": 16, "features": 65_536},
    "small": {"text": (128, 256, 4, 2), "vision": (64, 128, 3, 4, 56, 14), "layer": 2, "features": 1024},
}


def build(shape: str, device: str, dtype: torch.dtype) -> LanguageBackbone:
    """A LLaVA-NeXT of that shape up to its layer, with the embedded model's tokenizer."""
    size = SHAPES[shape]
    hidden, inner, heads, kv_heads = size["text"]
    v_hidden, v_inner, v_layers, v_heads, pixels, patch = size["vision"]
    tokenizer = load_processor(load_card("tiny").model).tokenizer
    pinpoints = [[pixels, 2 * pixels], [2 * pixels, pixels], [2 * pixels, 2 * pixels]]
    config = LlavaNextConfig(
        text_config=MistralConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            num_hidden_layers=size["layer"] + 1,
            vocab_size=32_064,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=v_hidden,
            intermediate_size=v_inner,
            num_hidden_layers=v_layers,
            num_attention_heads=v_heads,
            image_size=pixels,
            patch_size=patch,
            projection_dim=v_hidden,
        ),
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    from transformers import LlavaNextImageProcessorPil

    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": pixels}, crop_size={"height": pixels, "width": pixels}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return LanguageBackbone(model, processor, size["layer"], prompt="USER: <image>\n{caption} ASSISTANT:")


def random_topk_sae(d_model: int, n_features: int, k: int, device: str, dtype: torch.dtype) -> SAE:
    """Directions at random; as costly as trained ones."""
    rows = torch.nn.functional.normalize(torch.randn(n_features, d_model, device=device), dim=1).to(dtype)
    zeros = torch.zeros(n_features, device=device, dtype=dtype)
    return SAE(
        rows.T.contiguous(), zeros, rows, torch.zeros(d_model, device=device, dtype=dtype), activation="topk", k=k
    )


def batches(backbone: LanguageBackbone, size: int, n: int) -> list[ModelInputs]:
    """Pictures of web shapes with captions of ten words."""
    rng = np.random.default_rng(0)
    shapes = [(640, 480), (480, 640), (500, 500), (800, 450)]
    made = []
    for i in range(n):
        pictures = [
            Image.fromarray(rng.integers(0, 256, (shapes[i % 4][1], shapes[i % 4][0], 3), dtype=np.uint8))
            for _ in range(size)
        ]
        made.append(backbone.prepare(pictures, ["two dogs next to a tree and a red apple"] * size))
    return made


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds until the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.inference_mode()
def main(options: argparse.Namespace) -> None:
    device = options.device
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    print(
        machine()
        if device == "cpu"
        else f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {str(dtype).removeprefix('torch.')}"
    )
    backbone = build(options.shape, device, dtype)
    sae = random_topk_sae(backbone.d_model, SHAPES[options.shape]["features"], options.k, device, dtype)
    ones = torch.ones(sae.n_features)
    scorer = Scorer(backbone, sae, FeatureWeights(*[ones] * 8, n_samples=1, metadata={}), 0.0)
    ready = batches(backbone, options.batch_size, options.batches)
    states = [backbone.activations(inputs).states for inputs in ready]
    n, tokens = options.batch_size * options.batches, sum(len(part) for part in states)
    arms = {
        "forward": lambda: [backbone.forward(inputs.tensors) for inputs in ready],
        "score": lambda: [scorer.score(backbone.activations(inputs)) for inputs in ready],
        "encode": lambda: [sae.encode(part) for part in states],
    }
    seconds = {name: [] for name in arms}
    for round_number in range(options.rounds + 1):
        for name, work in arms.items():
            took = timed(work, device)
            if round_number:  # the first warms up
                seconds[name].append(took)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{n} pairs, {tokens / n:.0f} image and text tokens a pair, "
        f"{backbone.d_model} -> {sae.n_features:,} features, k {options.k}"
    )
    for name in ("forward", "score"):
        print(f"{name:8} {n / median[name]:8.1f} pairs/s  {tokens / median[name]:10.0f} tokens/s")
    print(
        f"score against forward: {median['forward'] / median['score']:.2f}; "
        f"the SAE's share of scoring: {median['encode'] / median['score']:.0%}"
    )
    if device.startswith("cuda"):
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=int, default=32)
    main(parser.parse_args())
