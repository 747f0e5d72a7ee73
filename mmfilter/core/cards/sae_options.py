"""What the user says of an SAE where its files leave a doubt: `--sae-option KEY=VALUE`, `sae_options:` of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from mmfilter.core.typed import close, expected, parsed, types_of
from mmfilter.errors import SAEError


@dataclass(frozen=True)
class SAEOptions:
    """Statements that settle what a file does not say; None leaves it to the file."""

    layout: str | None = None
    """Name of the layout, where the files fit none, or fit the wrong one"""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] | None = None
    """Activation function"""
    k: int | None = None
    """Features a token keeps (topk)"""
    threshold: float | None = None
    """One threshold for all features (jumprelu, batchtopk), in the units that the file's activations have"""
    scale: float | None = None
    """Factor on the activations that training used, √d over their mean norm; 1: it is folded in already"""
    normalisation: Literal["none", "layer_norm", "constant_norm_rescale"] | None = None
    """What is done to a state before it is encoded"""
    orientation: Literal["features_last", "features_first"] | None = None
    """Of W_enc: `features_last` is (d_model, features)"""
    subtract_b_dec: bool | None = None
    """Whether the decoder's bias is subtracted before encoding"""
    unit_decoder: bool | None = None
    """Whether decoder rows are scaled to norm 1 (and activations by their norm)"""
    dictionary: Literal["l2", "as_is"] | None = None
    """Whether overcomplete brings the dictionary's rows to norm 1 when it uses them (`l2`, its default)"""
    layer: int | None = None
    """Which of the layers that a folder holds"""
    allow_pickle: bool = False
    """Open a pickle that holds more than tensors; for `mmfilter sae convert` only"""

    def __post_init__(self) -> None:
        for name in ("k", "scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SAEError(f"SAE option {name}={value} must be above 0")

    def stated(self) -> dict[str, Any]:
        """The options that say something."""
        return {
            item.name: getattr(self, item.name) for item in fields(self) if getattr(self, item.name) != item.default
        }


NO_OPTIONS = SAEOptions()


def parse_options(statements: Sequence[str]) -> SAEOptions:
    """Options from `KEY=VALUE` statements; raises `SAEError` for an unknown key or a value of the wrong kind."""
    return make_options(statements_to_values(statements))


def statements_to_values(statements: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` statements as a mapping; raises `SAEError` for one that is none."""
    values = {}
    for statement in statements:
        key, equals, value = statement.partition("=")
        if not equals:
            raise SAEError(f"SAE option {statement!r} is not KEY=VALUE; the keys are {', '.join(types_of(SAEOptions))}")
        values[key.strip()] = value.strip()
    return values


def make_options(values: Mapping[str, Any]) -> SAEOptions:
    """Options from a mapping whose values are of the right kind, or text that says them; raises `SAEError`."""
    kinds = types_of(SAEOptions)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in kinds:
            hint = f"did you mean {near!r}? " if (near := close(key, kinds)) else ""
            raise SAEError(f"no SAE option {key!r}; {hint}There is {', '.join(kinds)}")
        try:
            found[key] = parsed(kinds[key], value)
        except ValueError as error:
            raise SAEError(f"SAE option {key}={str(value)!r}: expected {expected(kinds[key])}") from error
    return SAEOptions(**found)
