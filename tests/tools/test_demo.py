"""What the demo says at its end; its stages are `make demo`'s to run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from tests.cache.caches import fill_cache
from tests.inspect.test_training_report import cells, make_run
from tests.programs import program


class Stages:
    done = {"cache": {"seconds": 3.0}}  # noqa: RUF012


def test_the_report_compares_both_kinds_of_students(tmp_path: Path, monkeypatch, caplog) -> None:
    demo = program("tools/demo.py")
    monkeypatch.setattr(demo, "RUN", tmp_path)
    monkeypatch.chdir(demo.ROOT)
    fill_cache(tmp_path / "cache")
    for seed in (0, 1):
        make_run(demo.student_folder("labels", seed), seed=seed + 1)
        make_run(demo.student_folder("cache", seed), seed=seed)
    with caplog.at_level(logging.INFO, logger="demo"):
        demo.report(Stages(), seeds=2)
    summary = json.loads((tmp_path / "report.json").read_text())
    assert [(s["student"], s["seed"]) for s in summary["students"]] == [
        ("labels", 0),
        ("cache", 0),
        ("labels", 1),
        ("cache", 1),
    ]
    assert summary["gain_in_held_out_loss"] == [1.0, 1.0]  # a seed of make_run's costs a nat
    assert summary["teacher_held_out_loss"] == 4.2
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    said = [record.getMessage() for record in caplog.records]
    (table,) = [text for text in said if text.startswith("| run")]
    assert [row[0] for row in cells(table)[1::2]] == [
        "`hard labels, seed 0`",
        "`the teacher's cache, seed 0`",
        "`hard labels, seed 1`",
        "`the teacher's cache, seed 1`",
    ]
    assert "distilling lowered the held-out loss by 1.000, 1.000" in said
