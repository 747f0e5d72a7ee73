"""What a search for duplicates is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from mmfilter.core.codes.duplicate_settings import DuplicateSettings
from mmfilter.core.pages.place import check_page
from mmfilter.core.typed import setting
from mmfilter.errors import SelectionError


@dataclass(frozen=True)
class DedupSettings(DuplicateSettings):
    """What counts as a duplicate, and which of two is kept."""

    GROUP: ClassVar[str] = "Output"

    by: str = "similarity"
    """Score column; of two duplicates the one with the larger value is kept"""
    borderline: int = setting(0, metavar="N")
    """List the N pairs closest to the threshold, on either side of it"""
    page: Path | None = setting(None, metavar="FILE")
    """Also write the pairs of --borderline as an HTML page with pictures"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.borderline < 0:
            raise SelectionError(f"--borderline is {self.borderline}; give a number of pairs from 0")
        if self.page is not None:
            check_page(self.page)
            if not self.borderline:
                raise SelectionError("--page shows the pairs of --borderline: say how many, as in --borderline 20")

    def stored(self) -> dict[str, Any]:
        """As files have them: how duplicates are told, and the rest."""
        values = asdict(self)
        duplicates = {item.name: values.pop(item.name) for item in fields(DuplicateSettings)}
        return {"duplicates": duplicates} | values
