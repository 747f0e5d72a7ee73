"""Layouts of SAEs on language models: sparsify, dictionary_learning, Gemma Scope, Llama Scope, Qwen-Scope, …"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts.base import (
    LINEAR_NAMES,
    SAELENS_NAMES,
    Layout,
    Orientations,
    Reading,
    number_in,
    refuse,
    residual_hook,
    stated,
)

TORCH = ("*.pt", "*.pth")
LINEAR: Orientations = {"encoder": "features_first", "decoder": "features_last"}
"""nn.Linear keeps (outputs, inputs)"""


# --- EleutherAI sparsify -----------------------------------------------------------------------


def _sparsify(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    config = checkpoint.config
    activation = config.get("activation") or "topk"
    for key, reason in (
        ("transcode", "a transcoder, which maps one place in the model to another"),
        ("skip_connection", "one with a linear skip connection"),
        ("signed", "one whose features can be negative"),
    ):
        if config.get(key):
            refuse(checkpoint, f"is {reason}; only autoencoders are opened")
    if activation != "topk" or "W_skip" in checkpoint.tensors:
        refuse(
            checkpoint,
            f"has the activation {activation!r}{' and a skip connection' if 'W_skip' in checkpoint.tensors else ''}; "
            "only topk is opened",
        )
    d = config["d_in"]
    run = checkpoint.json("../config.json")
    name = checkpoint.folder.name
    hook = residual_hook(number_in(r"layers?[._](\d+)$", name)) | {"layer": number_in(r"layers?[._](\d+)", name)}
    if not name.startswith("layer_"):  # else an old release, which names the layer only
        hook["hf_hook_name"] = name
    return Reading(
        "topk",
        k=config.get("k"),
        subtract_b_dec=True,
        d_model=d,
        n_features=config.get("num_latents") or d * config.get("expansion_factor", 32),
        metadata=hook
        | {"model_name": run.get("model"), "dataset_path": run.get("dataset"), "context_size": run.get("ctx_len")},
    )


# --- dictionary_learning -----------------------------------------------------------------------

AUTOENCODERS = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def _dictionary(checkpoint: Checkpoint, activation: str | None, *, subtract: bool, **more: Any) -> Reading:
    """What is the same for all classes of dictionary_learning."""
    run = checkpoint.config if "trainer" in checkpoint.config else checkpoint.json("../config.json")
    trainer, buffer = run.get("trainer") or {}, run.get("buffer") or {}
    layer = trainer.get("layer")
    metadata = {
        "model_name": trainer.get("lm_name"),
        "hook_name": trainer.get("submodule_name"),
        "context_size": buffer.get("ctx_len"),
    }
    if trainer.get("submodule_name") in (None, f"resid_post_layer_{layer}"):
        metadata |= residual_hook(layer)
    if trainer.get("submodule_name"):
        metadata["submodule_name"] = trainer["submodule_name"]
    return Reading(
        activation,
        subtract_b_dec=subtract,
        d_model=trainer.get("activation_dim"),
        n_features=trainer.get("dict_size"),
        metadata=metadata | {"layer": layer},
        **more,
    )


def _dictionary_class(checkpoint: Checkpoint) -> str | None:
    run = checkpoint.config if "trainer" in checkpoint.config else checkpoint.json("../config.json")
    name = (run.get("trainer") or {}).get("dict_class")
    if name is not None and name not in AUTOENCODERS:
        refuse(checkpoint, f"is a {name!r} of dictionary_learning; expected one of {', '.join(AUTOENCODERS)}")
    return name


def _topk_or_batchtopk(checkpoint: Checkpoint, options: SAEOptions) -> Reading:
    """AutoEncoderTopK and BatchTopKSAE keep the same tensors; only config.json tells which."""
    kinds = {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "batchtopk"}
    tells = "MatryoshkaBatchTopKSAE" if "group_sizes" in checkpoint.tensors else _dictionary_class(checkpoint)
    threshold = checkpoint.tensors.get("threshold")
    frozen = None if threshold is None or threshold.numel() != 1 or float(threshold) < 0 else float(threshold)
    k = checkpoint.tensors.get("k")
    activation = options.activation or kinds.get(tells or "")
    return _dictionary(
        checkpoint,
        activation,
        subtract=True,
        k=None if k is None else int(k),
        threshold=frozen if activation == "batchtopk" else None,
        doubts={
            "activation": (
                "has the tensors of both AutoEncoderTopK and BatchTopKSAE of dictionary_learning, and no config.json "
                "beside it that says which"
            ),
            "threshold": "is a BatchTopK dictionary from before its threshold was known (it is below 0)",
        },
    )


def _wrapped(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    refuse(
        checkpoint,
        "is a backup that dictionary_learning wrote in the middle of training ({'ae': …}): its biases are not scaled "
        "to the "
        "model's activations; use the ae.pt from the end of training",
    )


# --- Gemma Scope -------------------------------------------------------------------------------


def _gemma_scope(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    where = checkpoint.trail
    if "transcoder" in where:
        refuse(
            checkpoint, "is a transcoder, which maps one place in the model to another; only autoencoders are opened"
        )
    if "embedding" in where:
        refuse(checkpoint, "is on the token embeddings, which the image never passes; use one on a layer")
    layer = number_in(r"layer_(\d+)", where)
    site = next(
        (
            hook
            for mark, hook in (("-res", "hook_resid_post"), ("-mlp", "hook_mlp_out"), ("-att", "attn.hook_z"))
            if mark in where
        ),
        None,
    )
    hook = {"hook_name": f"blocks.{layer}.{site}", "layer": layer} if site and layer is not None else {}
    return Reading(
        "jumprelu", subtract_b_dec=False, metadata=hook | {"stated_l0": number_in(r"average_l0_(\d+)", where)}
    )


def _gemma_scope_2(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    config, where = checkpoint.config, checkpoint.trail
    mapped = config.get("hf_hook_point_out") not in (None, config.get("hf_hook_point_in"))
    kind = next(
        (word for word in ("transcoder", "crosscoder", "clt") if word in f"{where} {config.get('type')}"),
        "transcoder" if mapped else None,
    )
    if kind or config.get("affine_connection") or "affine_skip_connection" in checkpoint.tensors:
        refuse(
            checkpoint,
            f"is a {kind or 'transcoder with an affine connection'}, which maps one place in the model to another; "
            "only autoencoders are opened",
        )
    if config.get("architecture", "jump_relu") != "jump_relu":
        refuse(checkpoint, f"has architecture {config['architecture']!r}; Gemma Scope 2 is jump_relu")
    hook = config.get("hf_hook_point_in")
    layer = number_in(r"layers\.(\d+)\.", hook) if hook else number_in(r"layer_(\d+)", where)
    metadata = {
        "model_name": config.get("model_name"),
        "hf_hook_name": hook,
        "stated_l0": config.get("l0"),
        "layer": layer,
    }
    if layer is not None and ("resid_post" in where or str(hook).endswith(f"layers.{layer}.output")):
        metadata = residual_hook(layer) | stated(metadata, *metadata)
    width = config.get("width")
    return Reading(
        "jumprelu", subtract_b_dec=False, n_features=width if isinstance(width, int) else None, metadata=metadata
    )


# --- Llama Scope and Llamascopium --------------------------------------------------------------


def _scope_activation(checkpoint: Checkpoint, name: str) -> str:
    if name not in ("relu", "jumprelu", "topk", "batchtopk"):
        refuse(checkpoint, f"has the activation {name!r}; expected relu, jumprelu, topk or batchtopk")
    return name


def _refuse_mapped(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    if config.get("hook_point_out") not in (None, config.get("hook_point_in")):
        refuse(
            checkpoint,
            f"maps {config.get('hook_point_in')!r} to {config['hook_point_out']!r}, a transcoder; only autoencoders "
            "are opened",
        )
    if config.get("use_glu_encoder"):
        refuse(checkpoint, "has a gated linear unit as its encoder, which is not opened")


def _llama_scope(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    """As OpenMOSS' own loader of that time did it: raw units, decoder rows of norm 1, then the threshold.

    Its `dataset-wise` norm s·x with s = √d / mean norm becomes biases divided by s, which is the fold of
    the scale with every activation divided by s; the stored threshold is in these units.
    """
    config = checkpoint.config
    _refuse_mapped(checkpoint, config)
    activation, threshold = (
        _scope_activation(checkpoint, config.get("act_fn", "relu")),
        config.get("jump_relu_threshold"),
    )
    if activation == "topk" and threshold:
        activation = "jumprelu"
    norm = config.get("norm_activation", "none")
    metadata = {
        "hook_name": config.get("hook_point_in"),
        "model_name": "meta-llama/Llama-3.1-8B" if "Llama3_1-8B" in checkpoint.trail else None,
    }
    reading = Reading(
        activation,
        k=config.get("top_k"),
        threshold=threshold if activation == "jumprelu" else None,
        threshold_on_unit_decoder=bool(config.get("sparsity_include_decoder_norm", True)),
        unit_decoder=bool(config.get("sparsity_include_decoder_norm", True)),
        subtract_b_dec=bool(config.get("apply_decoder_bias_to_pre_encoder", True)),
        normalisation="constant_norm_rescale" if norm == "token-wise" else "none",
        d_model=config.get("d_model"),
        n_features=config.get("d_sae"),
        metadata=metadata,
    )
    if norm == "dataset-wise":
        average = (config.get("dataset_average_activation_norm") or {}).get("in")
        if not average:
            refuse(checkpoint, "normalises 'dataset-wise' and does not give dataset_average_activation_norm")
        reading.bias_factor = average / math.sqrt(config["d_model"])
        reading.notes.append(
            "activations are in the model's units, as OpenMOSS' loader has them; SAELens' are larger by √d_model / "
            "mean norm"
        )
    elif norm not in ("none", "inference", "token-wise"):
        refuse(checkpoint, f"normalises {norm!r}, which depends on the batch")
    return reading


def _llamascopium(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    config = checkpoint.config
    if config.get("sae_type", "sae") != "sae":
        refuse(checkpoint, f"is a {config['sae_type']!r}, not an autoencoder of one place in the model")
    _refuse_mapped(checkpoint, config)
    activation, hook = _scope_activation(checkpoint, config.get("act_fn", "relu")), config.get("hook_point_in")
    on_norm = bool(config.get("sparsity_include_decoder_norm", True))
    log_threshold = next(
        (tensor for name, tensor in checkpoint.tensors.items() if name.endswith("log_jumprelu_threshold")), None
    )
    reading = Reading(
        activation,
        k=config.get("top_k"),
        threshold=None if log_threshold is None else log_threshold.float().exp(),
        threshold_on_unit_decoder=on_norm,
        unit_decoder=on_norm and activation == "topk",
        subtract_b_dec=False,
        d_model=config["d_model"],
        n_features=int(config["d_model"] * config["expansion_factor"]),
        doubts={
            "threshold": (
                f"has the activation {activation!r} and no threshold: Llamascopium writes one when it converts the SAE "
                "to jumprelu"
            )
        },
        metadata=stated(config, "model_name") | {"hook_name": hook},
    )
    return _scope_norm(checkpoint, reading, config.get("norm_activation", "dataset-wise"), hook)


def _scope_norm(checkpoint: Checkpoint, reading: Reading, norm: str, hook: str | None) -> Reading:
    if norm == "token-wise":
        reading.normalisation = "constant_norm_rescale"
    elif norm == "dataset-wise":
        names = [f"dataset_average_activation_norm.{place}" for place in (hook, "in")]
        average = next((float(checkpoint.tensors[name]) for name in names if name in checkpoint.tensors), None)
        reading.scale = math.sqrt(checkpoint.config["d_model"]) / average if average else None
        reading.doubts = {
            **reading.doubts,
            "scale": "normalises 'dataset-wise' and its weights do not hold the mean norm of the training activations",
        }
    elif norm != "inference":
        refuse(checkpoint, f"normalises {norm!r}, which depends on the batch")
    return reading


# --- the rest ----------------------------------------------------------------------------------


def _qwen_scope(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    layer = number_in(r"layer(\d+)\.sae\.pt", checkpoint.path.name)
    base = checkpoint.trail.partition("SAE-Res-")[2].partition("-W")[0]
    return Reading(
        "topk",
        k=number_in(r"-L0_(\d+)", checkpoint.trail),
        subtract_b_dec=False,
        doubts={"k": "is named nowhere with its repository, whose name has k (…-L0_50)"},
        metadata=residual_hook(layer) | {"model_name": f"Qwen/{base}" if base else None},
    )


def _openai(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    activation = checkpoint.values.get("activation", "ReLU")
    state = checkpoint.values.get("activation_state_dict") or {}
    if activation not in ("ReLU", "TopK") or state.get("postact_fn", "ReLU") != "ReLU":
        refuse(
            checkpoint,
            f"has the activation {activation!r} ({state.get('postact_fn', 'no')} after it); expected ReLU, or TopK "
            "with ReLU after it",
        )
    topk = activation == "TopK"
    return Reading(
        "topk" if topk else "relu",
        k=state.get("k"),
        subtract_b_dec=True,
        normalisation="layer_norm" if topk else "none",
        metadata={"model_name": "gpt2"},
    )


def _goodfire(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    layer = number_in(r"-l(\d+)", checkpoint.trail)
    model = next(
        (
            f"meta-llama/{name}"
            for name in ("Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct")
            if name in checkpoint.trail
        ),
        None,
    )
    return Reading("relu", subtract_b_dec=False, metadata=residual_hook(layer) | {"model_name": model})


def _mmdiff(checkpoint: Checkpoint, _: SAEOptions) -> Reading:
    """vlm_scope: JumpReLU begun from Gemma Scope, or SAELens' TopK begun from Llama Scope; neither subtracts b_dec."""
    jumps = "threshold" in checkpoint.tensors
    return Reading(
        "jumprelu" if jumps else "topk",
        tensors={"threshold": "threshold"} if jumps else {},
        subtract_b_dec=False,
        doubts={"k": "does not hold the k of its topk (MMDiff's README states 50)"},
        metadata=residual_hook(number_in(r"layer_(\d+)\.pt", checkpoint.path.name)),
    )


