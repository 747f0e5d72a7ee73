"""`score`: parse, score, print."""

from __future__ import annotations

import json

from mmfilter.cli.options import AsJson, Shards
from mmfilter.errors import MMFilterError
from mmfilter.ops.score_settings import ScoreSettings


def score(shards: Shards, settings: ScoreSettings, as_json: AsJson = False) -> None:
    """Score image-text pairs inside a multimodal model.

    Writes a run directory with a row for every sample, bad ones too. Run it again to continue: finished
    shards are skipped.

    Example: mmfilter score 'examples/shards/*.tar' --run runs/icons
    """
    from mmfilter.cli import display
    from mmfilter.core.run.directory import RunDirectory
    from mmfilter.core.run.tables import read_column
    from mmfilter.core.scores.registry import SCORES
    from mmfilter.ops import score as operation

    with display.TerminalProgress() as progress:
        summary = operation.score(shards, settings, progress)
    tables = RunDirectory(summary.run).score_tables() if summary.n_shards or summary.n_skipped else []
    columns = {name: read_column(tables, name) for name in SCORES}
    if as_json:
        print(json.dumps(display.score_report(summary, columns), indent=2))
    else:
        display.show_score(summary, columns, "similarity")
    if problem := summary.failed or settings.problem(summary.n_samples, summary.n_scored):
        raise MMFilterError(problem)
