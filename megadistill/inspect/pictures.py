"""Pictures without a display: PNG files drawn with matplotlib, which is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.errors import StoreError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, whose parts make room for one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def count_along_x(axes: Any, what: str) -> None:
    """Whole numbers of `what` along the x axis, and a faint grid."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(what)


def plain(text: str) -> str:
    """`text` as it stands: a dollar sign in a path would begin a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Any, file: Path) -> Path:
    """Write the PNG; its file. StoreError where that fails."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise StoreError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file
