"""Pictures of a cache over its blocks: what the teacher was sure of, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks import open_store
from megadistill.cache.statistics import summary
from megadistill.errors import StoreError
from megadistill.inspect.pictures import count_along_x, new_figure, plain, save_figure

# Quantity -> title, unit.
_PICTURES = {
    "entropy": ("Entropy of the teacher's distribution", "nats"),
    "listed_mass": ("Probability that the list holds (varopt: its heads)", "probability"),
    "entries_per_position": ("Entries kept for a position, mean", "entries"),
    "bytes_per_position": ("Bytes of targets for a position, mean", "bytes"),
}
_MARKED = 100  # blocks up to which each has a dot


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
    summaries = [summary(store.marker(b)["statistics"]) for b in blocks]
    return [
        _plot(
            Path(folder) / f"{name}.png",
            blocks,
            [s[name] for s in summaries],
            f"{title}\n{path}",
            unit,
        )
        for name, (title, unit) in _PICTURES.items()
        if any(s[name] is not None for s in summaries)
    ]


def _plot(file: Path, blocks: list[int], values: list[Any], title: str, unit: str) -> Path:
    known = [(b, v) for b, v in zip(blocks, values, strict=True) if v is not None]
    numbers = [b for b, _ in known]
    marker = "." if len(known) <= _MARKED else ""
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    if isinstance(known[0][1], dict):
        low, high = ([v[q] for _, v in known] for q in ("p05", "p95"))
        axes.fill_between(numbers, low, high, alpha=0.25, step="mid", label="5% to 95%")
        axes.plot(numbers, [v["p50"] for _, v in known], linestyle=":", label="median")
        axes.plot(numbers, [v["mean"] for _, v in known], marker=marker, label="mean")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    else:
        axes.plot(numbers, [v for _, v in known], marker=marker)
    axes.set_ylim(bottom=0)
    count_along_x(axes, "block")
    axes.set_title(plain(title), fontsize="medium")
    axes.set_ylabel(unit)
    return save_figure(figure, file)
