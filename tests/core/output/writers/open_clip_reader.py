"""Reads shards with open_clip's own training data loader; run as a process, with the peers' folder first on its path.

    python open_clip_reader.py < JOBS.json

JOBS is `{"jobs": {name: {"train" or "val": PATTERN, "workers": N}}, "captions": [...]}`. On stdout comes, by name, what the
loader gave: of each pair a digest of its pixels and its tokens, and how many samples it takes the shards for; `captions` has
the tokens of each caption.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from types import SimpleNamespace

import torch

if torch.version.cuda is None:
    # the compiled part of PyPI's torchvision needs CUDA; nothing here calls it, but these two have to exist when it is imported
    _OPERATORS = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _OPERATORS.define(f"{_name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
warnings.simplefilter("ignore")

import open_clip  # noqa: E402
from open_clip_train.data import get_data  # noqa: E402
from torchvision.transforms.functional import pil_to_tensor  # noqa: E402


def arguments(job: dict) -> SimpleNamespace:
    """What open_clip's command line makes of `--dataset-type webdataset --train-data PATTERN --workers N`, of two pairs a batch to evaluate."""
    named = {
        name: None
        for name in (
            "train_num_samples",
            "val_num_samples",
            "train_data_upsampling_factors",
            "imagenet_val",
            "imagenet_v2",
        )
    }
    given = {
        "train_data": job.get("train"),
        "val_data": job.get("val"),
        "workers": job["workers"],
        "batch_size": 1 if "train" in job else 2,
    }
    return SimpleNamespace(
        **named, **given, dataset_type="webdataset", dataset_resampled=False, seed=0, world_size=1, distributed=False
    )


def read(job: dict, tokenizer: open_clip.SimpleTokenizer) -> dict:
    data = get_data(arguments(job), (pil_to_tensor, pil_to_tensor), tokenizer=tokenizer)[
        "train" if "train" in job else "val"
    ]
    pairs = [
        (hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), tokens.tolist())
        for images, texts in data.dataloader
        for pixels, tokens in zip(images, texts, strict=True)
    ]
    return {"pairs": pairs, "num_samples": data.dataloader.num_samples}


def main() -> None:
    asked = json.load(sys.stdin)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    read_by_name = {name: read(job, tokenizer) for name, job in asked["jobs"].items()}
    print(json.dumps(read_by_name | {"captions": {text: tokenizer(text)[0].tolist() for text in asked["captions"]}}))


if __name__ == "__main__":
    main()
