"""Pictures of a cache: each quantity over the blocks, and its histogram over all positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megadistill.blocks import open_store
from megadistill.cache.quantizer import LEVELS, NONE
from megadistill.cache.statistics import combine, summary
from megadistill.errors import StoreError
from megadistill.inspect.pictures import count_along_x, leave_air, new_figure, plain, save_figure

# Quantity -> title, unit.
_PICTURES = {
    "entropy": ("Entropy of the teacher's distribution", "nats"),
    "listed_mass": ("Probability that the list holds (varopt: its heads)", "probability"),
    "entries_per_position": ("Entries kept for a position", "entries"),
    "bytes_per_position": ("Bytes of targets for a position, mean", "bytes"),
}
_MARKED = 100  # blocks up to which each has a dot
_BARS = 48  # of a histogram, at most


class Histogram(NamedTuple):
    """Positions by value: `shares` sum to 1 and lie between neighbours of `edges`."""

    edges: np.ndarray
    shares: np.ndarray


def plot_store(path: str | Path, folder: str | Path) -> list[Path]:
    """Write a PNG for each quantity that the cache has; returns the files.

    Lines are means; where there are quantiles, the band goes from 5 to 95 percent. StoreError for
    a token store, which has nothing to show, and for an empty one.
    """
    store = open_store(path)
    if store.kind != "cache":
        raise StoreError(f"{path}: is a token store, and has no targets to plot")
    blocks = store.committed()
    if not blocks:
        raise StoreError(f"{path}: has no committed block to plot")
    statistics = [store.marker(b)["statistics"] for b in blocks]
    summaries = [summary(each) for each in statistics]
    histograms = position_histograms(combine(statistics))
    files = []
    for name, (title, unit) in _PICTURES.items():
        values = [s[name] for s in summaries]
        if any(value is not None for value in values):
            figure = _figure(blocks, values, unit, histograms.get(name))
            figure.suptitle(plain(f"{title}\n{path}"), fontsize="medium")
            files.append(save_figure(figure, Path(folder) / f"{name}.png"))
    return files


def position_histograms(statistics: dict[str, Any]) -> dict[str, Histogram]:
    """Quantity -> its histogram over all positions, from the counts in the markers."""
    found = {}
    if counts := statistics.get("entries_histogram"):
        entries = np.array([int(n) for n in counts], np.float64)
        step = max(1, -(-int(entries.max() + 1) // _BARS))  # whole numbers of entries a bar
        edges = np.arange(-0.5, entries.max() + step + 0.5, step)
        found["entries_per_position"] = _histogram(entries, list(counts.values()), edges)
    if counts := statistics.get("listed_mass_histogram"):
        edges = np.linspace(0, 1, _BARS + 1)
        # 256 bins are no multiple of the bars: a bin counts where its middle lies.
        middles = (np.arange(len(counts)) + 0.5) / 256
        found["listed_mass"] = _histogram(middles, counts, edges)
    if counts := statistics.get("entropy_codes"):
        levels = LEVELS[:NONE][: len(counts)].astype(np.float64)
        # Levels lie farther apart the higher they are, by a sixteenth of a nat at 2: a bar is no
        # narrower than the widest gap.
        widest = max(np.diff(levels).max(initial=0.0), levels[-1] / _BARS, 1 / 64)
        edges = np.arange(0, levels[-1] + 2 * widest, widest)
        found["entropy"] = _histogram(levels, counts, edges)
    return found


def _histogram(values: np.ndarray, counts: list[int], edges: np.ndarray) -> Histogram:
    inside, _ = np.histogram(values, bins=edges, weights=np.asarray(counts, np.float64))
    return Histogram(edges, inside / max(1, sum(counts)))


def _figure(blocks: list[int], values: list[Any], unit: str, histogram: Histogram | None) -> Any:
    figure = new_figure(11 if histogram else 9, 4.5)
    if histogram is None:
        _draw_blocks(figure, figure.subplots(), blocks, values, unit)
        return figure
    over_blocks, over_positions = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_blocks(figure, over_blocks, blocks, values, unit)
    over_positions.stairs(histogram.shares * 100, histogram.edges, fill=True, alpha=0.6)
    over_positions.grid(alpha=0.3)
    over_positions.set_xlabel(unit)
    over_positions.set_ylabel("% of positions")
    leave_air(over_positions, zero=True)
    return figure


def _draw_blocks(figure: Any, axes: Any, blocks: list[int], values: list[Any], unit: str) -> None:
    known = [(b, v) for b, v in zip(blocks, values, strict=True) if v is not None]
    numbers = [b for b, _ in known]
    marker = "." if len(known) <= _MARKED else ""
    if isinstance(known[0][1], dict):
        low, high = (np.array([v[q] for _, v in known]) for q in ("p05", "p95"))
        alone = "s" if len(numbers) == 1 else ""  # no line leads to it
        # A single block has no width of its own.
        band = numbers if len(numbers) > 1 else [numbers[0] - 0.5, numbers[0] + 0.5]
        low, high = (np.broadcast_to(each, len(band)) for each in (low, high))
        axes.fill_between(band, low, high, alpha=0.25, step="mid", label="5% to 95%")
        axes.plot(
            numbers, [v["p50"] for _, v in known], linestyle=":", marker=alone, label="median"
        )
        axes.plot(numbers, [v["mean"] for _, v in known], marker=marker, label="mean")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    else:
        axes.plot(numbers, [v for _, v in known], marker=marker)
    axes.set_ylabel(unit)
    leave_air(axes, zero=True)
    count_along_x(axes, "block")
