"""Follow a recipe: check, score, dedup, one selection an output. What is finished is left alone.

Operations meet on disk; this is the place that calls them one after another. What needs torch is imported
where a step turns out to be needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmfilter.core.codes.faiss_library import check_installed
from mmfilter.core.files import read_json, write_json
from mmfilter.core.input.shards import open_sources
from mmfilter.core.output.destination import check_output
from mmfilter.core.progress import Progress
from mmfilter.core.run.directory import RunDirectory, check_place
from mmfilter.core.run.tables import read_table_metadata
from mmfilter.core.typed import combined
from mmfilter.errors import RecipeError
from mmfilter.ops import dedup as dedup_operation
from mmfilter.ops import select as select_operation
from mmfilter.ops.check_settings import CheckSettings
from mmfilter.ops.score_settings import ScoreSettings
from mmfilter.recipes import record
from mmfilter.recipes.schema import Check, Dedup, Output, Recipe

State = Literal["done", "skipped", "planned"]


@dataclass(frozen=True)
class Step:
    """What became of a step."""

    name: str
    """check, score, dedup, select"""
    state: State
    """`skipped`: it was finished before; `planned`: it would be done"""
    text: str
    """What it did, in a line"""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as JSON values"""
    funnel: tuple[tuple[str, int], ...] = ()
    """Of a selection, what was left after each of its steps"""
    warnings: tuple[str, ...] = ()


Told = Callable[[Step], None]


def follow(recipe: Recipe, progress: Progress, told: Told, *, dry_run: bool = False) -> list[Step]:
    """Do what is not done yet, telling of each step as it ends; with `dry_run` only say what would be done.

    Mistakes that can be seen in the recipe, and outputs in the way, are told before the pass over the
    model. Raises `RecipeError`, and whatever the operations raise.
    """
    return _Follower(recipe.resolved(), progress, told, dry_run=dry_run).steps()


