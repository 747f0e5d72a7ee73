"""Arguments that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Shards = Annotated[
    list[str],
    typer.Argument(
        help="WebDataset tars, parquet files with images, LLaVA JSON, folders of images: paths, globs, brace patterns, "
        "URLs, or - for a tar on stdin.",
        metavar="SHARDS",
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory that score wrote.", metavar="RUN")]
SAEName = Annotated[
    str,
    typer.Argument(
        help="Folder or file, hf:OWNER/REPO[@REVISION]/FOLDER, saelens:RELEASE/ID, or a card's name.", metavar="SAE"
    ),
]
SAEOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sae-option", help="What the SAE's files leave open, as KEY=VALUE; repeatable.", metavar="KEY=VALUE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
