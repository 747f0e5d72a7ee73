"""sparsify and dictionary_learning, held against their own classes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core.sae.published.base import TOKENS, D, K, N, Published, case, dump, f64, randomise, states, tensors


def sparse_coder(folder: Path, **options: Any) -> Published:
    sparsify = pytest.importorskip("sparsify")
    theirs = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, **options))
    randomise(theirs)
    theirs.save_to_disk(folder)
    with torch.no_grad():
        found = theirs.encode(states())
        codes = torch.zeros(TOKENS, theirs.num_latents).scatter_(1, found.top_indices, found.top_acts)
        return Published(folder, f64(codes), f64(theirs.decode(found.top_acts, found.top_indices)))


@case("sparsify", "num_latents", peer="eai-sparsify")
def _sparsify(folder: Path) -> Published:
    return sparse_coder(folder / "layers.16", num_latents=N)


@case("sparsify", "num_latents 0, expansion factor", peer="eai-sparsify")
def _sparsify_expansion(folder: Path) -> Published:
    return sparse_coder(folder / "layer_18", expansion_factor=N // D)


@case("sparsify", "LMMs-Lab's folder, with the multi_topk loss", peer="eai-sparsify")
def sparsify_lmms(folder: Path) -> Published:
    dump(
        folder / "config.json",
        {"model": "lmms-lab/llama3-llava-next-8b", "ctx_len": 2048, "dataset": "LLaVA-NeXT-Data"},
    )
    return sparse_coder(folder / "model.layers.24", num_latents=N, multi_topk=True)


@case("sparsify", "square: d_model as many as features", peer="eai-sparsify")
def _sparsify_square(folder: Path) -> Published:
    return sparse_coder(folder / "layers.1", num_latents=D)


# --- dictionary_learning -----------------------------------------------------------------------


def dictionary_learning() -> Any:
    """The package without its front page, which imports what asks for a torchvision that fits."""
    found = importlib.util.find_spec("dictionary_learning")
    if found is None:
        pytest.skip("dictionary_learning is not installed")
    if "dictionary_learning" not in sys.modules:
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(found.submodule_search_locations)
        package.__spec__ = found
        sys.modules["dictionary_learning"] = package
    importlib.import_module("dictionary_learning.dictionary")
    return sys.modules["dictionary_learning"]


def dictionary(
    folder: Path,
    name: str,
    build: Callable[[Any], Any],
    *,
    config: bool = True,
    codes_of: Callable[[Any], torch.Tensor] | None = None,
) -> Published:
    package = dictionary_learning()
    theirs = build(package)
    randomise(theirs)
    if hasattr(theirs, "threshold") and not isinstance(theirs.threshold, torch.nn.Parameter):
        theirs.threshold = torch.tensor(2.5)
    tensors(folder / "ae.pt", theirs.state_dict())
    if config:
        trainer = {
            "dict_class": name,
            "activation_dim": D,
            "dict_size": N,
            "layer": 15,
            "lm_name": "Qwen/Qwen2.5-7B-Instruct",
            "submodule_name": "resid_post_layer_15",
        }
        dump(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 512}})
    x = states()
    with torch.no_grad():
        if name == "AutoEncoder":
            theirs.normalize_decoder()  # what its from_pretrained does
        codes = theirs.encode(x)
        return Published(folder, f64(codes), f64(theirs.decode(codes)))


def topk_classes(package: Any) -> Any:
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    return {
        "AutoEncoderTopK": top_k.AutoEncoderTopK,
        "BatchTopKSAE": batch_top_k.BatchTopKSAE,
        "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    }


for _layout, _cls in (
    ("dictionary_learning", "AutoEncoder"),
    ("dictionary_learning_new", "AutoEncoderNew"),
    ("dictionary_learning_gated", "GatedAutoEncoder"),
    ("dictionary_learning_jumprelu", "JumpReluAutoEncoder"),
):

    @case(_layout, _cls, peer="dictionary-learning")
    def _dictionary(folder: Path, cls: str = _cls) -> Published:
        return dictionary(folder, cls, lambda package: getattr(package.dictionary, cls)(D, N))

    if _cls != "JumpReluAutoEncoder":

        @case(_layout, f"{_cls} without config.json", peer="dictionary-learning")
        def _alone(folder: Path, cls: str = _cls) -> Published:
            return dictionary(folder, cls, lambda package: getattr(package.dictionary, cls)(D, N), config=False)


@case("dictionary_learning_topk", "AutoEncoderTopK", peer="dictionary-learning")
def _dictionary_topk(folder: Path) -> Published:
    return dictionary(folder, "AutoEncoderTopK", lambda package: topk_classes(package)["AutoEncoderTopK"](D, N, K))


@case("dictionary_learning_topk", "BatchTopKSAE", peer="dictionary-learning")
def _dictionary_batchtopk(folder: Path) -> Published:
    return dictionary(folder, "BatchTopKSAE", lambda package: topk_classes(package)["BatchTopKSAE"](D, N, K))


@case("dictionary_learning_topk", "BatchTopKSAE without config.json, activation said", peer="dictionary-learning")
def _dictionary_batchtopk_alone(folder: Path) -> Published:
    made = dictionary(
        folder, "BatchTopKSAE", lambda package: topk_classes(package)["BatchTopKSAE"](D, N, K), config=False
    )
    made.options = {"activation": "batchtopk"}
    return made


@case("dictionary_learning_matryoshka", "MatryoshkaBatchTopKSAE", peer="dictionary-learning")
def _dictionary_matryoshka(folder: Path) -> Published:
    return dictionary(
        folder,
        "MatryoshkaBatchTopKSAE",
        lambda package: topk_classes(package)["MatryoshkaBatchTopKSAE"](D, N, K, [8, N - 8]),
    )
