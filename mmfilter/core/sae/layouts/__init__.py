"""How SAEs are published: one entry a layout, recognised by the names of files and tensors."""

from __future__ import annotations

import difflib

from mmfilter.core.cards.sae_options import SAEOptions
from mmfilter.core.sae.autoencoder import SAE
from mmfilter.core.sae.checkpoints import Checkpoint
from mmfilter.core.sae.layouts import language, saelens, vision
from mmfilter.core.sae.layouts.base import Layout, refuse
from mmfilter.core.sae.layouts.build import build
from mmfilter.errors import SAEError

LAYOUTS: tuple[Layout, ...] = (*saelens.LAYOUTS, *vision.LAYOUTS, *language.LAYOUTS)
"""In the order in which they are tried."""
NAMED: dict[str, Layout] = {layout.name: layout for layout in (*LAYOUTS, language.PLAIN)}


def interpret(checkpoint: Checkpoint, options: SAEOptions) -> tuple[Layout, SAE]:
    """The layout of these files and the SAE that they hold; raises `SAEError`."""
    layout = _stated(options.layout) if options.layout else _recognised(checkpoint)
    return layout, build(checkpoint, layout, options)


def _stated(name: str) -> Layout:
    if name not in NAMED:
        near = difflib.get_close_matches(name, NAMED, 1)
        raise SAEError(
            f"no SAE layout {name!r}; {f'did you mean {near[0]!r}? ' if near else ''}There is {', '.join(NAMED)}"
        )
    return NAMED[name]


def _recognised(checkpoint: Checkpoint) -> Layout:
    for layout in LAYOUTS:
        if layout.recognises(checkpoint):
            return layout
    names = sorted({*checkpoint.tensors, *checkpoint.values})
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    beside = f" and {checkpoint.config_name} beside it" if checkpoint.config_name else ""
    if {"W_enc", "W_dec"} <= set(names):
        step = (
            "where you know what it is, --sae-option layout=plain --sae-option activation=… --sae-option "
            "subtract_b_dec=… opens it"
        )
    else:
        step = "--sae-option layout=NAME opens it as one of " + ", ".join(NAMED)
    refuse(checkpoint, f"is in no layout known here: {checkpoint.path.name} holds {shown}{beside}; {step}")
