"""The curves of a training as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmfilter.core.pages.page import Markup, element, page
from mmfilter.core.training.settings import ResolvedTrainSettings

POINTS = 600
"""Most points a curve is drawn with: means of stretches"""
WIDE, HIGH, LEFT, BOTTOM, TOP = 560, 200, 56, 28, 12
COLOURS = {
    "fvu": "#1a1a1a",
    "l0": "#1a1a1a",
    "loss": "#1a1a1a",
    "dead": "#1a1a1a",
    "image_fvu": "#c2410c",
    "text_fvu": "#1d4ed8",
    "image_l0": "#c2410c",
    "text_l0": "#1d4ed8",
}
PANELS = {
    "Fraction of variance unexplained": ("fvu", "image_fvu", "text_fvu"),
    "Active features a token (L0)": ("l0", "image_l0", "text_l0"),
    "Dead features (share)": ("dead",),
    "Loss": ("loss",),
}
NAMES = {
    "fvu": "all tokens",
    "l0": "all tokens",
    "image_fvu": "image",
    "text_fvu": "text",
    "image_l0": "image",
    "text_l0": "text",
    "dead": "dead",
    "loss": "loss",
}
STYLE = """main+h2{margin-top:1.5rem}
main{grid-template-columns:repeat(auto-fit,minmax(480px,1fr));gap:1.5rem}svg{width:100%;height:auto}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td{padding:.1rem 1rem .1rem 0}
td+td{font-variant-numeric:tabular-nums}
text{font-size:11px;fill:#555}.key{font-size:.85rem;color:#555}.key b{font-weight:400;margin-right:1rem}"""


def curves_page(log: Path, settings: ResolvedTrainSettings) -> str:
    """The page of a log of steps (JSON lines)."""
    rows = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line]
    panels = [panel(title, rows, names) for title, names in PANELS.items()]
    facts = {name: value for name, value in settings.to_mapping().items() if value not in (None, [], ())}
    table = element(
        "table", *(element("tr", element("td", name), element("td", str(value))) for name, value in facts.items())
    )
    last = rows[-1] if rows else {}
    done, fvu, l0 = last.get("tokens", 0), last.get("fvu", math.nan), last.get("l0", math.nan)
    about = f"{done:,} tokens in {last.get('step', 0):,} steps; FVU {fvu:.3f}, L0 {l0:.1f} at the end"
    return page("SAE training", about, element("main", *panels), element("h2", "Settings"), table, style=STYLE)


def panel(title: str, rows: list[dict[str, Any]], names: tuple[str, ...]) -> Markup:
    """One chart with the curves that the log has."""
    curves = {
        name: thinned(
            [
                (row["tokens"], row[name])
                for row in rows
                if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
            ]
        )
        for name in names
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return Markup("")
    values = sorted(value for points in curves.values() for _, value in points)
    top = (
        values[min(len(values) - 1, int(0.99 * len(values)))] or 1.0
    )  # the first steps of a loss would flatten the rest
    right = max(x for points in curves.values() for x, _ in points) or 1
    axes = "".join(
        f'<line x1="{LEFT}" x2="{WIDE}" y1="{y(top * part, top):.1f}" y2="{y(top * part, top):.1f}" stroke="#e5e5e5"/>'
        f'<text x="{LEFT - 6}" y="{y(top * part, top) + 4:.1f}" text-anchor="end">{number(top * part)}</text>'
        for part in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        f'<text x="{LEFT + (WIDE - LEFT) * part:.0f}" y="{HIGH - 8}" '
        f'text-anchor="{"end" if part == 1 else "middle"}">{number(right * part)}</text>'
        for part in (0.25, 0.5, 0.75, 1)
    )
    lines = "".join(
        f'<polyline fill="none" stroke="{COLOURS[name]}" stroke-width="1.5" points="'
        + " ".join(f"{LEFT + (WIDE - LEFT) * x / right:.1f},{y(min(value, top), top):.1f}" for x, value in points)
        + '"/>'
        for name, points in curves.items()
    )
    key = (
        "".join(f'<b><span style="color:{COLOURS[name]}">━</span> {NAMES[name]}</b>' for name in curves)
        if len(curves) > 1
        else ""
    )
    drawing = Markup(f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{title}">{axes}{ticks}{lines}</svg>')
    return element("section", element("h2", title), drawing, element("div", Markup(key), " over tokens", class_="key"))


def y(value: float, top: float) -> float:
    """Height in the picture."""
    return HIGH - BOTTOM - (HIGH - BOTTOM - TOP) * max(0.0, value) / top


def number(value: float) -> str:
    """A short label."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of equal stretches, at most `POINTS` of them."""
    stretch = -(-len(points) // POINTS) or 1
    parts = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