def _plain(checkpoint: Checkpoint, options: SAEOptions) -> Reading:
    """Tensors of the usual names and nothing else known: the user says the rest; no normalisation unless stated."""
    jumps = options.activation == "jumprelu" and "threshold" in checkpoint.tensors
    return Reading(None, tensors={"threshold": "threshold"} if jumps else {})


def _is_dictionary(*names: str) -> Callable[[Checkpoint], bool]:
    """Whether config.json names one of these classes, or there is none."""
    return lambda checkpoint: (
        (not checkpoint.config or "trainer" in checkpoint.config) and _dictionary_class(checkpoint) in (None, *names)
    )


SCOPE = {**LINEAR_NAMES, "b_dec": "decoder.bias"}
LOWER = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
UPPER = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
GATED = {
    "W_enc": "encoder.weight",
    "W_dec": "decoder.weight",
    "b_dec": "decoder_bias",
    "r_mag": "r_mag",
    "b_gate": "gate_bias",
    "b_mag": "mag_bias",
}
OPENAI = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
GOODFIRE = {
    ours: f"{part}coder_linear.{kind}"
    for ours, part, kind in (
        ("W_enc", "en", "weight"),
        ("b_enc", "en", "bias"),
        ("W_dec", "de", "weight"),
        ("b_dec", "de", "bias"),
    )
}
THRESHOLD = {"threshold": "threshold"}
NO_BIAS = frozenset({"b_dec"})
DIMENSIONS = frozenset({"d_model", "expansion_factor"})


