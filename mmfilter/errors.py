"""What can go wrong, as one tree.

    MMFilterError            explained to the user in one line, exit 1
    ├── ShardError           a shard is missing, truncated, damaged or no tar
    ├── RunError             a run directory is missing, incomplete or made with other settings
    ├── SelectionError       a selection names a column, condition or output that cannot be
    ├── RecipeError          a recipe cannot be read, has an unknown key, or belongs to another output
    ├── ModelError           a model, card or processor cannot be loaded or used
    ├── SAEError             an SAE cannot be loaded or trained, or does not fit the model
    └── MissingExtra         an optional package is not installed; names the line to type

A message names the thing, what was expected, and the next step. A *sample* that cannot be read is
never an exception: it becomes a row of the score table with a reason.
"""


class MMFilterError(Exception):
    """Base of every error that the user can act on."""


class ShardError(MMFilterError):
    """A shard cannot be read to its end; `problem` is the message without its name, `offset` the byte where reading
    stopped."""

    def __init__(self, shard: str, problem: str, *, offset: int | None = None) -> None:
        self.shard = shard
        self.offset = offset
        self.problem = problem if offset is None else f"{problem} at byte {offset:,}"
        super().__init__(f"shard {shard!r} {self.problem}")


class RunError(MMFilterError):
    """A run directory cannot be used as it is."""


class SelectionError(MMFilterError):
    """A selection cannot be made as asked."""


class RecipeError(MMFilterError):
    """A recipe cannot be read, or cannot be followed."""


class ModelError(MMFilterError):
    """A model cannot be loaded or used."""


class SAEError(MMFilterError):
    """An SAE cannot be loaded or trained, or does not fit the model."""


class MissingExtra(MMFilterError):
    """A feature needs an optional package."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional package: pip install 'mmfilter[{extra}]'")
