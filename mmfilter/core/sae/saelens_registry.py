"""SAEs that SAELens opens (`saelens:RELEASE/ID`), turned into ours. The one door to `sae_lens`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from mmfilter.core.cards.sae_options import NO_OPTIONS
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts import interpret
from mmfilter.errors import MissingExtra, SAEError


def load_registered(source: str) -> SAE:
    """`saelens:RELEASE/ID` by SAELens' own loader; raises `SAEError` and, without SAELens, `MissingExtra`."""
    try:
        import sae_lens
    except ImportError as error:
        raise MissingExtra(f"SAE {source!r}", "sae-lens") from error
    release, slash, name = source.removeprefix("saelens:").partition("/")
    if not slash:
        raise SAEError(f"SAE {source!r} is not saelens:RELEASE/ID")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            theirs = sae_lens.SAE.from_pretrained(release, name)
        except Exception as error:  # whatever a loader of SAELens or the hub raises, it is the user who can act
            raise SAEError(f"SAELens cannot open {source!r}: {' '.join(str(error).split())[:300]}") from error
    if any("norm_scaling_factor" in str(warning.message) for warning in caught):
        raise SAEError(
            f"SAELens opens {source!r} without the activation scale that it was trained with: use its files, hf:…, "
            "with --sae-option scale=NUMBER"
        )
    return convert(theirs, source)


def convert(theirs: Any, source: str) -> SAE:
    """A SAELens SAE object as ours, by way of the tensors and the configuration that it would save."""
    tensors: dict[str, torch.Tensor] = {name: tensor.detach().cpu() for name, tensor in theirs.state_dict().items()}
    theirs.process_state_dict_for_saving(tensors)
    checkpoint = Checkpoint(Path(source) / "sae_weights.safetensors", source, source, tensors, theirs.cfg.to_dict())
    _, sae = interpret(checkpoint, NO_OPTIONS)
    sae.metadata.update({"layout": "saelens", "source": source})
    return sae
