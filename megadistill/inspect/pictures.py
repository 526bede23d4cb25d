"""Pictures without a display: PNG files drawn with matplotlib, which is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.errors import StoreError


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, whose parts make room for one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def leave_air(axes: Any, *, zero: bool = False) -> None:
    """Keep what is drawn off the frame, by a twentieth of its height and width.

    zero  the y axis has 0 in it, and as much room below
    """
    axes.use_sticky_edges = False  # bars and bands would stand on the frame
    axes.margins(0.05)
    axes.autoscale_view()
    if zero:
        low, high = axes.dataLim.y0, axes.dataLim.y1
        low, high = min(low, 0.0), max(high, 0.0)
        room = 0.05 * (high - low or 1.0)
        axes.set_ylim(low - room, high + room)


def count_along_x(axes: Any, what: str) -> None:
    """Whole numbers of `what` along the x axis, and a faint grid. After leave_air."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel(what)
    if axes.dataLim.width <= 1:  # one point: whole numbers to its left and right
        middle = (axes.dataLim.x0 + axes.dataLim.x1) / 2
        axes.set_xlim(middle - 1.2, middle + 1.2)


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
