"""`mmfilter sae train`: options and a YAML file with the same names, live figures."""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from mmfilter.cli import options
from mmfilter.errors import SAEError

if TYPE_CHECKING:
    from mmfilter.core.training.statistics import StepStats
    from mmfilter.core.training.summary import TrainRunSettings, TrainSummary

KINDS: dict[str, str] = {
    "model": "text", "layer": "number", "prompt": "text", "text_context": "text", "caption": "text", "images": "text",
    "allow_pipe": "flag", "device": "text", "dtype": "text", "device_map": "text",
    "attn": "text", "compile": "flag", "trust_remote_code": "flag", "architecture": "text", "widths": "numbers", "k": "numbers", "groups": "fractions",
    "tokens": "number", "batch_size": "number", "lr": "fraction", "warm_up": "fraction", "decay": "fraction", "clip": "fraction", "aux_k": "number",
    "aux_coefficient": "fraction", "dead_tokens": "number", "l1_coefficient": "fraction", "l0_penalty": "text", "l0_coefficient": "fraction",
    "target_l0": "fraction", "bandwidth": "fraction", "sparsity_warm_up": "fraction", "threshold_decay": "fraction", "subtract_b_dec": "flag",
    "precision": "text", "capacity": "number", "image_fraction": "fraction", "sink_factor": "fraction", "cache": "text", "pairs": "number", "workers": "number",
    "checkpoint_every": "fraction", "weights": "flag", "tensorboard": "text", "seed": "number",
}  # fmt: skip
"""Name of an option and of a key of the YAML file -> what it takes"""
OPTIMISATION = (
    "architecture", "groups", "batch_size", "lr", "warm_up", "decay", "clip", "aux_k", "aux_coefficient", "dead_tokens", "l1_coefficient", "l0_penalty",
    "l0_coefficient", "target_l0", "bandwidth", "sparsity_warm_up", "threshold_decay", "subtract_b_dec", "seed",
)  # fmt: skip
MAY_BE_NONE = ("image_fraction", "sink_factor", "cache", "tensorboard")

Text, Number, Fraction, Flag = Optional[str], Optional[int], Optional[float], Optional[bool]


