"""Reports of training runs: what is read, the tables, and the picture."""

import json

import matplotlib.image
import numpy as np
import pytest

from megadistill.errors import TrainError
from megadistill.inspect.training_plots import PANELS, _curve, _running_mean, _thinned, plot_runs
from megadistill.inspect.training_report import (
    held_out_table,
    read_run,
    read_runs,
    report,
    run_table,
)
from megadistill.storage.records import encode_json


def make_run(
    folder,
    *,
    steps=20,
    planned=20,
    seed=0,
    evaluations=(5, 10, 20),
    skipped=(),
    method="topk",
    kl=None,
):
    """A run's folder as training leaves it, with curves that fall."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_bytes(
        encode_json({"cache": {"0": {"recipe": {"method": method}}}, "train": {"steps": planned}})
    )
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        loss = 4.0 + 3.0 / step + 0.1 * rng.standard_normal()
        record = {
            "step": step,
            "loss": loss,
            "kd_loss": loss,
            "ce_loss": loss + 0.5,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "sequences": 8 * step,
            "tokens": 1024 * step,
            "tokens_per_s": 1000.0 + step,
            "data_s": 0.0,
            "step_s": 1.8,
        }
        if kl is not None:
            record["kl"] = kl + 1 / step
        if step in skipped:
            record |= {"loss": None, "kd_loss": None, "ce_loss": None, "grad_norm": None}
            record |= {"skipped": True}
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    held_out = [
        {
            "step": step,
            "loss": 4.5 + abs(step - 10) / 10 + seed,
            "perplexity": 90.0,
            "kl": 0.25,
            "top1_agreement": 0.5,
            "calibration_error": 0.031,
            "positions": 100,
            "sequences": 4,
            "teacher_loss": 4.2,
            "teacher_entropy": 4.0,
        }
        for step in evaluations
    ]
    if evaluations:
        (folder / "eval.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
    return str(folder)


def cells(table):
    """Rows of a Markdown table as lists of cells, the rule left out."""
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [[c.strip() for c in row.strip("|").split("|")] for i, row in enumerate(rows) if i != 1]


def test_a_row_says_how_far_a_run_is_what_it_reached_and_how_fast(tmp_path):
    run = read_run(make_run(tmp_path / "run", steps=20, planned=40), name="mine")
    titles, row = cells(run_table([run]))
    found = dict(zip(titles, row, strict=True))
    mean = np.mean([record["loss"] for record in run.steps[-2:]])  # a tenth of 20
    assert found == {
        "run": "`mine`",
        "steps": "20 of 40",
        "tokens": "20,480",
        "loss": f"{mean:.4f}",
        "cross-entropy": f"{mean + 0.5:.4f}",
        "tokens/s": "1,010",
        "hours": "0.01",
    }


def test_the_held_out_table_has_the_last_evaluation_and_the_lowest(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", evaluations=(5, 10))])
    table = held_out_table(runs)
    assert cells(table)[1:] == [
        ["`a`", "last", "20", "5.5000", "90.00", "0.2500", "50.0%", "0.0310"],
        ["`a`", "lowest loss", "10", "4.5000", "90.00", "0.2500", "50.0%", "0.0310"],
        ["`b`", "last", "10", "4.5000", "90.00", "0.2500", "50.0%", "0.0310"],
    ]
    assert "teacher's own loss: 4.2000." in table


def test_a_run_without_evaluations_and_one_of_an_older_version_leave_cells_empty(tmp_path):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", evaluations=())])
    for record in runs[0].evaluations:
        del record["calibration_error"]
    rows = cells(held_out_table(runs))[1:]
    assert [row[-1] for row in rows] == ["-", "-", "-"]
    assert set(rows[-1][1:]) == {"-"}
    assert "held-out" not in report([runs[1]])


def test_skipped_steps_are_counted_and_are_in_no_mean(tmp_path):
    runs = read_runs([make_run(tmp_path / "a", skipped=(3, 20)), make_run(tmp_path / "b")])
    titles, first, second = cells(run_table(runs))
    assert titles[-1] == "skipped"
    assert (first[-1], second[-1]) == ("2", "0")
    mean = np.mean([record["loss"] for record in runs[0].steps[-3:-1]])
    assert first[3] == f"{mean:.4f}"


def test_runs_are_called_by_as_little_of_their_path_as_tells_them_apart(tmp_path):
    paths = [make_run(tmp_path / name / "train") for name in ("big", "small")]
    assert [run.name for run in read_runs(paths)] == ["big/train", "small/train"]
    with pytest.raises(TrainError, match="train: is named twice"):
        read_runs([paths[0], f"{paths[0]}/../train"])


def test_what_is_no_run_is_refused_in_a_line(tmp_path):
    (tmp_path / "other").mkdir()
    empty = make_run(tmp_path / "empty", steps=0)
    for path, said in (
        (tmp_path / "nowhere", "nowhere: is no training run (there is no such folder)"),
        (tmp_path / "other", "other: is no training run (has no run.json)"),
        (empty, "empty: the run has no step yet"),
    ):
        with pytest.raises(TrainError) as caught:
            read_run(path)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_run_that_goes_on_may_be_looked_at(tmp_path):
    path = make_run(tmp_path / "run", steps=7)
    with open(f"{path}/metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    assert len(read_run(path).steps) == 7


def ink(file):
    """The picture as numbers 0 to 1, and how much of it is coloured."""
    rgb = matplotlib.image.imread(file)[..., :3]
    return rgb, float((rgb.max(-1) - rgb.min(-1) > 0.3).mean())


def test_the_picture_shows_every_run_in_its_colour(tmp_path):
    paths = [make_run(tmp_path / name, seed=i) for i, name in enumerate(("one", "two$x$"))]
    both, first = (
        ink(plot_runs(read_runs(paths[:n]), tmp_path / "out" / f"{n}.png")) for n in (2, 1)
    )
    blue, orange = ((np.array(c) / 255) for c in ((31, 119, 180), (255, 127, 14)))

    def holds(rgb, colour):
        return bool((np.abs(rgb - colour).max(-1) < 0.02).any())

    assert (holds(both[0], blue), holds(both[0], orange)) == (True, True)
    assert (holds(first[0], blue), holds(first[0], orange)) == (True, False)
    assert both[1] > first[1] > 0


def test_panels_without_figures_and_panels_that_repeat_another_are_left_out(tmp_path):
    bare = read_runs([make_run(tmp_path / "bare", evaluations=())])
    full = read_runs([make_run(tmp_path / "full")])
    heights = [ink(plot_runs(runs, tmp_path / "p.png"))[0].shape[0] for runs in (bare, full)]
    # loss (kd_loss is the same), ce_loss, norm, lr, speed: 3 rows of 2. With held-out: 9, 5 rows.
    assert heights[1] / heights[0] == pytest.approx((5 * 3.1 + 0.8) / (3 * 3.1 + 0.8), rel=0.01)


def test_a_cross_entropy_and_a_divergence_are_never_in_one_panel(tmp_path):
    runs = read_runs(
        [
            make_run(tmp_path / "listed", kl=0.5),
            make_run(tmp_path / "sampled", method="varopt", kl=0.4, seed=1),
            make_run(tmp_path / "older", method="multinomial", seed=2),
        ]
    )
    shown = {
        panel.title: [run.name for run in runs if _curve(panel, run)[1]]
        for panel in PANELS
        if panel.source == "steps" and panel.key in ("kl", "kd_loss")
    }
    assert shown == {
        "Training: KL to the teacher": ["listed", "sampled"],
        "Training: divergence that is distilled by": ["listed"],
        "Training: cross-entropy with sampled targets": ["sampled", "older"],
    }
    assert plot_runs(runs, tmp_path / "p.png").stat().st_size > 10_000
    titles, *rows = cells(run_table(runs))
    recent = 0.5 + (1 / 19 + 1 / 20) / 2
    assert [row[titles.index("KL to teacher")] for row in rows] == [
        f"{recent:.4f}",
        f"{recent - 0.1:.4f}",
        "-",
    ]


def test_many_runs_and_runs_without_a_finite_number_are_drawn_without_a_warning(tmp_path):
    paths = [make_run(tmp_path / f"r{i}", seed=i, steps=30) for i in range(12)]
    runs = read_runs(paths)
    for record in runs[0].steps:
        record["grad_norm"] = 0.0  # which a logarithmic axis cannot show
    for record in runs[1].evaluations:
        record["loss"] = float("nan")
    assert plot_runs(runs, tmp_path / "many.png").stat().st_size > 10_000
    assert "nan" in held_out_table(runs)


def test_a_long_curve_is_drawn_as_means_and_keeps_its_ends():
    x_P, y_P = np.arange(1, 4501, dtype=float), np.linspace(8.0, 2.0, 4500)
    thin_x, thin_y = _thinned(x_P, y_P)
    assert len(thin_y) == 900
    assert (thin_x[0], thin_x[-1]) == (3.0, 4498.0)
    np.testing.assert_allclose(thin_y, np.interp(thin_x, x_P, y_P))
    np.testing.assert_allclose(_running_mean(np.ones(50), 7), 1.0)
    assert _running_mean(y_P, 11)[0] == pytest.approx(y_P[:6].mean())


def test_a_long_curve_is_drawn_by_means_of_neighbours_also_at_its_end():
    x, y = _thinned(np.arange(2501.0), np.full(2501, 7.0))
    assert len(x) == 834
    assert (y == 7).all()
    assert x[:2].tolist() == [1, 4]
    assert x[-1] == (2499 + 2500) / 2
