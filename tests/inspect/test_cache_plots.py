"""Pictures of a cache: histograms count what the cache holds, and nothing stands on a frame."""

from pathlib import Path

import numpy as np
import pytest

from megadistill.cache.reader import open_cache
from megadistill.cache.statistics import combine
from megadistill.inspect import cache_plots
from megadistill.inspect.cache_plots import plot_store, position_histograms
from megadistill.inspect.cache_tables import table
from megadistill.inspect.inspection import inspect_store
from tests.blocks.stores import create, make_samples
from tests.cache.caches import fill_cache


def histograms(path: Path):
    cache = open_cache(path)
    store = cache.store
    statistics = combine([store.marker(b)["statistics"] for b in store.committed()])
    targets = [sample["targets"] for sample in cache]
    return position_histograms(statistics), targets


@pytest.mark.parametrize("method", ["varopt", "topk"])
def test_histograms_are_those_of_the_decoded_targets(tmp_path: Path, method: str) -> None:
    fill_cache(tmp_path / "cache", total=60, method=method)
    found, targets = histograms(tmp_path / "cache")
    counts = np.concatenate([t.counts for t in targets])
    has = counts > 0
    entries = found["entries_per_position"]
    assert np.diff(entries.edges) == pytest.approx(1)  # a bar for each number of entries
    for low, share in zip(entries.edges, entries.shares, strict=False):
        assert share == pytest.approx(float((counts[has] == round(low + 0.5)).mean()))
    entropies = np.concatenate([t.entropy for t in targets])[has]
    entropy = found["entropy"]
    inside, _ = np.histogram(entropies[~np.isnan(entropies)], bins=entropy.edges)
    assert entropy.shares == pytest.approx(inside / inside.sum())
    assert found["listed_mass"].shares.sum() == pytest.approx(1)
    if method == "topk":
        mass = 1 - np.concatenate([t.tail for t in targets])[has]
        bars = found["listed_mass"]
        middles = (bars.edges[:-1] + bars.edges[1:]) / 2
        # A bar is a forty-eighth wide, and a bin of the marker a 256th.
        assert float((middles * bars.shares).sum()) == pytest.approx(float(mass.mean()), abs=0.015)


def test_a_method_without_a_mass_has_no_histogram_of_it(tmp_path: Path) -> None:
    fill_cache(tmp_path / "cache", method="multinomial")
    found, _ = histograms(tmp_path / "cache")
    assert "listed_mass" not in found


@pytest.mark.parametrize("total", [4, 40], ids=["one block", "ten blocks"])
def test_what_is_drawn_keeps_off_the_frame(tmp_path: Path, total: int, monkeypatch) -> None:
    fill_cache(tmp_path / "cache", total=total)
    figures = {}

    def keep(figure, file: Path) -> Path:
        figures[file.stem] = figure
        return file

    monkeypatch.setattr(cache_plots, "save_figure", keep)
    plot_store(tmp_path / "cache", tmp_path)
    panels = {name: len(figure.axes) for name, figure in figures.items()}
    assert panels == {
        "entropy": 2,
        "listed_mass": 2,
        "entries_per_position": 2,
        "bytes_per_position": 1,
    }
    for figure in figures.values():
        for axes in figure.axes:
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            data, wide, high = axes.dataLim, right - left, top - bottom
            assert left + 0.03 * wide <= data.x0 <= data.x1 <= right - 0.03 * wide
            assert bottom + 0.03 * high <= data.y0 <= data.y1 <= top - 0.03 * high
            assert bottom < 0 < top


def test_cuts_of_an_older_token_store_are_not_called_documents(tmp_path: Path) -> None:
    counted = {"documents": 2, "cut_documents": 7}
    for name, statistics in (("old", counted), ("new", counted | {"cut_tokens": 90})):
        store = create(tmp_path / name)
        store.plan(4)
        store.commit(0, make_samples(4), statistics=statistics)
        store.finish()
    shown = {name: table(inspect_store(tmp_path / name)) for name in ("old", "new")}
    assert "cuts" in shown["old"]
    assert "cut documents" not in shown["old"]
    assert "cut documents" in shown["new"]
