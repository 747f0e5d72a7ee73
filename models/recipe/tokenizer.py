"""The byte-level BPE tokenizer of the tiny model: 4,096 entries, lower-casing, trained on our own captions."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from scenes import Icons, train_scenes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
"""Their ids are 0 to 4."""
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
VOCABULARY = 4096
MAX_TOKENS = 20
"""Caption tokens a training sequence holds, the end token included."""


def train_tokenizer(icons: Icons, folder: Path, *, captions: int = 80_000, seed: int = 1) -> None:
    """Train on sampled captions and on every training concept's own words, and save to ``folder``."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    texts = [s.caption for s in train_scenes(icons, captions, numbers, rng)]
    texts += [" ".join((w.name, *w.names, *w.keywords)) for w in (icons.words[i] for i in icons.train)]
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    fast.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The saved tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Caption ids (n, 20), closed by ``</s>`` and padded on the right."""
    ids = torch.full((len(captions), MAX_TOKENS), PAD)
    for row, tokens in zip(ids, tokenizer(captions)["input_ids"], strict=True):
        kept = [*tokens[: MAX_TOKENS - 1], EOS]
        row[: len(kept)] = torch.tensor(kept)
    return ids
