"""A step of online distillation against one from a cache, for the demo's pair.

One student's engine, one teacher; the ways to learn take turns. `teacher` is the teacher's share of
an online step: its forward passes, and making the targets, on this rank. Of methods that compare
whole distributions its head runs in the student's time.

Found with two ranks on two quiet cores, 15 rounds: varopt and topk take 2.7 times a step from the
cache, union 2.2, exact 2.6.

Shapes: none.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from megadistill.bench.rounds import ratio
from megadistill.bench.step import timed_steps
from megadistill.config import Config
from megadistill.parallel import Mesh
from megadistill.train.online.online_teacher import OnlineTeacher
from megadistill.train.run import build, prepare

METHODS = ("varopt", "topk", "union", "exact")


def online_cost(config: Config, mesh: Mesh, *, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each method, on every rank. Collective. config: of training from a cache."""
    cached = prepare(config, mesh)
    trainer = build(cached, mesh)
    runs, teachers = {"cache": cached}, {}
    for method in METHODS:
        asked = online(config, method)
        runs[method] = prepare(asked, mesh)
        teachers[method] = OnlineTeacher(asked, mesh, runs[method].stores[0])
    notes: dict[str, _Notes] = {name: _Notes() for name in runs}
    seconds = timed_steps(
        trainer, runs, mesh, rounds=rounds, teachers=teachers, reporter=notes.__getitem__
    )
    for method in METHODS:
        yield {
            "data": f"{mesh.world} ranks, teacher.engine={config.teacher.engine}",
            "method": method,
            "rounds": rounds,
            "online_s": statistics.median(seconds[method]),
            "cache_s": statistics.median(seconds["cache"]),
            **ratio(seconds[method], seconds["cache"]),
            "teacher": statistics.median(notes[method].shares[1:]),
        }


def online(config: Config, method: str) -> Config:
    """The same run with an online teacher."""
    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update={"mode": "online"}),
            "targets": config.targets.model_copy(update={"method": method}),
        }
    )


class _Notes:
    """Takes the lines of steps, as a reporter does, and keeps the teacher's share of each."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def step(self, line: dict[str, Any]) -> None:
        self.shares.append(line.get("teacher_s", 0.0) / line["step_s"])
