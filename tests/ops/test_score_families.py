"""`score` on models of other shapes than LLaVA: two towers, pictures of any size, codes, an encoder-decoder."""

from __future__ import annotations

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmfilter.core.cards.cards import Card
from mmfilter.core.input.shards import open_source
from mmfilter.core.model.loading import load_backbone
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.ops.score import score
from mmfilter.ops.score_settings import ScoreSettings
from tests.zoo import build, save

LAYERS = {"clip": -1, "siglip2": -1, "qwen2_vl": 1, "emu3": 1, "blip2_t5": 1, "gemma3": 1, "idefics3": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", LAYERS)
def test_raw_and_support_are_those_of_each_pair_alone(family, make_shard, quiet, tmp_path):
    """The whole pass, batched and sorted, gives every row what its pair gives on its own, computed here in float64."""
    specimen = build(family)
    folder, shard = save(specimen, tmp_path / "model"), make_shard(n=7)
    prompt = None if LAYERS[family] < 0 else specimen.prompt
    backbone = load_backbone(str(folder), LAYERS[family], prompt=prompt)
    rows = torch.nn.functional.normalize(
        torch.randn(64, backbone.d_model, generator=torch.Generator().manual_seed(0)), dim=1
    )
    SAE(rows.T.contiguous(), torch.zeros(64), rows, torch.zeros(backbone.d_model)).save(tmp_path / "sae")
    card = Card(name="t", model=str(folder), layer=LAYERS[family], sae=str(tmp_path / "sae"), prompt=prompt)
    summary = score([str(shard)], ScoreSettings(card, run=tmp_path / "run", batch_size=3), quiet)
    assert summary.n_scored >= 5 and summary.n_samples == 7
    table = pq.read_table(tmp_path / "run" / "scores" / f"{shard.stem}.parquet").to_pylist()
    for raw, row in zip(open_source(str(shard)).samples(), table, strict=True):
        if not row["ok"]:
            assert "positions" in row["reason"] and len(raw.members["txt"]) >= backbone.max_tokens
            continue
        image = Image.open(io.BytesIO(raw.members["jpg"])).convert("RGB")
        found = backbone.activations(backbone.prepare([image], [raw.members["txt"].decode()]))
        image_states, text_states = (found.states[found.side == side].double().numpy() for side in (0, 1))
        u, v = (np.maximum(states @ rows.double().numpy().T, 0) for states in (image_states, text_states))
        strongest = [np.where(f >= np.sort(f, 1)[:, -50:-49], f, 0) for f in (u, v)]  # 50 a token
        u, v = (f.max(0) for f in strongest)
        assert row["support"] == pytest.approx(np.minimum(u, v).sum() / v.sum(), abs=1e-4)
        a, b = image_states.mean(0), text_states.mean(0)
        assert row["raw"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-4)
        assert (row["n_image_tokens"], row["n_text_tokens"]) == (len(image_states), len(text_states))
