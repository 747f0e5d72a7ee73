"""Export the trained model as a checkpoint that transformers loads: float16 safetensors, tokenizer, processor."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from model import HOOK_LAYER, MAX_TOKENS, PATCH, PIXEL_MEAN, PIXEL_STD, PREFIX, TinyLlava, is_word, normalised
from PIL import Image
from scenes import IMAGE_SIZE
from tokenizer import PAD, encode, load_tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor

from mmfilter.core.model.loading import load_backbone
from mmfilter.core.sides import IMAGE, TEXT

PROMPT = "<s><image>{caption}"
ROOT = Path(__file__).parents[2]


def load_trained(path: Path) -> TinyLlava:
    """The averaged model that training wrote, or that of a checkpoint so far."""
    state = torch.load(path, weights_only=True) if path.name == "model.pt" else None
    model = TinyLlava()
    if state is not None:
        model.load_state_dict(state)
        return model.eval()
    average = torch.load(path, weights_only=False)["average"]  # our own file: it holds random streams too
    with torch.no_grad():
        for parameter, mean in zip(model.parameters(), average, strict=True):
            parameter.copy_(mean)
    return model.eval()


def processor(tokenizer) -> LlavaProcessor:
    """Images stretched to 60 x 60 without a crop; one placeholder becomes 25 image tokens."""
    images = CLIPImageProcessor(
        do_resize=True,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        do_rescale=True,
        do_normalize=True,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def export(trained: Path, tokenizer_folder: Path, folder: Path) -> None:
    """Write the checkpoint to ``folder``; what else lies there stays."""
    model = load_trained(trained).llava
    model.generation_config.pad_token_id = PAD
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.half().save_pretrained(temporary)
        processor(load_tokenizer(tokenizer_folder)).save_pretrained(temporary)
        _forget_origin(Path(temporary))
        # The config comes last: where it lies, the rest is whole.
        for path in sorted(Path(temporary).iterdir(), key=lambda p: p.name == "config.json"):
            path.replace(folder / path.name)


def _forget_origin(folder: Path) -> None:
    """Leave out what says where the files were made."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text())
        for field in ("_name_or_path", "is_local", "local_files_only"):
            values.pop(field, None)
        path.write_text(json.dumps(values, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


@torch.no_grad()
def verify(trained: Path, folder: Path) -> float:
    """Largest difference between the trained model's hook states and the export's through mmfilter, relative to their
    norm.

    What remains is the rounding of the weights to float16. Raises `SystemExit` where it is more than that.
    """
    model, tokenizer, backbone = (
        load_trained(trained),
        load_tokenizer(folder),
        load_backbone(str(folder), HOOK_LAYER, prompt=PROMPT),
    )
    images = np.random.default_rng(0).integers(0, 256, (8, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    captions = ["a red apple", "two dogs left of a house, on a blue background", "Émile’s café!", "icon"] * 2
    ids = encode(tokenizer, captions)
    hook = model.hook_states(normalised(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255), [ids], ids)
    ours = backbone.activations(backbone.prepare([Image.fromarray(image) for image in images], captions))
    pairs = ((IMAGE, hook[:, 1:PREFIX].flatten(0, 1)), (TEXT, hook[:, PREFIX:-MAX_TOKENS][is_word(ids)]))
    worst = max(
        ((ours.states[ours.side == side] - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
        for side, wanted in pairs
    )
    if worst > 0.01:
        raise SystemExit(f"the export's hook states are {worst:.1%} off the trained model's: it is not the same model")
    return worst


def main() -> None:
    """Command line of the export."""
    parser = argparse.ArgumentParser(description="Export the trained model for transformers.")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "recipe")
    parser.add_argument("--trained", type=Path, help="model.pt, or a checkpoint.pt; default: BUILD/run/model.pt")
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "tiny")
    options = parser.parse_args()
    trained = options.trained or options.build / "run" / "model.pt"
    export(trained, options.build / "tokenizer", options.out)
    print(f"hook states agree to {verify(trained, options.out):.2e}")


if __name__ == "__main__":
    main()
