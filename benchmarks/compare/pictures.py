"""Plots of a comparison: held-out values over training, and over state; ranks by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from arg_dist.checkpoint.files import write_atomically
from benchmarks.compare.results import Row, best_runs
from launchers.reporting.charts import STYLE, cycle_of, new_figure
from launchers.reporting.measures import Measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = Mapping[str, Any]
Ranks = Mapping[str, Sequence[Sequence[float]]]

CURVES, FRONTIER, RANKS, PROGRESS = "curves.png", "frontier.png", "ranks.png", "progress.png"

PLACES = [(side, sign * height) for height in (7, 20, 33) for side in (1, -1) for sign in (1, -1)]
"""Where a label may lie, in order: right (1) or left (-1) of its point, and so many units above."""


def draw_all(
    directory: Path, rows: Sequence[Row], runs: Sequence[Run], measure: Measure
) -> list[Path]:
    """Draw the available plots into `directory` and return their paths."""
    from matplotlib import rc_context

    shown = [row for row in rows if row.lr is not None]
    ranked = [row for row in shown if _has_ranks(row, runs)]
    followed = [row for row in shown if best_runs(row, runs)[0].get("progress")]
    drawn = []
    with rc_context(STYLE):
        if shown:
            drawn.append(_save(directory / CURVES, _curves(shown, runs, measure)))
            drawn.append(_save(directory / FRONTIER, _frontier(shown, measure)))
        if followed:
            drawn.append(_save(directory / PROGRESS, _progress(followed, runs, measure)))
        if ranked:
            drawn.append(_save(directory / RANKS, _ranks(ranked, runs)))
    return drawn


def _save(path: Path, figure: Figure) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
    return path


def _colors(rows: Sequence[Row]) -> list[Any]:
    from matplotlib import colormaps

    colors = colormaps["tab10" if len(rows) <= 10 else "tab20"].colors
    return [color for _, color in zip(rows, cycle_of(colors), strict=False)]


def _curves(rows: Sequence[Row], runs: Sequence[Run], measure: Measure) -> Figure:
    """Held-out value over training at each method's best rates: median and range over seeds."""
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    late = []
    for row, color in zip(rows, _colors(rows), strict=True):
        curves = [run["curve"] for run in best_runs(row, runs)]
        shared = min(map(len, curves))
        values = [[curve[i][2] for curve in curves] for i in range(shared)]
        seen = [curves[0][i][1] for i in range(shared)]
        middle = [median(each) for each in values]
        axes.plot(seen, middle, color=color, marker="o", markersize=3, label=label(row))
        axes.fill_between(
            seen, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0
        )
        late += [value for each in values[shared // 3 :] for value in each]
    # early values are far from the range in which the methods differ
    margin = 0.08 * (max(late) - min(late)) or 0.01
    axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(title=f"{_title(measure)} (median; band: range over seeds)", xlabel="tokens")
    axes.xaxis.set_major_formatter(_tokens)
    axes.legend()
    return figure


def _progress(rows: Sequence[Row], runs: Sequence[Run], measure: Measure) -> Figure:
    """Over training, of the first seed: value by CPU seconds, state and mean rank by tokens."""
    figure = new_figure(15, 4.5)
    by_time, state, rank = figure.subplots(1, 3)
    late = []
    for row, color in zip(rows, _colors(rows), strict=True):
        run = best_runs(row, runs)[0]
        points, values = run["progress"], [point[2] for point in run["curve"]]
        tokens = [point[1] for point in run["curve"]]
        style = {"color": color, "label": row.method}
        by_time.plot([point["seconds"] for point in points], values, **style)
        share = row.adamw_matrices / 100
        state.plot(tokens, [point["state"] / share for point in points], **style)
        if points[-1]["rank"] is not None:
            rank.plot(tokens, [point["rank"] for point in points], **style)
        late += values[len(values) // 3 :]
    margin = 0.08 * (max(late) - min(late)) or 0.01
    by_time.set_ylim(min(late) - margin, max(late) + margin)
    by_time.set(title=_title(measure), xlabel="CPU seconds of training")
    state.set(title="State of the low-rank matrices", xlabel="tokens", ylabel="% of AdamW's")
    state.set_yscale("log")
    rank.set(title="Mean rank", xlabel="tokens")
    for panel in (state, rank):
        panel.xaxis.set_major_formatter(_tokens)
    by_time.legend()
    return figure


def _frontier(rows: Sequence[Row], measure: Measure) -> Figure:
    """Final value over the matrices' state, relative to AdamW's: median, and range over seeds."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    points = []
    for row, color in zip(rows, _colors(rows), strict=True):
        values = [value for value in (row.by_seed or {}).values() if value is not None]
        kept, stored, middle = row.share("logical"), row.share("storage"), median(values)
        if not kept or not stored:
            continue
        low, high = middle - min(values), max(values) - middle
        axes.errorbar(kept, middle, [[low], [high]], color=color, fmt="o", capsize=4)
        if stored > 1.01 * kept:  # views keep larger storages alive
            axes.plot([kept, stored], [middle] * 2, color=color, ls=":", lw=1)
            axes.plot(stored, middle, "o", color=color, mfc="none")
        points.append((kept, middle, label(row), color))
    axes.set_xscale("log")
    axes.set(
        title=f"{_title(measure)} vs. state (bars: range over seeds)",
        xlabel="peak optimizer state of the low-rank matrices, as a share of AdamW's "
        "(open circles: including storages kept alive)",
    )
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.margins(x=0.25, y=0.12)
    _write_beside(axes, points)
    return figure


def _write_beside(axes: Axes, points: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write the label of each point (x, y, label, color) where it covers no earlier one."""
    axes.figure.canvas.draw()  # settles the limits of both axes
    taken: list[Any] = []
    for x, y, words, color in points:
        for i, (side, height) in enumerate(PLACES):
            text = axes.annotate(
                words,
                (x, y),
                (8 * side, height),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=color,
                fontsize=9,
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if i == len(PLACES) - 1 or (inside and not any(box.overlaps(each) for each in taken)):
                taken.append(box)
                break
            text.remove()


def _ranks(rows: Sequence[Row], runs: Sequence[Run]) -> Figure:
    """Rank of each layer, averaged over its matrices, in one run of each method."""
    from matplotlib import colormaps

    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure = new_figure(5 * columns + 1, 4 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flat
    for panel, row in zip(panels, rows, strict=False):
        run = best_runs(row, runs)[0]
        per_step = run["curve"][-1][1] / run["curve"][-1][0]
        steps = sorted({int(point[0]) for points in run["ranks"].values() for point in points})
        steps.append(run["steps"])
        layers = sorted({layer_of(name) for name in run["ranks"]})
        for i, layer in enumerate(layers):
            of_layer = {n: p for n, p in run["ranks"].items() if layer_of(n) == layer}
            color = colormaps["viridis"](i / max(1, len(layers) - 1))
            _draw_mean(panel, of_layer, steps, per_step, color=color, label=f"layer {layer}")
        _draw_mean(panel, run["ranks"], steps, per_step, color="black", lw=2.2, label="all")
        panel.set(title=label(row), xlabel="tokens", ylabel="rank")
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_formatter(_tokens)
        if len(layers) <= 8:
            panel.legend(ncols=2, fontsize=8)
    for panel in list(panels):
        panel.set_axis_off()
    return figure


def _draw_mean(
    panel: Axes, ranks: Ranks, steps: Sequence[int], per_step: float, **style: Any
) -> None:
    means = [mean_rank_at(ranks, step) for step in steps]
    points = [(step * per_step, mean) for step, mean in zip(steps, means, strict=True) if mean]
    panel.plot(*zip(*points, strict=True), drawstyle="steps-post", **style)


def mean_rank_at(ranks: Ranks, step: int) -> float | None:
    """Mean rank over the matrices after `step`; None before the first refresh."""
    latest = [[point[1] for point in points if point[0] <= step] for points in ranks.values()]
    known = [each[-1] for each in latest if each]
    return fmean(known) if known else None


def layer_of(name: str) -> int:
    """Layer index of a matrix: the first number in its name, or 0."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found.group(1)) if found else 0


def _has_ranks(row: Row, runs: Sequence[Run]) -> bool:
    finished = best_runs(row, runs)
    return bool(finished and finished[0]["ranks"] and finished[0]["curve"])


def label(row: Row) -> str:
    """A method with its best learning rates."""
    assert row.lr is not None and row.rest_lr is not None
    rest = f", rest {row.rest_lr:g}" if row.two_rates else ""
    return f"{row.method}, lr {row.lr:g}{rest}"


def _title(measure: Measure) -> str:
    return measure.title[0].upper() + measure.title[1:]


def _tokens(value: float, _: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{unit}"
    return f"{value:g}"