LAYOUTS = (
    Layout(
        "sparsify",
        "EleutherAI sparsify, LMMs-Lab",
        ("sae.safetensors",),
        {**LINEAR_NAMES, "W_dec": "W_dec", "b_dec": "b_dec"},
        _sparsify,
        keys=frozenset({"d_in"}),
        encoder="features_first",
    ),
    Layout("gemma_scope", "Gemma Scope", ("params.npz",), SAELENS_NAMES | THRESHOLD, _gemma_scope),
    Layout("gemma_scope_2", "Gemma Scope 2", ("params.safetensors",), LOWER, _gemma_scope_2),
    Layout(
        "llama_scope",
        "Llama Scope",
        ("final.safetensors", "final.pt", "sae_weights.safetensors"),
        SCOPE,
        _llama_scope,
        keys=frozenset({"d_model", "norm_activation", "act_fn", "d_sae"}),
        optional=NO_BIAS,
        **LINEAR,
    ),
    Layout(
        "llama_scope_r1",
        "Llama Scope R1-Distill",
        ("sae_weights.safetensors",),
        SCOPE,
        _llamascopium,
        keys=DIMENSIONS,
        optional=NO_BIAS,
        **LINEAR,
    ),
    Layout(
        "llamascopium",
        "Llamascopium (OpenMOSS)",
        ("sae_weights.safetensors",),
        UPPER,
        _llamascopium,
        keys=DIMENSIONS,
        optional=NO_BIAS,
    ),
    Layout("qwen_scope", "Qwen-Scope", ("layer*.sae.pt",), SAELENS_NAMES, _qwen_scope, **LINEAR),
    Layout("openai", "OpenAI sparse_autoencoder", TORCH, OPENAI, _openai, **LINEAR),
    Layout("goodfire", "Goodfire", TORCH, GOODFIRE, _goodfire, **LINEAR),
    Layout("mmdiff", "MMDiff (vlm_scope)", ("*_layer_*.pt",), SAELENS_NAMES, _mmdiff),
    Layout(
        "dictionary_learning_backup",
        "dictionary_learning, in the middle of training",
        TORCH,
        {},
        _wrapped,
        values=frozenset({"ae"}),
    ),
    Layout(
        "dictionary_learning_gated",
        "dictionary_learning GatedAutoEncoder",
        TORCH,
        GATED,
        lambda checkpoint, _: _dictionary(checkpoint, "gated", subtract=True),
        **LINEAR,
    ),
    Layout(
        "dictionary_learning",
        "dictionary_learning AutoEncoder",
        TORCH,
        {**LINEAR_NAMES, "b_dec": "bias"},
        lambda checkpoint, _: _dictionary(checkpoint, "relu", subtract=True, unit_decoder=True),
        fits=_is_dictionary("AutoEncoder"),
        **LINEAR,
    ),
    Layout(
        "dictionary_learning_new",
        "dictionary_learning AutoEncoderNew",
        TORCH,
        SCOPE,
        lambda checkpoint, _: _dictionary(checkpoint, "relu", subtract=False),
        fits=_is_dictionary("AutoEncoderNew"),
        **LINEAR,
    ),
    Layout(
        "dictionary_learning_topk",
        "dictionary_learning AutoEncoderTopK, BatchTopKSAE",
        TORCH,
        {**LINEAR_NAMES, "b_dec": "b_dec"},
        _topk_or_batchtopk,
        fits=_is_dictionary("AutoEncoderTopK", "BatchTopKSAE"),
        **LINEAR,
    ),
    Layout(
        "dictionary_learning_matryoshka",
        "dictionary_learning MatryoshkaBatchTopKSAE",
        TORCH,
        SAELENS_NAMES,
        _topk_or_batchtopk,
        values=frozenset({"group_sizes"}),
    ),
    Layout(
        "dictionary_learning_jumprelu",
        "dictionary_learning JumpReluAutoEncoder",
        ("ae.pt", "ae_*.pt"),
        SAELENS_NAMES | THRESHOLD,
        lambda checkpoint, _: _dictionary(checkpoint, "jumprelu", subtract=False, tensors=THRESHOLD),
        fits=_is_dictionary("JumpReluAutoEncoder"),
    ),
)

PLAIN = Layout("plain", "anyone: W_enc, b_enc, W_dec, b_dec", ("*",), SAELENS_NAMES, _plain, encoder=None, decoder=None)
