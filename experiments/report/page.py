"""One HTML file that opens anywhere, without a network."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from experiments.config import RunFailed
from experiments.report.source import sides_of

_HERE = Path(__file__).parent


def section(title: str, text: str, *parts: str) -> str:
    """Returns a part of a page; nothing where it has no content."""
    content = "".join(parts)
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{content}" if content else ""


def chart(figure: go.Figure | None, title: str = "") -> str:
    """Returns a chart, or nothing."""
    if figure is None:
        return ""
    if title:
        figure.update_layout(title=dict(text=title, font_size=15, x=0), margin_t=80)
    label = html.escape(title or "chart", quote=True)
    return (
        f'<div class="chart" role="group" aria-label="{label}">{_data(figure.to_plotly_json())}'
        "<div></div></div>"
    )


def _data(value: Any) -> str:
    """Returns data for a script of the page. `<` in it would end its element."""
    text = json.dumps(value, default=_plain, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def _plain(value: Any) -> Any:
    if isinstance(value, go.layout.Template):
        return {}
    return value.tolist() if hasattr(value, "tolist") else value.to_plotly_json()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table, numbers to the right; nothing where there are no rows."""
    lines = [list(row) for row in rows]
    if not lines:
        return ""

    def cell(kind: str, value: Any, number: bool) -> str:
        text = html.escape(value if isinstance(value, str) else shown(value))
        css = ' class="number"' if number else ""
        css += ' scope="col"' if kind == "th" else ""
        return f"<{kind}{css}>{text}</{kind}>"

    numbers = [all(isinstance(row[i], int | float) for row in lines) for i in range(len(columns))]
    head = "".join(cell("th", name, x) for name, x in zip(columns, numbers, strict=True))
    body = "".join(
        f"<tr>{''.join(cell('td', x, n) for x, n in zip(row, numbers, strict=True))}</tr>"
        for row in lines
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def shown(value: Any) -> str:
    """Returns a value for people."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.1f}" if abs(value) >= 10 or value == 0 else f"{value:.4g}"


def replay(episodes: dict[str, np.ndarray]) -> str:
    """Returns bodies that move in three dimensions, or nothing."""
    if "ends" not in episodes or not episodes["ends"].size:
        return ""
    every = int(episodes["frame"])
    tasks: list[dict[str, Any]] = []
    for i, name in enumerate(episodes["names"]):
        both = []
        for side in range(episodes["alive"].shape[1]):
            alive = episodes["alive"][i, side]
            last = -(-int(alive.sum()) // every)
            frames = [
                {
                    "place": _short(episodes["place"][i, side, k * every]),
                    "ends": _short(episodes["ends"][i, side, k]),
                    "corners": _short(episodes["corners"][i, side, k]),
                }
                for k in range(last)
            ]
            earned = float(np.nan_to_num(episodes["reward"][i, side][alive].sum()))
            radius = _short(episodes["radius"][i, side, 0])
            both.append({"frames": frames, "radius": radius, "return": earned})
        tasks.append({"name": str(name), "episodes": both})
    options = "".join(
        f'<option value="{i}">{html.escape(one["name"])}</option>' for i, one in enumerate(tasks)
    )
    seconds = every * float(episodes["dt"]) or 0.05
    sides = sides_of(episodes)
    shown = {"tasks": tasks, "seconds": seconds, "sides": sides}
    return (
        f'<div class="replay">{_data(shown)}'
        f'<canvas role="img" aria-label="bodies: {" and ".join(sides)}"></canvas>'
        f"<form><button>Play</button><label>task <select>{options}</select></label>"
        '<input type="range" min="0" value="0" aria-label="time"></form></div>'
    )


def _short(values: np.ndarray) -> Any:
    """Returns positions to the millimetre; what is not finite is at the origin."""
    return np.nan_to_num(values.astype(float), posinf=0.0, neginf=0.0).round(3).tolist()


def write(path: Path, title: str, subtitle: str, parts: Iterable[str]) -> None:
    """Writes a page, whole or not at all.

    Raises:
        RunFailed: the disk refuses.
    """
    css, *scripts = (
        (_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "replay.js")
    )
    body = "".join(parts)
    text = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{css}</style>"
        f'<link rel="icon" href="data:,"></head><body><h1>{html.escape(title)}</h1>'
        f'<p class="quiet">{html.escape(subtitle)}</p>{body}'
        f"<script>{get_plotlyjs()}</script>"
        f"{''.join(f'<script>{{{text}}}</script>' for text in scripts)}</body></html>\n"
    )
    new = path.with_name(f".{path.name}")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error}") from None
