"""Every layout: small files written the publisher's way, opened here, against the publisher's code or its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmfilter.core.cards.sae_options import SAEOptions, make_options
from mmfilter.core.sae.layouts import LAYOUTS, NAMED
from mmfilter.core.sae.pretrained import load_sae
from tests.core.sae.published import CASES, dictionaries, language, saelens, vision
from tests.core.sae.published.base import TOKENS, D, N, parts, relu, rng, run, states


@pytest.mark.filterwarnings("ignore")  # peers' own
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_codes_and_reconstructions_are_the_publishers(case, tmp_path, record_property):
    for name in ("layout", "publisher", "verified_by", "what"):
        record_property(name, getattr(case, name))
    made = case.write(tmp_path)
    sae = load_sae(made.path, make_options(made.options))
    assert sae.metadata["layout"] == case.layout
    codes = sae.encode(states(), max_active=sae.n_features)
    np.testing.assert_allclose(codes.dense().numpy(), made.codes, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(sae.decode(codes, states()).numpy(), made.reconstruction, atol=1e-5, rtol=1e-5)
    assert (made.codes > 0).sum() > TOKENS, "the case says nothing: hardly anything fires"


def test_every_layout_has_a_case():
    refused = {"dictionary_learning_backup"}
    assert {layout.name for layout in (*LAYOUTS, NAMED["plain"])} == {case.layout for case in CASES} | refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["gated", "topk, rescaled by decoder norm", "BatchTopKTrainingSAE training checkpoint"]
)
def test_saelens_opens_what_was_folded_here(name, tmp_path):
    """There and back: SAELens' files, opened and folded here, written, opened by SAELens again, are the same SAE."""
    made = next(case for case in CASES if case.layout == "saelens" and case.what == name).write(tmp_path / "theirs")
    load_sae(made.path).save(tmp_path / "ours")
    again = saelens.from_saelens(saelens.sae_lens().SAE.load_from_disk(tmp_path / "ours"), tmp_path)
    np.testing.assert_allclose(again.codes, made.codes, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(again.reconstruction, made.reconstruction, atol=1e-5, rtol=1e-5)


STATED = {
    "sparsify": (
        dictionaries.sparsify_lmms,
        {
            "model_name": "lmms-lab/llama3-llava-next-8b",
            "hf_hook_name": "model.layers.24",
            "layer": 24,
            "context_size": 2048,
        },
    ),
    "gemma_scope": (language.gemma_scope, {"hook_name": "blocks.20.hook_resid_post", "layer": 20, "stated_l0": 71}),
    "gemma_scope_2": (
        language.gemma_scope_2,
        {
            "model_name": "gemma-3-4b-it",
            "hook_name": "blocks.17.hook_resid_post",
            "hf_hook_name": "model.layers.17.output",
            "stated_l0": 60,
        },
    ),
    "saelens_old": (
        saelens.saev_final,
        {"model_name": "mistral-7b", "hook_name": "blocks.16.hook_resid_post", "layer": 16},
    ),
    "llama_scope": (
        language.llama_scope,
        {"model_name": "meta-llama/Llama-3.1-8B", "hook_name": "blocks.15.hook_resid_post", "layer": 15},
    ),
    "qwen_scope": (language.qwen_scope, {"model_name": "Qwen/Qwen3-1.7B-Base", "layer": 12}),
    "goodfire": (language.goodfire, {"model_name": "meta-llama/Llama-3.1-8B-Instruct", "layer": 19}),
    "vit_prisma": (vision.prisma_topk, {"hook_name": "blocks.9.hook_resid_post", "layer": 9}),
}


@pytest.mark.parametrize("name", STATED)
def test_what_the_publisher_states_is_kept(name, tmp_path):
    write, said = STATED[name]
    made = write(tmp_path)
    metadata = load_sae(made.path, make_options(made.options)).metadata
    assert {key: metadata.get(key) for key in said} == said


@pytest.mark.parametrize("orientation", ["features_last", "features_first"])
def test_a_square_matrix_opens_as_it_is_said_to_lie(orientation, tmp_path):
    w = {
        "W_enc": torch.randn(D, D, generator=rng()),
        "W_dec": torch.randn(D, D, generator=rng(2)),
        "b_enc": torch.zeros(D),
        "b_dec": torch.zeros(D),
    }
    torch.save(w, tmp_path / "m.pt")
    sae = load_sae(
        tmp_path, SAEOptions(layout="plain", activation="relu", subtract_b_dec=False, orientation=orientation)
    )
    turn = (lambda matrix: matrix) if orientation == "features_last" else (lambda matrix: matrix.T)
    assert torch.equal(sae.W_enc, turn(w["W_enc"])) and torch.equal(sae.W_dec, turn(w["W_dec"]))


def test_free_decoder_norms_can_be_kept(tmp_path):
    w = parts()
    torch.save({**language.linear(w, "bias"), "bias": w["b_dec"]}, tmp_path / "ae.pt")
    kept, unit = load_sae(tmp_path, SAEOptions(unit_decoder=False)), load_sae(tmp_path)
    assert torch.equal(kept.W_dec, w["W_dec"])
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(N))
    for sae in (kept, unit):
        _, wanted = run(w, relu, subtract=True)
        np.testing.assert_allclose(sae.decode(sae.encode(states()), states()).numpy(), wanted, atol=1e-5)
