"""The commands: parse, call one operation, print. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmfilter import __version__
from mmfilter.cli import options
from mmfilter.cli.check_command import check
from mmfilter.cli.dedup_command import dedup
from mmfilter.cli.init_command import init
from mmfilter.cli.models_commands import models_app
from mmfilter.cli.options import DEFAULT_RUN, card_for, destination, one_of, share
from mmfilter.cli.run_command import run_recipe
from mmfilter.cli.sae_commands import sae_app
from mmfilter.cli.search_command import search
from mmfilter.errors import MMFilterError

app = typer.Typer(
    help="Curate image-text data with the features inside a multimodal model.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(models_app, name="models")
app.add_typer(sae_app, name="sae")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mmfilter {__version__}")
        raise typer.Exit()


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    pass


@app.command()
def score(
    shards: options.Shards,
    run: Annotated[Path, typer.Option("--run", help="Run directory to write, or to go on with.")] = DEFAULT_RUN,
    model: options.ModelName = "tiny",
    layer: options.Layer = None,
    sae: options.SAESource = None,
    sae_option: options.SAEOption = None,
    prompt: options.Prompt = None,
    text_context: options.TextContext = None,
    threshold: options.Threshold = None,
    caption: options.Caption = "auto",
    images: options.Images = None,
    allow_pipe: options.AllowPipe = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    attn: options.Attention = "sdpa",
    compile_blocks: options.Compile = False,
    trust_remote_code: options.TrustRemoteCode = False,
    batch_size: options.BatchSize = 32,
    workers: options.Workers = 4,
    limit: Annotated[Optional[int], typer.Option(help="Score only the first so many samples.")] = None,
    max_bad: Annotated[str, typer.Option(help="Share of samples without a score that still exits 0.")] = "10%",
    seed: Annotated[int, typer.Option(help="Seed of the random score.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Score image-text pairs inside a multimodal model.

    Writes a run directory with a row for every sample, bad ones too. Run it again to go on: finished
    shards are skipped.

    Example: mmfilter score 'examples/shards/*.tar' --run runs/icons
    """
    from mmfilter.cli import display
    from mmfilter.core.data import artifacts
    from mmfilter.ops import score as operation

    allowed = share(max_bad)
    one_of("--text-context", text_context, ("image", "none"))
    settings = operation.ScoreSettings(
        card=card_for(model, layer, sae, prompt, text_context, threshold, sae_option or ()),
        run=run,
        device=options.device_settings(device, dtype, device_map, attn, compile_blocks, trust_remote_code),
        batch_size=batch_size, workers=workers, limit=limit, caption=caption, images=images, allow_pipe=allow_pipe, seed=seed,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        summary = operation.score(shards, settings, progress)
    tables = artifacts.RunDirectory(run).score_tables() if summary.n_shards or summary.n_skipped else []
    columns = {name: artifacts.read_column(tables, name) for name in artifacts.SCORES}
    if as_json:
        print(json.dumps(display.score_report(summary, columns), indent=2))
    else:
        display.show_score(summary, columns, "similarity")
    if summary.failures:
        said = f"{len(summary.failures)} of {len(summary.failures) + summary.n_shards + summary.n_skipped} shards could not be read to their end"
        raise MMFilterError(f"{said}, first: {summary.failures[0]}. The others are finished; repair and run again")
    if not summary.n_samples:
        raise MMFilterError("the shards hold no samples: nothing to score")
    if summary.fraction_bad > allowed:
        raise MMFilterError(
            f"{summary.fraction_bad:.1%} of the samples have no score, more than --max-bad {max_bad} allows; "
            f"the column 'reason' of {run}/scores/*.parquet says why for each"
        )


@app.command()
def select(
    run: Annotated[Path, typer.Argument(help="Run directory that score wrote.", metavar="RUN")] = DEFAULT_RUN,
    top: Annotated[Optional[str], typer.Option(help="Keep the best: a share (20%) or a number (5000).")] = None,
    min_score: Annotated[Optional[float], typer.Option("--min", help="Keep scores of at least this.")] = None,
    by: Annotated[str, typer.Option(help="Score column to rank by, or a formula: '0.7 * similarity + 0.3 * rank(saev)'.")] = "similarity",
    where: Annotated[Optional[str], typer.Option(help="SQL condition on the score table: who is a candidate.")] = None,
    metadata: Annotated[
        Optional[list[str]],
        typer.Option(help="Parquet, CSV or JSONL with more columns for --where, --by, --per and --repeat; repeatable.", metavar="FILES"),
    ] = None,
    dedup: Annotated[Optional[float], typer.Option(help="Of candidates whose codes are at least this close keep the best only.", metavar="COSINE")] = None,
    dedup_on: Annotated[str, typer.Option(help="Which sides have to be that close: both, image, or text.")] = "both",
    per: Annotated[Optional[str], typer.Option(help="Apply --top within each value of this column or formula.", metavar="EXPR")] = None,
    diverse: Annotated[bool, typer.Option("--diverse", help="Keep --top pairs that together cover all features, not just the best.")] = False,
    match: Annotated[Optional[Path], typer.Option(help="Keep --top pairs that are together like the data of this run.", metavar="TARGET_RUN")] = None,
    repeat: Annotated[Optional[str], typer.Option(help="Write a kept pair as often as this column or formula says.", metavar="EXPR")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the funnel and write nothing.")] = False,
    shuffle: Annotated[Optional[int], typer.Option(help="Shuffle the output with this seed (default: source order).", metavar="SEED")] = None,
    output: Annotated[
        Optional[str], typer.Option("-o", "--output", help="Directory to write (a file for tar, keys and *.npy), or - for a stream on stdout.")
    ] = None,
    output_format: Annotated[
        Optional[str],
        typer.Option("--format", help="shards, tar, keys, datacomp, parquet, llava-json, or hf (default: shards for a directory, tar for a stream)."),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples in an output shard, parquet file or folder of images.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print the funnel as JSON on stderr.")] = False,
) -> None:
    """Copy the best pairs of a run, byte for byte.

    Needs no model: it reads the score tables and copies byte ranges.

    Example: mmfilter select runs/icons --top 20% -o best/
    """
    from mmfilter.cli import display
    from mmfilter.cli.app import silence_stdout
    from mmfilter.ops import select as operation

    one_of("--dedup-on", dedup_on, ("both", "image", "text"))
    form, path = destination(output, output_format, sys.stdout.isatty() and not dry_run)
    settings = operation.SelectSettings(
        top=top, min=min_score, by=by, where=where, metadata=tuple(metadata or ()), dedup=dedup, dedup_on=dedup_on, per=per, diverse=diverse,
        match=match, repeat=repeat, dry_run=dry_run, shuffle=shuffle, format=form, output=path, shard_size=shard_size,
    )  # fmt: skip
    with display.TerminalProgress() as progress:
        selection = operation.select(run, settings, progress=progress)
    if selection.reader_closed:
        silence_stdout()
    for warning in selection.warnings:
        display.note(warning)
    if as_json:
        print(json.dumps(display.selection_report(selection), indent=2), file=sys.stderr)
    else:
        display.show_funnel(selection.funnel)


app.command()(check)
app.command()(dedup)
app.command()(search)
app.command("run")(run_recipe)
app.command()(init)
