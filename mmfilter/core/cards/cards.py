"""Cards: what is known of a model and its SAE, as YAML (`models/*.yaml`). No code, only facts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import mmfilter
from mmfilter.core.cards.sae_options import NO_OPTIONS, SAEOptions, make_options
from mmfilter.errors import ModelError

TextContext = Literal["image", "none"]
REGISTRY = "saes.yaml"
"""The list of published SAEs, which is not a card"""


@dataclass(frozen=True)
class Card:
    """One backbone with one SAE."""

    name: str
    model: str
    """Hub id, or a folder (relative ones are looked for beside the card)"""
    layer: int
    """Decoder layer whose output the SAE reads, counted from 0"""
    sae: str
    """Folder or file (relative ones are looked for beside the card), or what else `core/model/pretrained` opens"""
    sae_options: SAEOptions = NO_OPTIONS
    """What the SAE's files leave open"""
    summary: str = ""
    revision: str | None = None
    prompt: str | None = None
    """With `{caption}` where the caption goes; None asks the model's chat template"""
    text_context: TextContext = "image"
    """`image`: text states come from the pass with the image in context; `none`: from the caption alone"""
    threshold: float = 0.0
    """τ: a feature counts as present on a side when its maximum there is above this"""
    threshold_units: str = "SAE activation"
    weights: str | None = None
    """Feature weights fitted before; None fits them on the input first"""
    licence: dict[str, str] = field(default_factory=dict)
    verified: str = ""
    """What was checked, and how"""
    cannot_score: str = ""
    """Why pairs cannot be scored with it, where that is so"""


def cards_folder() -> Path:
    """`models/` of the installed package, or of the repository in an editable install."""
    package = Path(mmfilter.__file__).parent
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"


def card_names() -> list[str]:
    """Names of all cards."""
    return sorted(path.stem for path in cards_folder().glob("*.yaml") if path.name != REGISTRY)


def load_card(name: str) -> Card:
    """Read one card; raises `ModelError` when there is none or it holds unknown fields."""
    import yaml  # here, since the command line's options know cards and --help reads none

    path = cards_folder() / f"{name}.yaml"
    if not path.is_file():
        raise ModelError(
            f"no card {name!r}; there is {', '.join(card_names())}. A local folder or hub id works with --layer and "
            "--sae"
        )
    values: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    unknown = set(values) - {item.name for item in fields(Card)}
    if unknown:
        raise ModelError(f"card {str(path)!r} has the unknown field {sorted(unknown)[0]!r}")
    for item in ("model", "sae", "weights"):
        if values.get(item) and (path.parent / values[item]).exists():
            values[item] = str(path.parent / values[item])
    values["sae_options"] = make_options(values.get("sae_options") or {})
    return Card(**{"name": name, **values})
