"""Pictures of a cache over its blocks: what the teacher was sure of, and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks import BlockStore
from megadistill.cache.statistics import summary
from megadistill.errors import StoreError

_PICTURES = {
    "entropy": "teacher's entropy, nats",
    "listed_mass": "listed mass",
    "entries_per_position": "entries a position",
    "bytes_per_position": "bytes a position",
}


def plot_store(path: str | Path, folder: str | Path) -> list[Path]:
    """Write a PNG for each quantity that the cache has; returns the files.

    Lines are means; where there are quantiles, the band goes from 5 to 95 percent. StoreError for
    a token store, which has nothing to show, and for an empty one.
    """
    store = BlockStore.open(path)
    if store.kind != "cache":
        raise StoreError(f"{path}: is a token store, and has no targets to plot")
    blocks = store.committed()
    if not blocks:
        raise StoreError(f"{path}: has no committed block to plot")
    summaries = [summary(store.marker(b)["statistics"]) for b in blocks]
    out = Path(folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [
            _plot(out / f"{name}.png", blocks, [s[name] for s in summaries], label)
            for name, label in _PICTURES.items()
            if any(s[name] is not None for s in summaries)
        ]
    except OSError as error:
        raise StoreError(f"{folder}: cannot write pictures: {error.strerror or error}") from error


def _plot(file: Path, blocks: list[int], values: list[Any], label: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = [(b, v) for b, v in zip(blocks, values, strict=True) if v is not None]
    numbers = [b for b, _ in known]
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if isinstance(known[0][1], dict):
        low, high = ([v[q] for _, v in known] for q in ("p05", "p95"))
        axes.fill_between(numbers, low, high, alpha=0.25, step="mid", label="5 to 95 percent")
        axes.plot(numbers, [v["p50"] for _, v in known], linestyle=":", label="median")
        axes.plot(numbers, [v["mean"] for _, v in known], marker=".", label="mean")
        axes.legend()
    else:
        axes.plot(numbers, [v for _, v in known], marker=".")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel(label)
    figure.savefig(file, dpi=120)
    return file