def train(
    shards: options.Shards,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write, or to go on with.")],
    config: Annotated[
        Optional[Path],
        typer.Option("--config", help="YAML file with any of the options below; what is given here goes first."),
    ] = None,
    model: Annotated[Text, typer.Option(help="Card name, local folder or hub id.  [default: tiny]")] = None,
    layer: Annotated[
        Number,
        typer.Option(
            help="Layer whose output is trained on, from 0; -1 for the shared space of CLIP and its kin (default: the card's)."
        ),
    ] = None,
    prompt: Annotated[
        Text, typer.Option(help="Prompt with {caption} in it (default: the card's, or the model's chat template).")
    ] = None,
    text_context: Annotated[
        Text, typer.Option(help="Text states with the 'image' in context, or 'none' (default: the card's).")
    ] = None,
    caption: Annotated[
        Text, typer.Option(help="Where captions are: txt, conversations, a JSON field, or auto.")
    ] = None,
    images: options.Images = None,
    allow_pipe: Annotated[Flag, options.ALLOW_PIPE] = None,
    architecture: Annotated[
        Text, typer.Option(help="batchtopk, topk, jumprelu or relu (L1, the recipe of SAE-V).  [default: batchtopk]")
    ] = None,
    widths: Annotated[
        Text,
        typer.Option(
            help="Features, or several numbers with commas to train several SAEs from one pass (default: 8 x the state's width)."
        ),
    ] = None,
    k: Annotated[
        Text, typer.Option(help="Active features a token, or several numbers with commas.  [default: 32]")
    ] = None,
    groups: Annotated[
        Text,
        typer.Option(
            help="Matryoshka prefixes with commas: counts of features, or fractions below 1; top-k kinds only."
        ),
    ] = None,
    tokens: Annotated[
        Number, typer.Option(help="Training tokens (default: ten passes over the shards, at most 100 million).")
    ] = None,
    batch_size: Annotated[Number, typer.Option(help="Tokens a step.  [default: 4096]")] = None,
    lr: Annotated[Fraction, typer.Option(help="Peak learning rate (default: by width).")] = None,
    warm_up: Annotated[
        Fraction, typer.Option(help="Share of the tokens over which the rate rises.  [default: 0.02]")
    ] = None,
    decay: Annotated[
        Fraction, typer.Option(help="Share of the tokens over which it falls at the end.  [default: 0.2]")
    ] = None,
    clip: Annotated[Fraction, typer.Option(help="Largest norm of the gradient.  [default: 1]")] = None,
    aux_k: Annotated[
        Number,
        typer.Option(help="Dead features that reconstruct what is left (AuxK) (default: half the state's width)."),
    ] = None,
    aux_coefficient: Annotated[Fraction, typer.Option(help="Weight of AuxK, 0 for none.  [default: 1/32]")] = None,
    dead_tokens: Annotated[
        Number,
        typer.Option(
            help="Tokens without firing that make a feature dead (default: a tenth of all, at most 10 million)."
        ),
    ] = None,
    l1_coefficient: Annotated[Fraction, typer.Option(help="relu: weight of the L1 term.  [default: 5]")] = None,
    l0_penalty: Annotated[Text, typer.Option(help="jumprelu: target or linear.  [default: target]")] = None,
    l0_coefficient: Annotated[Fraction, typer.Option(help="jumprelu: its weight.  [default: 1]")] = None,
    target_l0: Annotated[
        Fraction, typer.Option(help="jumprelu: active features a token to aim at (default: k).")
    ] = None,
    bandwidth: Annotated[Fraction, typer.Option(help="jumprelu: width of the step's kernel.  [default: 0.001]")] = None,
    sparsity_warm_up: Annotated[
        Fraction, typer.Option(help="Share of the tokens over which the sparsity term rises.  [default: 0.05]")
    ] = None,
    threshold_decay: Annotated[
        Fraction, typer.Option(help="batchtopk: decay of the running threshold.  [default: 0.99]")
    ] = None,
    subtract_b_dec: Annotated[
        Flag, typer.Option("--subtract-b-dec/--no-subtract-b-dec", help="Encode x - b_dec, or x.  [default: x - b_dec]")
    ] = None,
    precision: Annotated[
        Text, typer.Option(help="Of the large products: float32 or bfloat16; weights stay float32.  [default: float32]")
    ] = None,
    capacity: Annotated[Number, typer.Option(help="Tokens in the shuffle buffer.  [default: 131072]")] = None,
    image_fraction: Annotated[
        Text, typer.Option(help="Share of image tokens in a batch, or none: as they come.  [default: 0.5]")
    ] = None,
    sink_factor: Annotated[
        Text,
        typer.Option(
            help="Leave out states with a norm above so many times the median (attention sinks), or none.  [default: 10]"
        ),
    ] = None,
    cache: Annotated[
        Text, typer.Option(help="Folder for the states on disk: the model runs once, for later trainings too.")
    ] = None,
    device: Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = None,
    dtype: Annotated[Text, typer.Option(help="Of the model: float32, bfloat16, float16, or auto.")] = None,
    device_map: Annotated[
        Text, typer.Option(help="'auto' spreads a model that is larger than one GPU over all of them.")
    ] = None,
    attn: Annotated[Text, typer.Option(help="Attention implementation.  [default: sdpa]")] = None,
    compile_blocks: Annotated[Flag, typer.Option("--compile", help="Compile the model's blocks.")] = None,
    trust_remote_code: Annotated[
        Flag, typer.Option("--trust-remote-code", help="Run model code that the checkpoint brings along.")
    ] = None,
    pairs: Annotated[Number, typer.Option(help="Pairs that go through the model together.  [default: 32]")] = None,
    workers: Annotated[Number, typer.Option(help="Threads that decode and pre-process.  [default: 4]")] = None,
    checkpoint_every: Annotated[Fraction, typer.Option(help="Seconds between checkpoints.  [default: 600]")] = None,
    weights: Annotated[
        Flag, typer.Option("--weights/--no-weights", help="Fit cross-modal weights at the end.  [default: yes]")
    ] = None,
    tensorboard: Annotated[
        Text, typer.Option(help="Folder for TensorBoard (pip install 'mmfilter[tensorboard]').")
    ] = None,
    seed: Annotated[Number, typer.Option(help="Seed of everything.  [default: 0]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Train an SAE on image and text states of your pairs.

    Writes a folder in the SAELens 6 layout with statistics, cross-modal weights, a log and its curves. The
    same command goes on where a killed one stopped. Under torchrun every process takes its share.

    Example: mmfilter sae train 'examples/shards/*.tar' -o my-sae --tokens 100000 --widths 1024
    """
    given = {
        name: value for name, value in locals().items() if value is not None and name in (*KINDS, "compile_blocks")
    }
    if "compile_blocks" in given:
        given["compile"] = given.pop("compile_blocks")
    values = (read_config(config) if config else {}) | {name: parsed(name, value) for name, value in given.items()}
    settings = run_settings(output, values)
    from mmfilter.ops import train as operation

    with TrainingTerminal(values.get("tensorboard")) as progress:
        summary = operation.train(shards, settings, progress)
    show(summary, as_json)


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of settings; raises `SAEError` for a key that is no option, naming the nearest, or a value of the wrong kind."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise SAEError(f"--config {str(path)!r} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SAEError(f"--config {str(path)!r} is no YAML: {' '.join(str(error).split())[:160]}") from error
    if not isinstance(values, Mapping):
        raise SAEError(f"--config {str(path)!r} holds no settings; expected lines like 'k: 32'")
    for key in values:
        if key not in KINDS:
            near = difflib.get_close_matches(str(key), KINDS, 1, cutoff=0)[0]
            raise SAEError(f"--config {str(path)!r} has the unknown key {key!r}; the nearest is {near!r}")
    return {key: parsed(key, value) for key, value in values.items()}


def parsed(name: str, value: Any) -> Any:
    """A value of the kind that the option takes; raises `SAEError`."""
    kind = KINDS[name]
    if name in MAY_BE_NONE and (value is None or str(value).lower() == "none"):
        return None
    try:
        if kind == "numbers":
            return tuple(_whole(part) for part in _parts(value))
        if kind == "fractions":
            return tuple(_number(part) for part in _parts(value))
        if kind == "number":
            return _whole(value)
        if kind == "fraction":
            return float(_number(value))
        if kind == "flag" and not isinstance(value, bool):
            raise ValueError
    except (ValueError, TypeError) as error:
        wanted = {
            "numbers": "whole numbers with commas",
            "fractions": "numbers with commas",
            "number": "a whole number",
            "fraction": "a number",
            "flag": "true or false",
        }
        raise SAEError(f"--{name.replace('_', '-')} is {value!r}; expected {wanted[kind]}") from error
    return str(value) if kind == "text" else value


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else str(value).split(",")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _number(value: Any) -> int | float:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    return int(number) if number >= 1 and number == int(number) else number


def run_settings(output: Path, values: Mapping[str, Any]) -> TrainRunSettings:
    """Everything as the operation takes it."""
    from mmfilter.core.training.settings import TrainSettings
    from mmfilter.core.training.summary import TrainRunSettings

    ks = values.get("k", ())
    train = {name: values[name] for name in OPTIMISATION if name in values} | ({"k": ks[0]} if ks else {})
    if "precision" in values:
        train["dtype"] = values["precision"]
    run = {
        name: values[name]
        for name in (
            "tokens", "capacity", "image_fraction", "sink_factor", "pairs", "workers", "caption", "images", "allow_pipe", "checkpoint_every", "weights", "seed",
        )
        if name in values
    }  # fmt: skip
    cache = values.get("cache")
    device = options.device_settings(
        values.get("device", "auto"), values.get("dtype", "auto"), values.get("device_map"), values.get("attn", "sdpa"), values.get("compile", False),
        values.get("trust_remote_code", False),
    )  # fmt: skip
    return TrainRunSettings(
        card=options.model_card(values.get("model", "tiny"), values.get("layer"), values.get("prompt"), values.get("text_context")),
        output=output, train=TrainSettings.from_mapping(train), widths=values.get("widths", ()), ks=ks if len(ks) > 1 else (),
        cache=Path(cache) if cache else None, device=device, **run,
    )  # fmt: skip


class TrainingTerminal:
    """Live figures on stderr in a terminal, a line every tenth of the way elsewhere; TensorBoard where asked for."""

    def __init__(self, tensorboard: str | None) -> None:
        from mmfilter.cli.display import TerminalProgress

        self._bars, self._shown, self._last = TerminalProgress(), 0.0, 0
        self._board: Any = None
        if tensorboard:
            from mmfilter.core.training.tensorboard import Board

            self._board = Board(Path(tensorboard))

    def __enter__(self) -> TrainingTerminal:
        self._bars.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(*error)
        if self._board is not None:
            self._board.close()

    def start(self, phase: str, total_bytes: int | None) -> None:
        self._bars.start(phase, total_bytes)

    def advance(self, samples: int, nbytes: int) -> None:
        self._bars.advance(samples, nbytes)

    def note(self, text: str) -> None:
        self._bars.note(text)

    def step(self, name: str, stats: StepStats, total_tokens: int, tokens_per_second: float) -> None:
        """One SAE's step."""
        from mmfilter.core.training.summary import flat

        if self._board is not None:
            self._board.add(name, flat(stats))
        tenth = 10 * stats.tokens // total_tokens
        live = sys.stderr.isatty()
        if live and time.monotonic() - self._shown < 0.2 and stats.tokens < total_tokens:
            return
        self._shown = time.monotonic()
        left = max(0, total_tokens - stats.tokens) / tokens_per_second if tokens_per_second else 0
        text = (
            f"{name + ': ' if name else ''}{stats.tokens / total_tokens:4.0%}  loss {stats.loss:.4g}  FVU {stats.fvu:.3f}  L0 {stats.l0:.1f}  "
            f"dead {stats.dead:.1%}  {tokens_per_second:,.0f} tokens/s  {left / 60:.0f} min left"
        )
        if live:
            self._bars.describe(text)
        elif tenth > self._last:
            self._bars.note(text)
        self._last = max(self._last, tenth)


def show(summary: TrainSummary, as_json: bool) -> None:
    """Where the SAEs are, on stdout; what was left out, on stderr."""
    from mmfilter.cli import display
    from mmfilter.core.training.summary import flat

    for error in summary.failures:
        display.note(f"{error}; the pairs before that were trained on")
    for reason, count in summary.left_out.items():
        display.note(f"{count:,} samples left out: {reason}")
    if any(summary.sinks):
        display.note(f"{summary.sinks[0]:,} image and {summary.sinks[1]:,} text tokens left out as attention sinks")
    if as_json:
        saes = [{"folder": str(sae.folder), "last_step": flat(sae.last) if sae.last else None} for sae in summary.saes]
        print(json.dumps({"saes": saes, "tokens": summary.tokens, "seconds": summary.seconds}, indent=2))
        return
    for sae in summary.saes:
        if sae.last is not None:
            figures = f"FVU {sae.last.fvu:.3f}, L0 {sae.last.l0:.1f}, {sae.last.dead:.1%} dead"
            display.note(
                f"{sae.folder}: {sae.settings.n_features:,} features, {figures} after {sae.last.tokens:,} tokens; curves in {sae.folder}/training.html"
            )
        print(sae.folder)
