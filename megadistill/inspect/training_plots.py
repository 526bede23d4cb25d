"""The curves of training runs as one picture: a panel a figure, a colour a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megadistill.inspect.pictures import count_along_x, leave_air, new_figure, plain, save_figure
from megadistill.inspect.training_report import RunRecords, values

_POINTS = 1000  # of a curve; longer ones are drawn as means of neighbours
_SMOOTH = 0.04  # of a curve: the window of its running mean


class Panel(NamedTuple):
    source: str  # steps or evaluations
    key: str
    title: str
    unit: str
    shows: Callable[[RunRecords], bool] = lambda run: True  # whether a run's numbers are of it


# From sampled targets kd_loss is a cross-entropy, above a KL by the teacher's entropy: never in one
# panel with the others.
PANELS = (
    Panel("evaluations", "loss", "Held-out loss", "nats a token"),
    Panel("evaluations", "kl", "Held-out KL to the teacher", "nats a token"),
    Panel("evaluations", "top1_agreement", "Held-out top-1 agreement with the teacher", "share"),
    Panel("evaluations", "calibration_error", "Held-out calibration error", "probability"),
    Panel("steps", "loss", "Training: the loss that is minimised", "nats a position"),
    Panel("steps", "ce_loss", "Training: cross-entropy of the true tokens", "nats a position"),
    Panel("steps", "kl", "Training: KL to the teacher", "nats a position"),
    Panel(
        "steps",
        "kd_loss",
        "Training: divergence that is distilled by",
        "nats a position",
        lambda run: not run.is_sampled,
    ),
    Panel(
        "steps",
        "kd_loss",
        "Training: cross-entropy with sampled targets",
        "nats a position",
        lambda run: run.is_sampled,
    ),
    Panel("steps", "grad_norm", "Gradient norm, before clipping", "norm"),
    Panel("steps", "lr", "Learning rate", "rate"),
    Panel("steps", "tokens_per_s", "Speed", "tokens/s"),
)
HELD_OUT_PANELS = tuple(panel for panel in PANELS if panel.source == "evaluations")


def plot_runs(runs: list[RunRecords], file: Path, *, panels: tuple[Panel, ...] = PANELS) -> Path:
    """Write the picture. Runs of one name share a colour and a line of the legend.

    A panel that no run has figures for is left out, and one that repeats another's curves.
    StoreError where the file cannot be written.
    """
    drawn: dict[Panel, list] = {}
    for panel in panels:
        curves = [_curve(panel, run) for run in runs]
        if any(y for _, y in curves) and curves not in drawn.values():
            drawn[panel] = curves
    columns = 2 if len(drawn) > 1 else 1
    rows = -(-len(drawn) // columns)
    figure = new_figure(5.5 * columns + 0.5, 3.1 * rows + 0.8)
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = _colours([run.name for run in runs])
    for axes, (panel, curves) in zip(all_axes, drawn.items(), strict=False):
        for run, (steps, y) in zip(runs, curves, strict=True):
            _draw(axes, panel, steps, y, colour=colours[run.name])
        if panel.source == "evaluations" and panel.key == "loss":
            _teachers(axes, runs)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_ylabel(panel.unit)
        if panel.key == "grad_norm":
            axes.set_yscale("log")
        leave_air(axes)
        count_along_x(axes, "step")
    for axes in all_axes[len(drawn) :]:
        axes.set_visible(False)
    if len(colours) == 1:
        figure.suptitle(plain(runs[0].name))
    else:
        _legend(figure, colours)
    return save_figure(figure, file)


def _curve(panel: Panel, run: RunRecords) -> tuple[list[int], list[float]]:
    return values(getattr(run, panel.source), panel.key) if panel.shows(run) else ([], [])


def _draw(axes: Any, panel: Panel, steps: list[int], y: list[float], *, colour: Any) -> None:
    if panel.source == "evaluations":
        axes.plot(steps, y, color=colour, marker="o", markersize=3)
        return
    x_P, y_P = _thinned(np.asarray(steps, float), np.asarray(y))
    window = 1 if panel.key == "lr" else max(1, round(_SMOOTH * len(y_P)))
    axes.plot(x_P, y_P, color=colour, alpha=0.3 if window > 1 else 1.0, linewidth=1)
    if window > 1:
        axes.plot(x_P, _running_mean(y_P, window), color=colour)


def _thinned(x_P: np.ndarray, y_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    group = -(-len(y_P) // _POINTS)
    if group <= 1:
        return x_P, y_P
    starts = np.arange(0, len(y_P), group)
    sizes = np.diff(np.append(starts, len(y_P)))
    return np.add.reduceat(x_P, starts) / sizes, np.add.reduceat(y_P, starts) / sizes


def _running_mean(y_P: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` neighbours; over fewer at the ends."""
    kernel = np.ones(window)
    return np.convolve(y_P, kernel, "same") / np.convolve(np.ones_like(y_P), kernel, "same")


def _teachers(axes: Any, runs: list[RunRecords]) -> None:
    losses = {loss for run in runs for loss in values(run.evaluations[-1:], "teacher_loss")[1]}
    for i, loss in enumerate(sorted(losses)):
        axes.axhline(loss, color="black", linestyle=":", label=None if i else "teacher")
    if losses:
        axes.legend(frameon=False)


def _colours(names: list[str]) -> dict[str, tuple]:
    from matplotlib import colormaps

    different = list(dict.fromkeys(names))
    if len(different) <= 10:
        return {name: colormaps["tab10"](i) for i, name in enumerate(different)}
    return {name: colormaps["turbo"](i / len(different)) for i, name in enumerate(different)}


def _legend(figure: Any, colours: dict[str, tuple]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, label=plain(name)) for name, colour in colours.items()]
    columns = max(1, min(len(lines), 100 // max(map(len, colours))))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
