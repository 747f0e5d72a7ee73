"""List, show, convert and fetch SAEs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from mmfilter.core.cards.cards import REGISTRY, Card, card_names, cards_folder, load_card
from mmfilter.core.cards.sae_options import NO_OPTIONS, SAEOptions
from mmfilter.core.sae.autoencoder import CONFIG, SAE, WEIGHTS
from mmfilter.core.sae.checkpoints import check_whole
from mmfilter.core.sae.pretrained import HUB, find_weights, hub_snapshot, load_sae, parse_hub
from mmfilter.errors import SAEError

OURS = {CONFIG, WEIGHTS, "sparsity.safetensors"}
"""What a folder may hold that `convert` replaces."""


@dataclass(frozen=True)
class Listed:
    """One line of the list: an SAE of a card, or what somebody published."""

    name: str
    """Card or repository"""
    base: str
    """Model that its states come from"""
    layers: str
    width: str
    layout: str
    trained_on: str
    licence: str
    open: str
    """What to give to --sae (or, for a card, to --model), with words in capitals to fill in"""
    options: dict[str, Any]
    """What its files leave open"""
    note: str = ""


def list_saes(word: str | None = None) -> list[Listed]:
    """The SAEs of the cards, then the published ones of `models/saes.yaml`; those with `word` in any field."""
    entries = [_of_card(load_card(name)) for name in card_names()]
    published = yaml.safe_load((cards_folder() / REGISTRY).read_text("utf-8"))
    entries += [_of_registry(item) for item in published["saes"]]
    return [
        entry for entry in entries if word is None or word.lower() in " ".join(map(str, asdict(entry).values())).lower()
    ]


def _of_card(card: Card) -> Listed:
    licence = ", ".join(f"{what}: {name}" for what, name in card.licence.items())
    return Listed(
        card.name,
        card.model,
        str(card.layer),
        "",
        "card",
        "",
        licence,
        card.name,
        card.sae_options.stated(),
        card.summary,
    )


def _of_registry(item: Mapping[str, Any]) -> Listed:
    texts = {
        name: str(item.get(name, "not established"))
        for name in ("name", "base", "layers", "width", "layout", "trained_on", "licence", "open")
    }
    return Listed(**texts, options=dict(item.get("sae_options") or {}), note=item.get("note", ""))


@dataclass(frozen=True)
class Description:
    """What an SAE is, as numbers and statements."""

    source: str
    d_model: int
    n_features: int
    activation: str
    k: int | None
    threshold: dict[str, float] | None
    """Smallest, median and largest threshold; jumprelu only"""
    subtract_b_dec: bool
    normalisation: str
    decoder_norms: dict[str, float]
    """Smallest, median and largest norm of a decoder row"""
    dead_rows: int
    """Decoder rows of norm 0"""
    hash: str
    metadata: dict[str, Any]
    """The publisher's statements, the layout, what was folded, and notes"""


def describe(source: str, options: SAEOptions = NO_OPTIONS) -> Description:
    """Open an SAE and say what it is; raises `SAEError`."""
    sae = load_sae(source, options)
    norms = sae.W_dec.norm(dim=1)
    return Description(
        source,
        sae.d_model,
        sae.n_features,
        sae.activation,
        sae.k,
        None if sae.threshold is None else _spread(sae.threshold),
        sae.subtract_b_dec,
        sae.normalisation,
        _spread(norms),
        int((norms == 0).sum()),
        sae.hash,
        sae.metadata,
    )


def _spread(values: Any) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(values.median()), "max": float(values.max())}


def convert(source: str, destination: Path, options: SAEOptions = NO_OPTIONS, *, force: bool = False) -> SAE:
    """Write the SAE as a folder in the SAELens 6 layout, whole or not at all.

    Returns what was written. Raises `SAEError` when the SAE cannot be opened, or `destination` exists
    and is not an SAE's folder that `force` allows to replace.
    """
    _check_destination(destination, force=force)
    sae = load_sae(source, options, convert=True)
    origin = {name: sae.metadata[name] for name in ("layout", "source", "options") if name in sae.metadata}
    rest = {name: value for name, value in sae.metadata.items() if name not in origin}
    sae = replace(sae, metadata=rest | {"converted_from": origin})
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as temporary:
        try:
            sae.save(Path(temporary) / "new")
        except SafetensorError as error:  # how safetensors says that the disk is full
            raise SAEError(f"{str(destination)!r} cannot be written: {error}") from error
        if destination.exists():
            destination.rename(Path(temporary) / "old")
        (Path(temporary) / "new").rename(destination)
    return sae


def _check_destination(destination: Path, *, force: bool) -> None:
    if not destination.exists():
        return
    if not destination.is_dir() or {file.name for file in destination.iterdir()} - OURS:
        raise SAEError(f"{str(destination)!r} exists and is not an SAE's folder: name another destination")
    if not force:
        raise SAEError(f"{str(destination)!r} exists: name another destination, or --force to replace it")


def fetch(source: str) -> Path:
    """Download an SAE into the hub's cache and return where it lies; raises `SAEError`."""
    if not source.startswith(HUB):
        raise SAEError(f"SAE {source!r} cannot be fetched; expected hf:OWNER/REPO[@REVISION]/folder-or-file")
    place = parse_hub(source)
    path = hub_snapshot(place) / place.path
    if place.path:  # the top of a repository may hold nothing but folders
        check_whole(find_weights(path, source))
    return path
