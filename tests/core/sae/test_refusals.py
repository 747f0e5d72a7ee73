"""SAE files that leave a doubt: each is refused in one line that says why and what settles it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts.base import SAELENS_NAMES, Layout, Reading
from mmfilter.core.sae.layouts.build import build
from mmfilter.core.sae.pretrained import load_sae
from mmfilter.errors import SAEError
from tests.core.sae.published.base import D, K, N, dump, parts, tensors
from tests.core.sae.published.language import linear, scope_config, upper
from tests.core.sae.published.saelens import old_folder
from tests.core.sae.published.vision import nearly_unit, overcomplete, prisma_config, saev_file


def saelens_folder(folder: Path, shapes: dict | None = None, **config: Any) -> Path:
    tensors(folder / "sae_weights.safetensors", parts(**(shapes or {})))
    dump(
        folder / "cfg.json",
        {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": {"sae_lens_version": "6.1.0"}} | config,
    )
    return folder


def sparsify_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    w = parts()
    tensors(
        folder / "sae.safetensors",
        {
            "encoder.weight": w["W_enc"].T,
            "encoder.bias": w["b_enc"],
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
            **(extra or {}),
        },
    )
    dump(folder / "cfg.json", {"d_in": D, "num_latents": N, "k": K} | config)
    return folder


def gemma_2_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    w = parts(threshold=(N,))
    tensors(
        folder / "params.safetensors",
        {**{name.replace("W_", "w_"): value for name, value in w.items()}, **(extra or {})},
    )
    dump(folder / "config.json", {"architecture": "jump_relu"} | config)
    return folder


def scope_folder(folder: Path, extra: dict | None = None, **config: Any) -> Path:
    tensors(folder / "sae_weights.safetensors", upper(parts(), **(extra or {})))
    dump(folder / "config.json", scope_config(act_fn="relu") | config)
    return folder


def one_file(folder: Path, name: str, **changes: Any) -> Path:
    torch.save({**parts(), **changes}, folder / name)
    return folder / name


def prisma_folder(folder: Path, **config: Any) -> Path:
    tensors(folder / "weights.pt", parts())
    dump(folder / "config.json", prisma_config(**config))
    return folder


def gemma_1_folder(folder: Path, place: str) -> Path:
    (folder / place).mkdir(parents=True)
    np.savez(folder / place / "params.npz", **{name: value.numpy() for name, value in parts(threshold=(N,)).items()})
    return folder / place


TOPK_TENSORS = {"b_dec": torch.zeros(D), "threshold": torch.tensor(-1.0), "k": torch.tensor(K)}

REFUSALS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "temporal": (
        lambda p: saelens_folder(p, architecture="temporal"),
        {},
        "has architecture 'temporal', which is not opened: its features depend on earlier tokens",
    ),
    "matching pursuit": (
        lambda p: saelens_folder(p, architecture="matching_pursuit"),
        {},
        "it encodes by a search, not by one product",
    ),
    "abstopk": (lambda p: saelens_folder(p, architecture="abstopk"), {}, "its features can be negative"),
    "transcoder": (
        lambda p: saelens_folder(p, architecture="jumprelu_skip_transcoder"),
        {},
        "it maps one place in the model to another",
    ),
    "unknown architecture": (
        lambda p: saelens_folder(p, architecture="new"),
        {},
        "has architecture 'new'; expected one of standard, gated, jumprelu, topk, batchtopk",
    ),
    "scale": (
        lambda p: saelens_folder(p, normalize_activations="expected_average_only_in"),
        {},
        "nothing says whether it is (scale=1 when it is); settle it with --sae-option scale=NUMBER",
    ),
    "SAE-V before the end": (
        lambda p: old_folder(p / "40960000", parts(), normalize_activations="expected_average_only_in"),
        {},
        "states normalize_activations 'expected_average_only_in', a factor √d_model / mean norm of the "
        "training activations",
    ),
    "whitening": (
        lambda p: saelens_folder(p, normalize_activations="covariance_whitening"),
        {},
        "to be folded first: save its inference form with SAELens",
    ),
    "unknown normalisation": (
        lambda p: saelens_folder(p, normalize_activations="rms"),
        {},
        "states normalize_activations 'rms', an unknown normalisation",
    ),
    "batchtopk without threshold": (
        lambda p: saelens_folder(p, architecture="batchtopk"),
        {},
        "is a BatchTopK checkpoint from before its threshold was known; settle it with --sae-option threshold=NUMBER",
    ),
    "topk without k": (
        lambda p: saelens_folder(p, architecture="topk"),
        {},
        "does not say its k; settle it with --sae-option k=NUMBER",
    ),
    "k beyond": (
        lambda p: saelens_folder(p, architecture="topk", k=N + 1),
        {},
        f"activation 'topk' with k={N + 1}; expected 1 to {N}",
    ),
    "missing tensor": (
        lambda p: saelens_folder(p, architecture="jumprelu"),
        {},
        "lacks the tensor 'threshold' (layout saelens); it has W_dec, W_enc, b_dec, b_enc",
    ),
    "other width": (
        lambda p: saelens_folder(p, d_in=D + 1),
        {},
        f"states {D + 1} d_model, its encoder has {D}: the file belongs to another configuration",
    ),
    "other features": (lambda p: saelens_folder(p, d_sae=N + 1), {}, f"states {N + 1} features, its encoder has {N}"),
    "turned decoder": (
        lambda p: saelens_folder(p, {"W_dec": (D, N)}),
        {},
        f"has W_dec of shape ({D}, {N}); an encoder of {D} × {N} asks for ({N}, {D})",
    ),
    "tanh-relu": (
        lambda p: old_folder(p, parts(), activation_fn_str="tanh-relu"),
        {},
        "has the activation 'tanh-relu', which is not opened; expected relu or topk",
    ),
    "factor without fine-tuning": (
        lambda p: old_folder(p, parts(scaling_factor=(N,))),
        {},
        "has a tensor 'scaling_factor' that is not 1",
    ),
    "sparsify transcoder": (
        lambda p: sparsify_folder(p, transcode=True),
        {},
        "is a transcoder, which maps one place in the model to another; only autoencoders",
    ),
    "sparsify skip": (lambda p: sparsify_folder(p, skip_connection=True), {}, "is one with a linear skip connection"),
    "sparsify skip tensor": (
        lambda p: sparsify_folder(p, {"W_skip": torch.zeros(D, D)}),
        {},
        "and a skip connection; only topk is opened",
    ),
    "sparsify groupmax": (
        lambda p: sparsify_folder(p, activation="groupmax"),
        {},
        "has the activation 'groupmax'; only topk is opened",
    ),
    "sparsify signed": (lambda p: sparsify_folder(p, signed=True), {}, "is one whose features can be negative"),
    "dictionary backup": (
        lambda p: one_file(p, "ae.pt", ae={"bias": torch.zeros(D)}),
        {},
        "is a backup that dictionary_learning wrote in the middle of training",
    ),
    "dictionary topk or batchtopk": (
        lambda p: (
            torch.save({**linear(parts(), "b_dec"), "k": torch.tensor(K), "threshold": torch.tensor(1.0)}, p / "ae.pt"),
            p / "ae.pt",
        )[1],
        {},
        "no config.json beside it that says which; settle it with --sae-option activation=relu|topk|batchtopk|jumprelu",
    ),
    "dictionary batchtopk without threshold": (
        lambda p: (torch.save({**linear(parts(), "b_dec"), **TOPK_TENSORS}, p / "ae.pt"), p / "ae.pt")[1],
        {"activation": "batchtopk"},
        "is a BatchTopK dictionary from before its threshold was known (it is below 0); settle it with "
        "--sae-option threshold=NUMBER",
    ),
    "dictionary class": (
        lambda p: (
            torch.save({**linear(parts(), "b_dec")}, p / "ae.pt"),
            dump(p / "config.json", {"trainer": {"dict_class": "CrossCoder"}}),
            p,
        )[2],
        {},
        "is a 'CrossCoder' of dictionary_learning; expected one of AutoEncoder, AutoEncoderNew",
    ),
    "gemma 1 transcoder": (lambda p: gemma_1_folder(p, "gemma-scope-2b-pt-transcoders/layer_3"), {}, "is a transcoder"),
    "gemma 1 embedding": (
        lambda p: gemma_1_folder(p, "embedding/width_4k/average_l0_6"),
        {},
        "is on the token embeddings, which the image never passes",
    ),
    "gemma 2 affine": (
        lambda p: gemma_2_folder(p, {"affine_skip_connection": torch.zeros(D, D)}),
        {},
        "is a transcoder with an affine connection",
    ),
    "gemma 2 transcoder": (
        lambda p: gemma_2_folder(
            p,
            hf_hook_point_in="model.layers.1.pre_feedforward_layernorm.output",
            hf_hook_point_out="model.layers.1.x.output",
        ),
        {},
        "is a transcoder, which maps one place",
    ),
    "gemma 2 crosscoder": (lambda p: gemma_2_folder(p / "crosscoder" / "layer_9"), {}, "is a crosscoder"),
    "scope crosscoder": (
        lambda p: scope_folder(p, sae_type="crosscoder"),
        {},
        "is a 'crosscoder', not an autoencoder of one place in the model",
    ),
    "scope transcoder": (
        lambda p: scope_folder(p, hook_point_out="blocks.15.hook_mlp_out"),
        {},
        "to 'blocks.15.hook_mlp_out', a transcoder",
    ),
    "scope glu": (lambda p: scope_folder(p, use_glu_encoder=True), {}, "has a gated linear unit as its encoder"),
    "scope batch-wise": (
        lambda p: scope_folder(p, norm_activation="batch-wise"),
        {},
        "normalises 'batch-wise', which depends on the batch",
    ),
    "scope without its norm": (
        lambda p: scope_folder(p),
        {},
        "do not hold the mean norm of the training activations; settle it with --sae-option scale=NUMBER",
    ),
    "scope batchtopk": (
        lambda p: scope_folder(p, act_fn="batchtopk", norm_activation="inference"),
        {},
        "settle it with --sae-option threshold=NUMBER",
    ),
    "qwen without its repository": (
        lambda p: one_file(p, "layer3.sae.pt", W_enc=torch.ones(N, D), W_dec=torch.ones(D, N)),
        {},
        "settle it with --sae-option k=NUMBER",
    ),
    "openai identity": (
        lambda p: (
            torch.save(
                {
                    "encoder.weight": parts()["W_enc"].T,
                    "latent_bias": torch.zeros(N),
                    "decoder.weight": parts()["W_dec"].T,
                    "pre_bias": torch.zeros(D),
                    "activation": "TopK",
                    "activation_state_dict": {"k": K, "postact_fn": "Identity"},
                },
                p / "8.pt",
            ),
            p / "8.pt",
        )[1],
        {},
        "has the activation 'TopK' (Identity after it); expected ReLU, or TopK with ReLU after it",
    ),
    "mmdiff topk": (
        lambda p: one_file(p, "text-only_layer_3.pt"),
        {},
        "does not hold the k of its topk (MMDiff's README states 50); settle it with --sae-option k=NUMBER",
    ),
    "prisma transcoder": (lambda p: prisma_folder(p, is_transcoder=True), {}, "is a transcoder"),
    "prisma tanh": (
        lambda p: prisma_folder(p, activation_fn_str="tanh-relu"),
        {},
        "has architecture 'standard' with activation 'tanh-relu'; expected standard with relu",
    ),
    "prisma topk without k": (
        lambda p: prisma_folder(p, activation_fn_str="topk"),
        {},
        "does not say its k; settle it with --sae-option k=NUMBER",
    ),
    "overcomplete silent": (
        lambda p: overcomplete(p, nearly_unit())[1],
        {},
        "does not hold its activation (overcomplete keeps that in Python); settle it with",
    ),
    "overcomplete batchtopk": (
        lambda p: overcomplete(p, nearly_unit())[1],
        {"activation": "batchtopk"},
        "settle it with --sae-option threshold=NUMBER",
    ),
    "overcomplete norms": (
        lambda p: overcomplete(p, parts()["W_dec"])[1],
        {"activation": "relu"},
        "settle it with --sae-option dictionary=l2|as_is",
    ),
    "overcomplete mlp": (
        lambda p: overcomplete(p, nearly_unit(), **{"encoder.final_block.1.weight": torch.ones(N)})[1],
        {"activation": "relu"},
        "has more than overcomplete's linear encoder ('encoder.final_block.1.weight'); only that one is opened",
    ),
    "saev schema": (
        lambda p: saev_file(p / "sae.pt", {"schema": 9, "cfg": {}}, parts()),
        {},
        "has schema 9 of saev; schemas up to 5 are known",
    ),
    "saev without its configuration": (
        lambda p: saev_file(p / "sae.pt", {"schema": 3}, parts()),
        {},
        "has a configuration that is not as layout saev has it (KeyError: 'cfg')",
    ),
    "sparsify width in words": (
        lambda p: sparsify_folder(p, d_in="six", num_latents=0),
        {},
        "states six d_model, its encoder has 6: the file belongs",
    ),
    "saev schema 1": (
        lambda p: saev_file(p / "sae.pt", {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D, "exp_factor": 4}}, parts()),
        {},
        "has schema 1 of saev, of which some versions subtract b_dec and some do not; settle it with "
        "--sae-option subtract_b_dec=true|false",
    ),
    "saev batchtopk": (
        lambda p: saev_file(
            p / "sae.pt",
            {"schema": 2, "cfg": {"d_vit": D, "activation": {"cls": "BatchTopK", "params": {"top_k": 3}}}},
            parts(),
        ),
        {},
        "is a BatchTopK without its threshold (an older saev); settle it with --sae-option threshold=NUMBER",
    ),
    "unknown names": (
        lambda p: one_file(p, "model.pt"),
        {},
        "is in no layout known here: model.pt holds W_dec, W_enc, b_dec, b_enc; where you know what it "
        "is, --sae-option layout=plain",
    ),
    "unknown tensors": (
        lambda p: (torch.save({"a": torch.zeros(1)}, p / "x.pt"), p)[1],
        {},
        "is in no layout known here: x.pt holds a; --sae-option layout=NAME",
    ),
    "unknown layout": (
        lambda p: one_file(p, "model.pt"),
        {"layout": "plane"},
        "no SAE layout 'plane'; did you mean 'plain'? There is saelens,",
    ),
    "plain without activation": (
        lambda p: one_file(p, "m.pt"),
        {"layout": "plain", "subtract_b_dec": True},
        "does not say its activation; settle it with --sae-option activation=",
    ),
    "plain square": (
        lambda p: one_file(p, "m.pt", W_enc=torch.ones(D, D), W_dec=torch.ones(D, D), b_enc=torch.ones(D)),
        {"layout": "plain", "activation": "relu", "subtract_b_dec": True},
        f"has a square W_enc ({D} × {D}): settle it with --sae-option orientation=features_last|features_first",
    ),
    "not finite": (
        lambda p: one_file(p, "text-only_layer_3.pt", b_enc=torch.full((N,), torch.nan)),
        {"k": K},
        "has values that are not finite in 'b_enc': the file is damaged, or training failed",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_doubt_is_refused_in_one_line(name, tmp_path):
    write, options, words = REFUSALS[name]
    path = write(tmp_path)
    with pytest.raises(SAEError) as error:
        load_sae(path, SAEOptions(**options))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("reading", "words"),
    [
        (
            Reading("tanh", subtract_b_dec=False),
            "has the activation 'tanh'; expected one of relu, topk, batchtopk, jumprelu, gated",
        ),
        (
            Reading("relu", subtract_b_dec=False, normalisation="rms"),
            "has the normalisation 'rms'; expected one of none, layer_norm, constant_norm_rescale",
        ),
    ],
)
def test_a_layout_that_reads_what_no_sae_here_does_is_refused(reading, words):
    checkpoint = Checkpoint(Path("made/up.pt"), "made/up.pt", "made/up.pt", parts())
    layout = Layout("made-up", "nobody", ("*.pt",), SAELENS_NAMES, lambda *_: reading)
    with pytest.raises(SAEError) as error:
        build(checkpoint, layout, SAEOptions())
    assert str(error.value) == f"SAE 'made/up.pt' {words}"