class _Follower:
    def __init__(self, recipe: Recipe, progress: Progress, told: Told, *, dry_run: bool) -> None:
        self._recipe, self._progress, self._told, self._dry_run = recipe, progress, told, dry_run
        self._run = RunDirectory(Path(recipe.run.run))
        self._sources = open_sources(recipe.inputs.shards, recipe.inputs.inputs)
        self._scored = False
        """Whether the scores are as the recipe wants them"""

    def steps(self) -> list[Step]:
        recipe = self._recipe
        request = record.score_request(recipe)
        self._look_ahead()
        self._scored = record.stored(self._run, "score") == request and record.all_scored(
            self._run, self._sources, recipe.run.limit
        )
        todo: list[Callable[[], Step]] = []
        if recipe.check is not None:
            todo.append(partial(self._check, recipe.check, request))
        todo.append(partial(self._score, request))
        if recipe.dedup is not None:
            todo.append(partial(self._dedup, recipe.dedup))
        todo += [partial(self._select, output) for output in recipe.outputs]
        done = []
        for do in todo:
            done.append(do())
            self._told(done[-1])
        return done

    def _look_ahead(self) -> None:
        """What would only come out after hours."""
        check_place(self._run, self._sources)
        if self._run.manifest.exists():
            named = {source.path for source in self._sources}
            known = [item["shard"] for item in read_json(self._run.manifest)["inputs"]]
            others = [shard for shard in known if shard not in named]
            if others:
                raise RecipeError(
                    f"run {str(self._run.path)!r} also holds {_shards(len(others))} that inputs.shards does not name "
                    f"(first: {others[0]!r}), and a selection "
                    "would take of that too; name another run.directory, or add it to inputs.shards"
                )
        if self._recipe.dedup is not None:
            self._recipe.dedup.settings()
        if self._recipe.outputs:
            select_operation.check_request(self._recipe.selection(self._recipe.outputs[0]))
        for output in self._recipe.outputs:
            self._check_output(output)

    def _check_output(self, output: Output) -> bool:
        """Whether the output is there, made with this recipe; raises `RecipeError` when it is another one's."""
        folder = self._recipe.selection(output).to_folder
        path = Path(output.path)
        if not path.exists() or (folder and path.is_dir() and not any(path.iterdir())):
            check_output(path, self._run.path, self._sources, folder=folder)
            return False
        made = record.recipe_of(record.manifest_of(output, folder=folder))
        if made is None:
            raise RecipeError(
                f"output {output.path!r} is there already and no recipe made it; name a new path, or delete it first"
            )
        if made["digest"] != record.output_digest(self._recipe, output):
            raise RecipeError(
                f"output {output.path!r} was made with another recipe ({_difference(made['recipe'], self._recipe)}); "
                "name a new path, or delete it"
            )
        if self._scored and made["scores"] != record.scores_digest(self._recipe, self._run):
            more = ", or select.metadata" if self._recipe.select and self._recipe.select.metadata else ""
            raise RecipeError(
                f"output {output.path!r} was made from other scores than run {str(self._run.path)!r}{more} holds now; "
                "name a new path, or delete it"
            )
        return True

    # --- the steps ---------------------------------------------------------------------------

    def _check(self, wanted: Check, request: dict[str, Any]) -> Step:
        recipe = self._recipe
        asked = {"check": asdict(wanted), "shards": [source.path for source in self._sources], "score": request}
        path = self._run.path / "check.json"
        found = record.stored(self._run, "check")
        if found == asked and path.exists():
            return Step("check", "skipped", "finished before: " + read_json(path)["verdict"], read_json(path))
        if self._dry_run:
            return Step("check", "planned", f"compare true with shuffled pairs, {wanted.sample:,} of them")
        from mmfilter.ops import check as operation

        settings = combined(CheckSettings, recipe.model, recipe.inputs, recipe.run, wanted)
        report = operation.check(recipe.inputs.shards, settings, self._progress)
        facts = {
            "verdict": report.verdict,
            "recommended": report.recommended,
            "pairs": report.n_pairs,
            "auc": {name: evidence.auc for name, evidence in report.scores.items()},
        }
        write_json(path, facts)
        record.store(self._run, "check", asked)
        return Step("check", "done", report.verdict, facts, warnings=tuple(report.notes))

    def _score(self, request: dict[str, Any]) -> Step:
        if self._scored:
            return self._counted("skipped", "finished before: ")
        if self._dry_run:
            return Step(
                "score",
                "planned",
                f"score {_shards(len(self._sources))} with {self._recipe.model.model!r} into {self._run.path}; "
                "finished ones are skipped",
            )
        if self._recipe.dedup is not None or (
            self._recipe.select is not None and self._recipe.select.dedup is not False
        ):
            check_installed()  # rather now than after the pass
        from mmfilter.ops import score as operation

        settings = combined(ScoreSettings, self._recipe.model, self._recipe.inputs, self._recipe.run)
        summary = operation.score(self._recipe.inputs.shards, settings, self._progress)
        if summary.failed:
            raise RecipeError(summary.failed)
        record.store(self._run, "score", request)
        self._scored = True
        return self._counted("done", "")

    def _counted(self, state: State, before: str) -> Step:
        """What has scores; raises `RecipeError` where that is too little."""
        tables = [read_table_metadata(path) for path in self._run.score_tables()]
        rows, ok = (sum(table[name] for table in tables) for name in ("rows", "ok"))
        if problem := self._recipe.run.problem(rows, ok, name="run.max_bad"):
            raise RecipeError(problem)
        return Step(
            "score",
            state,
            f"{before}{ok:,} of {rows:,} samples have scores -> {self._run.path}",
            {"samples": rows, "scored": ok},
        )

    def _dedup(self, wanted: Dedup) -> Step:
        settings = wanted.settings()
        about = f"at {wanted.threshold} on {wanted.on}"
        found = record.stored(self._run, "dedup") if self._scored else None
        asked = {"settings": settings.stored(), "scores": record.tables_digest(self._run)} if self._scored else None
        if found is not None and found["asked"] == asked and found["file"] == record.stamp_of(self._run.dedup):
            return Step(
                "dedup", "skipped", f"finished before: {found['kept']:,} are left {about}", {"kept": found["kept"]}
            )
        if self._dry_run:
            return Step("dedup", "planned", f"find duplicates {about}")
        summary = dedup_operation.dedup(self._run.path, settings, self._progress)
        record.store(
            self._run, "dedup", {"asked": asked, "file": record.stamp_of(self._run.dedup), "kept": summary.kept}
        )
        facts = {"kept": summary.kept, "exact_duplicates": summary.exact, "near_duplicates": summary.near}
        text = (
            f"{summary.kept:,} of {summary.scored:,} are left {about}: {summary.exact:,} exact and {summary.near:,} "
            "near-duplicates"
        )
        return Step("dedup", "done", text, facts)

    def _select(self, output: Output) -> Step:
        facts = {"output": output.path, "format": output.format}
        if self._check_output(output):
            return Step("select", "skipped", f"finished before: {output.path} ({output.format})", facts)
        settings = self._recipe.selection(output, dry_run=self._dry_run)
        if self._dry_run:
            return self._planned(settings, facts)
        about = record.about_output(self._recipe, output, self._run)
        if settings.to_folder:
            selection = select_operation.select(self._run.path, settings, progress=self._progress, recipe=about)
        else:
            selection = self._select_file(settings, record.manifest_of(output, folder=False), about)
        text = (
            f"{selection.written:,} samples, {selection.fraction_kept:.1%} of the candidates -> {output.path} "
            f"({output.format})"
        )
        return Step(
            "select", "done", text, facts | {"written": selection.written}, tuple(selection.funnel), selection.warnings
        )

    def _planned(self, settings: select_operation.SelectSettings, facts: dict[str, Any]) -> Step:
        """What would be written; how much, where the scores are there already."""
        place = f"{settings.output} ({settings.format})"
        if not self._scored:
            return Step("select", "planned", f"write {place}", facts)
        found = select_operation.select(self._run.path, settings, progress=self._progress)
        return Step(
            "select",
            "planned",
            f"write {found.written:,} samples, {found.fraction_kept:.1%} of the candidates -> {place}",
            facts,
            tuple(found.funnel),
            found.warnings,
        )

    def _select_file(
        self, settings: select_operation.SelectSettings, manifest: Path, about: dict[str, Any]
    ) -> select_operation.Selection:
        """Write a file, and before it the manifest beside it, so that a file under its name always has one."""
        write_json(manifest, {"kind": "selection", "run": str(self._run.path), "recipe": about})
        try:
            return select_operation.select(self._run.path, settings, progress=self._progress)
        except BaseException:
            with suppress(FileNotFoundError):
                manifest.unlink()
            raise


def _shards(n: int) -> str:
    return f"{n:,} {'shard' if n == 1 else 'shards'}"


def _difference(made: dict[str, Any], recipe: Recipe) -> str:
    """The first keys that differ, with what they were."""
    old, new = _flat(made), _flat(recipe.values())
    decides = [
        key
        for key in new | old
        if key.startswith(("inputs.", "model.", "select.", "run.limit", "run.seed", "run.dtype"))
    ]
    differing = [
        f"{key} was {old.get(key)!r}, is now {new.get(key)!r}" for key in decides if old.get(key) != new.get(key)
    ]
    return "; ".join(differing[:3]) or "its format or shard_size differs"


def _flat(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return found
