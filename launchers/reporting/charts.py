"""``report.png`` and ``compare.png``: charts drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from arg_dist.checkpoint.files import write_atomically
from launchers.reporting.measures import LOSS, MEASURES, Measure, judging
from launchers.reporting.tables import processes, resumed_steps, share, typical_save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Steps = Sequence[dict[str, Any]]

STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": "#888888",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "font.size": 10,
}
"""Matplotlib's settings for every chart."""
_OWN, _OTHER, _FAINT = "#1f5fa8", "#c9c9c9", "#9db8d6"
_HIGHLIGHT, _GOOD = "#d1495b", "#2a7f62"
_MIB = 2**20


def draw_report(report: dict[str, Any], steps: Steps, path: Path) -> None:
    """Four panels: losses, the optimizer state, the rank and the kept energy of each matrix.

    The first one also shows the measure that judges the run, if that is not the loss.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = new_figure(13, 8.5)
        (losses, state), (ranks, energy) = figure.subplots(2, 2)
        _draw_losses(losses, steps)
        _draw_checkpoints(losses, report, steps)
        if report["measure"] != LOSS:
            _draw_measure(losses, steps, MEASURES[report["measure"]])
        _draw_state(state, report)
        _draw_matrices(ranks, steps, "ranks", "Rank of each matrix", whole=True)
        _draw_matrices(energy, steps, "energy", "Gradient energy kept by each basis")
        # Both panels color a matrix by its kind, so they share one legend below.
        legend = figure.legend(
            *ranks.get_legend_handles_labels(), loc="outside lower center", ncols=10
        )
        for handle in legend.legend_handles:
            handle.set(linewidth=2.2, alpha=1)
        figure.suptitle(
            f"{report['model']} ({report['model_parameters'] / 1e6:.1f}M)  ·  "
            f"{report['optimizer']}  ·  {report['engine']} on {processes(report)}  ·  "
            f"{report['status']} at step {report['steps']}",
            fontsize=13,
        )

        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def draw_comparison(runs: Mapping[str, tuple[dict[str, Any], Steps]], path: Path) -> None:
    """Two panels: the measure that judges the runs by step, and their largest state per process."""
    from matplotlib import colormaps, rc_context

    colors = colormaps["tab10"].colors
    with rc_context(STYLE):
        figure = new_figure(13, 5)
        judged, state = figure.subplots(1, 2, width_ratios=(3, 2))
        measure = judging([report for report, _ in runs.values()])
        title = measure.title[0].upper() + measure.title[1:]
        judged.set(title=title, xlabel="step")
        for color, (name, (_, steps)) in zip(cycle_of(colors), runs.items(), strict=False):
            numbers, values = _series(steps, measure.key)
            judged.plot(numbers, values, color=color, marker="o", markersize=4, label=name)
            if measure.key == LOSS:
                numbers, values = _series(steps, "loss")
                judged.plot(numbers, _smooth(values), color=color, alpha=0.35, linewidth=1)
        if measure.key == LOSS:
            judged.set(title=f"{title} (faint: training)", ylabel="loss")
            _crop_start(judged, [line for _, steps in runs.values() for line in steps])
        judged.legend()
        for row, (color, (report, _)) in enumerate(
            zip(cycle_of(colors), runs.values(), strict=False)
        ):
            bar = state.barh(row, max(report["state_bytes"], default=0) / _MIB, 0.6, color=color)
            state.bar_label(bar, fmt="%.1f", padding=3)
        state.set_yticks(range(len(runs)), list(runs))
        state.invert_yaxis()
        state.margins(x=0.15)
        state.grid(axis="y", visible=False)
        state.set(title="Optimizer state, largest of any process", xlabel="MiB")
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches; draw into it inside ``rc_context(STYLE)``."""
    # Not pyplot: needs no display and leaves no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    return figure


def _draw_losses(axes: Axes, steps: Steps) -> None:
    numbers, values = _series(steps, "loss")
    axes.plot(numbers, values, color=_FAINT, linewidth=0.8, label="training")
    axes.plot(numbers, _smooth(values), color=_OWN, linewidth=1.8, label="training, smoothed")
    numbers, values = _series(steps, LOSS)
    axes.plot(numbers, values, color=_HIGHLIGHT, marker="o", markersize=4, label="held-out")
    if values:
        axes.annotate(
            f"{values[-1]:.3f}", (numbers[-1], values[-1]), (0, 8), textcoords="offset points",
            color=_HIGHLIGHT, ha="right", weight="bold",
        )  # fmt: skip
    _crop_start(axes, steps)
    axes.set(title="Loss", xlabel="step")


