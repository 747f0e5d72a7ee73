"""How an SAE is trained: every choice with its default, its unit and, where one exists, its source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, get_args

from mmfilter.core.typed import combined, nearest, setting
from mmfilter.errors import SAEError

Architecture = Literal["batchtopk", "topk", "jumprelu", "relu"]
Precision = Literal["float32", "bfloat16"]
Penalty = Literal["target", "linear"]

CHOICES = {"architecture": get_args(Architecture), "dtype": get_args(Precision), "l0_penalty": get_args(Penalty)}
COUNTS = ("n_features", "k", "tokens", "batch_size", "aux_k", "dead_tokens")
POSITIVE = ("lr", "clip", "bandwidth", "target_l0")
NOT_NEGATIVE = ("aux_coefficient", "l1_coefficient", "l0_coefficient")
FRACTIONS = ("warm_up", "decay", "sparsity_warm_up", "threshold_decay")


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides the weights besides the states themselves.

    States are trained on after multiplication with the trainer's `scale`, so that the mean square of a
    centred state is d_model; "scaled units" below are those. A `None` is filled in by `resolved`.
    """

    GROUP: ClassVar[str] = "Optimisation"

    architecture: Architecture = setting("batchtopk", group="Architecture")
    """Kind of SAE.

    `batchtopk`: the k·B strongest activations of a batch of B tokens (Bussmann et al. 2024, arXiv 2412.06410).
    `topk`: the k strongest of each token (Gao et al. 2024, arXiv 2406.04093).
    `jumprelu`: a learned threshold a feature (Rajamanoharan et al. 2024, arXiv 2407.14435).
    `relu`: L1 weighted with decoder norms, which stay free; the recipe of SAE-V (arXiv 2502.17514)."""
    n_features: int | None = setting(None, option=False)
    """None: 8 · d_model"""
    k: int = setting(32, option=False)
    """Active features a token, in the mean for `batchtopk`; of `jumprelu` the start, and the aim unless `target_l0` is
    given"""
    groups: tuple[int | float, ...] = setting((), metavar="N,N", group="Architecture")
    """Matryoshka prefixes with commas: counts of features, or fractions below 1; top-k kinds only.

    Each prefix must reconstruct alone; the whole dictionary is always the last (Bussmann et al. 2025, arXiv
    2503.17547)."""
    tokens: int = setting(100_000_000, option=False)
    """Tokens of the whole training; the schedules are stretched over them"""
    batch_size: int = 4096
    """Tokens in a step, over all processes"""
    lr: float | None = None
    """Peak learning rate of Adam (default: by width).

    None: 2e-4 / √(n_features / 2¹⁴), the scaling of Gao et al."""
    warm_up: float = 0.02
    """Share of the tokens over which the learning rate rises from 0"""
    decay: float = 0.2
    """Share of the tokens, the last ones, over which it falls to 0"""
    clip: float = 1.0
    """Largest norm of the gradient of all weights together"""
    aux_k: int | None = None
    """Dead features that reconstruct what the others leave (AuxK) (default: half the states' width).

    A token; top-k kinds only (Gao et al., A.2)."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK in the loss; 0 turns it off"""
    dead_tokens: int | None = None
    """Tokens without firing that make a feature dead (default: a tenth of all, at most 10 million)"""
    l1_coefficient: float = setting(5.0, group="Sparsity")
    """relu: weight of the L1 term.

    Against the squared error summed over d_model, scaled units."""
    l0_penalty: Penalty = setting("target", group="Sparsity")
    """jumprelu: penalty on L0.

    `target` is c · (L0 / target_l0 − 1)², `linear` is c · L0 against the squared error summed over d_model."""
    l0_coefficient: float = setting(1.0, group="Sparsity")
    """jumprelu: weight c of the penalty"""
    target_l0: float | None = setting(None, group="Sparsity")
    """jumprelu: active features a token to aim at (default: k)"""
    bandwidth: float = setting(0.001, group="Sparsity")
    """jumprelu: width of the kernel that stands in for the derivative of a step.

    In root mean square norms of a centred state."""
    sparsity_warm_up: float = setting(0.05, group="Sparsity")
    """Share of the tokens over which the L1 or L0 coefficient rises from 0"""
    threshold_decay: float = setting(0.99, group="Sparsity")
    """batchtopk: decay a step of the running threshold.

    The mean of the smallest activation kept, which becomes the threshold of inference."""
    subtract_b_dec: bool = setting(default=True, flag="--subtract-b-dec/--no-subtract-b-dec", group="Architecture")
    """Encode x - b_dec, or x as SAE-V does"""
    seed: int = setting(0, option=False)
    """Seed of the first weights"""
    dtype: Precision = setting("float32", flag="--precision")
    """Number format of the large matrix products; weights stay float32.

    In bfloat16 the top-k kinds only *choose* features by it: activations and gradients of the chosen ones are
    float32."""

    def __post_init__(self) -> None:
        values = vars(self)
        for name, allowed in CHOICES.items():
            _check(name, values[name], f"one of {', '.join(allowed)}", fine=values[name] in allowed)
        for name in COUNTS:
            _check(name, values[name], "a whole number from 1", fine=_is_count(values[name]))
        for name in POSITIVE:
            value = values[name]
            _check(name, value, "a number above 0", fine=value is None or (_is_number(value) and value > 0))
        for name in NOT_NEGATIVE:
            _check(name, values[name], "a number from 0", fine=_is_number(values[name]) and values[name] >= 0)
        for name in FRACTIONS:
            value = values[name]
            _check(name, value, "a fraction from 0 to below 1", fine=_is_number(value) and 0 <= value < 1)
        _check("seed", self.seed, "a whole number", fine=isinstance(self.seed, int) and not isinstance(self.seed, bool))
        _check("subtract_b_dec", self.subtract_b_dec, "true or false", fine=isinstance(self.subtract_b_dec, bool))
        self._check_together()

    def _check_together(self) -> None:
        if self.warm_up + self.decay > 1:
            raise SAEError(
                f"training has warm_up {self.warm_up!r} and decay {self.decay!r}; together they may be at most 1"
            )
        if self.n_features is not None and self.k > self.n_features:
            raise SAEError(f"training has k={self.k} and n_features={self.n_features}; k may be at most n_features")
        if not all(_is_number(size) and size > 0 for size in self.groups):
            raise SAEError(f"training has groups {self.groups!r}; expected counts of features, or fractions below 1")
        if self.groups and not self.sparse:
            raise SAEError(
                f"training has groups with architecture {self.architecture!r}; Matryoshka prefixes go with batchtopk "
                "and topk"
            )

    @property
    def sparse(self) -> bool:
        """Whether the number of active features is set by k, so that a step needs no dense gradients."""
        return self.architecture in ("batchtopk", "topk")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Settings from JSON or a recipe; raises `SAEError` naming the nearest known key for an unknown one."""
        known = [item.name for item in fields(cls)]
        for key in values:
            if key not in known:
                raise SAEError(f"training has no setting {key!r}; the nearest is {nearest(str(key), known)!r}")
        options = dict(values)
        if isinstance(options.get("groups"), list):
            options["groups"] = tuple(options["groups"])
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """What `from_mapping` takes, ready for JSON."""
        return asdict(self) | {"groups": list(self.groups)}

    def resolved(self, d_model: int) -> ResolvedTrainSettings:
        """The same with every None filled in and `groups` as rising counts that end with `n_features`."""
        n = self.n_features or 8 * d_model
        counts = {round(size * n) if size < 1 else size for size in self.groups} | {n}
        sizes = sorted(int(size) for size in counts)
        if sizes[0] < 1 or sizes[-1] > n:
            raise SAEError(f"training has groups {self.groups!r}; expected prefixes of {n} features")
        return combined(
            ResolvedTrainSettings,
            self,
            n_features=n,
            groups=tuple(sizes) if self.sparse else (),
            lr=self.lr or 2e-4 / math.sqrt(n / 2**14),
            aux_k=min(self.aux_k or max(1, d_model // 2), n),
            dead_tokens=self.dead_tokens or min(10_000_000, max(1, self.tokens // 10)),
            target_l0=self.target_l0 or float(self.k),
        )


@dataclass(frozen=True)
class ResolvedTrainSettings(TrainSettings):
    """Settings for states of a known width, as `TrainSettings.resolved` makes them: nothing is left to fill in."""

    n_features: int = field(kw_only=True)
    groups: tuple[int, ...] = field(kw_only=True)
    """Rising counts of features that end with `n_features`; () for kinds without prefixes"""
    lr: float = field(kw_only=True)
    aux_k: int = field(kw_only=True)
    dead_tokens: int = field(kw_only=True)
    target_l0: float = field(kw_only=True)

    def rate(self, tokens: int) -> float:
        """Learning rate for the step that begins after `tokens` tokens."""
        done = (tokens + self.batch_size) / self.tokens
        rise = min(1.0, done / self.warm_up) if self.warm_up else 1.0
        left = max(0.0, 1 - tokens / self.tokens)
        return self.lr * rise * (min(1.0, left / self.decay) if self.decay else 1.0)

    def sparsity(self, tokens: int) -> float:
        """Share of the L1 or L0 coefficient that counts in that step."""
        if not self.sparsity_warm_up:
            return 1.0
        return min(1.0, (tokens + self.batch_size) / (self.sparsity_warm_up * self.tokens))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _check(name: str, value: Any, expected: str, *, fine: bool) -> None:
    if not fine:
        raise SAEError(f"training has {name} {value!r}; expected {expected}")