def _draw_checkpoints(axes: Axes, report: dict[str, Any], steps: Steps) -> None:
    """Marks where the run was saved, and where it was resumed."""
    saved, _ = _series(steps, "save_seconds")
    if saved:
        typical = f", {typical_save(report['saves'])}" if report["saves"] else ""
        axes.plot(
            saved, [0.02] * len(saved), "^", color=_GOOD, markersize=5, clip_on=False,
            transform=axes.get_xaxis_transform(), label=f"saved{typical}",
        )  # fmt: skip
    for number, step in enumerate(resumed_steps(report)):
        label = None if number else "resumed"
        axes.axvline(step + 0.5, color="#666666", linestyle=":", label=label)
    axes.legend()


def _draw_measure(axes: Axes, steps: Steps, measure: Measure) -> None:
    """Adds `measure` to the losses, with its own axis on the right."""
    right = axes.twinx()
    numbers, values = _series(steps, measure.key)
    right.plot(numbers, values, color=_GOOD, marker="s", markersize=4, label=measure.title)
    right.set_ylabel(measure.title, color=_GOOD)
    right.spines.right.set_visible(True)
    right.grid(visible=False)
    for scale in (axes, right):  # space for the legend above both
        low, high = scale.get_ylim()
        scale.set_ylim(low, high + 0.25 * (high - low))
    handles = [line for line in (*axes.lines, *right.lines) if line.get_label()[0] != "_"]
    axes.legend(handles=handles, loc="upper center", ncols=2)
    axes.set(title=f"Loss and {measure.title}")


def _draw_matrices(axes: Axes, steps: Steps, key: str, title: str, *, whole: bool = False) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    axes.set(title=title, xlabel="step")
    logged = [step for step in steps if step.get(key)]
    if not logged:
        axes.text(0.5, 0.5, "no low-rank matrices", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    names = sorted({name for step in logged for name in step[key]})
    kinds = sorted({kind_of(name) for name in names})
    colors = dict(zip(kinds, cycle_of(colormaps["tab10"].colors), strict=False))
    labelled = set()
    for name in names:
        kind = kind_of(name)
        points = [(step["step"], step[key][name]) for step in logged if name in step[key]]
        axes.plot(
            *zip(*points, strict=True), color=colors[kind], linewidth=0.8, alpha=0.6,
            drawstyle="steps-post", label=None if kind in labelled else kind,
        )  # fmt: skip
        labelled.add(kind)
    means = [fmean(step[key].values()) for step in logged]
    axes.plot([step["step"] for step in logged], means, color="black", linewidth=2.2, label="mean")
    if whole:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_state(axes: Axes, report: dict[str, Any]) -> None:
    own = [count / _MIB for count in report["state_bytes"]]
    adamw = [count / _MIB for count in report["adamw_state_bytes"]]
    places = range(len(own))
    bars = axes.bar([x - 0.2 for x in places], adamw, 0.4, color=_OTHER, label="AdamW, same layout")
    axes.bar_label(bars, fmt="%.1f", padding=2)
    bars = axes.bar([x + 0.2 for x in places], own, 0.4, color=_OWN, label=report["optimizer"])
    labels = [
        f"{mine:.1f}\n{share(mine / other if other else None)}"
        for mine, other in zip(own, adamw, strict=True)
    ]
    axes.bar_label(bars, labels, padding=2)
    axes.set(title="Optimizer state per process", xlabel="process", ylabel="MiB")
    axes.set_xticks(places)
    axes.margins(y=0.3)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper center", ncols=2)


def kind_of(name: str) -> str:
    """A matrix's role in its layer: ``q_proj`` of ``model.layers.3.self_attn.q_proj.weight``."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _series(steps: Steps, key: str) -> tuple[list[int], list[float]]:
    points = [(step["step"], step[key]) for step in steps if step.get(key) is not None]
    return [number for number, _ in points], [value for _, value in points]


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """The exponential moving average, with bias correction."""
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed


def _crop_start(axes: Axes, steps: Steps) -> None:
    """Crops the high losses of the first steps, which would flatten the rest."""
    late = [step["loss"] for step in steps if step["loss"] is not None and step["step"] > 20]
    late += [step[LOSS] for step in steps if step.get(LOSS) is not None]
    if len(late) > 20:
        margin = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)


def cycle_of(colors: Sequence[Any]) -> Any:
    """The colors, repeated forever."""
    from itertools import cycle

    return cycle(colors)
