"""Kills over generating, and what must be true after each.

A series begins in an empty folder: run, kill at a random time, run again at another number of
ranks, kill again, until a run gets through. Then the folder must be, byte for byte, that of an
undisturbed run. After every kill the blocks that were begun and are not committed are counted for
each dp group: those are computed again, and at most two may be.

Ranks are forked from a warm server on the same entry point as `deepspeed launch/generate.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

from megadistill.blocks.layout import MARKER_NAME
from megadistill.parallel.ranks import rank_from_environment
from tests.forked import Ranks
from tests.models.made import tiny_model
from tests.programs import program

ROOT = Path(__file__).resolve().parent.parent.parent
STOP_S = 20  # all ranks leave within so long of one's death
RUN_S = 240  # a run that takes longer hangs
LAYOUTS = {  # keys that belong to the recipe, and the numbers of ranks they allow
    "tp1": (["teacher.tp=1"], [1, 2, 3, 4]),
    "tp2": (["teacher.tp=2"], [2, 4]),
    "zero3": (["teacher.engine=zero3"], [1, 2, 3, 4]),
}
WEIGHTS = {"tp1": 14, "tp2": 3, "zero3": 3}
ALL, ONE, TOLD = "all at once", "one", "one, the others are told"
AT_ONCE = "one, the next run begins before the others have left"
HOW = (ALL, ONE, TOLD, AT_ONCE)


@dataclass
class Kill:
    """What was killed, when, and what it cost."""

    series: int
    layout: str
    world: int
    how: str
    after_s: float
    phase: str
    committed: int
    again: int  # blocks begun and not committed, the most of any dp group
    left_s: float  # until the survivors had left

    def __str__(self) -> str:
        return (
            f"series {self.series} {self.layout} world {self.world}: {self.how} after "
            f"{self.after_s:.2f} s, {self.phase} ({self.committed} blocks committed), "
            f"{self.again} again, gone in {self.left_s:.1f} s"
        )


@dataclass
class Chaos:
    """Series of kills under `folder`, decided by `seed`."""

    corpus: Path
    folder: Path
    seed: int
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    kills: list[Kill] = field(default_factory=list)
    survivors: list[Ranks] = field(default_factory=list)
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    series: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def run(self, kills: int) -> list[Kill]:
        """Series until so many kills have hit; what they did. AssertionError names the folder."""
        while len(self.kills) < kills:
            self.series += 1
            layout = self.random.choice(
                [name for name in self.layouts for _ in range(WEIGHTS[name])]
            )
            folder = self.folder / f"series-{self.series}"
            folder.mkdir(parents=True)
            if self.random.random() < 0.5:  # else tokenising is killed, too
                shutil.copytree(self.corpus / "tokens", folder / "tokens")
            attempt = 0
            while not self.attempt(folder, layout, attempt):
                attempt += 1
            self.bury(folder)
            self.compare(folder, layout)
            shutil.rmtree(folder)
        return self.kills

    def attempt(self, folder: Path, layout: str, attempt: int) -> bool:
        """One run, killed at a random time; True where it was through before that."""
        world = self.random.choice(LAYOUTS[layout][1])
        delay = self.random.uniform(0, self.length(layout))
        how = self.random.choice(HOW)
        victim = self.random.randrange(world) if how is not AT_ONCE else 0
        notes = folder / f"run-{attempt}"
        ranks = start(self.corpus, folder, layout, world, notes)
        self.survivors.append(ranks)
        ranks.wait(delay)
        self.check_codes(ranks, folder, {0, None})
        if None not in ranks.codes:
            return True
        joined = len(list(notes.glob("joined-*"))) == world
        for rank in range(world) if how is ALL else [victim]:
            ranks.processes[rank].kill()
        began = time.monotonic()
        if how is TOLD or not joined:
            for process in ranks.processes:  # DeepSpeed's launcher does, within a second
                process.join(self.random.uniform(0, 0.3))
                process.terminate()
        if how is not AT_ONCE or not joined:
            self.bury(folder)
        committed = markers(folder / "cache")
        lost = [len(begun(note) - committed) for note in notes.glob("begun-*")]
        kill = Kill(
            series=self.series,
            layout=layout,
            world=world,
            after_s=delay,
            how=f"{how} (rank {victim})" if how is not ALL else ALL,
            phase=self.phase(folder, layout, committed),
            committed=len(committed),
            again=max(lost, default=0),
            left_s=time.monotonic() - began,
        )
        self.add(kill)
        return False

    def add(self, kill: Kill) -> None:
        self.kills.append(kill)
        with (self.folder / "kills.log").open("a") as file:
            file.write(f"{kill}\n")
        folder = self.folder / f"series-{self.series}"
        assert kill.again <= 2, self.failure(folder, f"too much is lost: {kill}")

    def summary(self) -> str:
        """What was killed, a line each, under a line that adds it up."""
        phases = dict(Counter(kill.phase for kill in self.kills))
        again = max(kill.again for kill in self.kills)
        head = f"seed {self.seed}: {len(self.kills)} kills in {self.series} series, {phases}, "
        return "\n".join([f"\n{head}at most {again} blocks again", *map(str, self.kills), ""])

    def bury(self, folder: Path) -> None:
        """Wait until the survivors of a kill have left, each with a code that says why."""
        for ranks in self.survivors:
            ranks.wait(STOP_S)
            # 2: it could not meet the others, or the next run had taken its lock.
            self.check_codes(ranks, folder, {0, 1, 2, 143, -SIGKILL, -SIGTERM})
            assert "Traceback" not in ranks.said(), self.failure(folder, ranks.said())
        self.survivors.clear()

    def phase(self, folder: Path, layout: str, committed: set[int]) -> str:
        if not (folder / "tokens" / "index.json").exists():
            return "tokenising"
        if not committed:
            return "before the first commit"
        return "when finishing" if len(committed) == self.blocks(layout) else "in the middle"

    def blocks(self, layout: str) -> int:
        self.reference(layout)
        return len(markers(self.corpus / layout / "cache"))

    def length(self, layout: str) -> float:
        """Seconds that the undisturbed run took."""
        self.reference(layout)
        return float((self.corpus / layout / "seconds").read_text())

    def reference(self, layout: str) -> dict[str, str]:
        """The files of the undisturbed run; made once, by as few ranks as can be."""
        if layout not in self.references:
            folder = self.corpus / layout
            if not (folder / "seconds").exists():
                began = time.monotonic()
                self.finish(folder, layout, LAYOUTS[layout][1][0])
                (folder / "seconds").write_text(str(time.monotonic() - began))
            self.references[layout] = files(folder)
        return self.references[layout]

    def finish(self, folder: Path, layout: str, world: int) -> None:
        """A run that nobody disturbs."""
        with start(self.corpus, folder, layout, world, folder / "notes") as ranks:
            ranks.wait(RUN_S)
            self.check_codes(ranks, folder, {0})

    def compare(self, folder: Path, layout: str) -> None:
        found, expected = files(folder), self.reference(layout)
        different = sorted(n for n in found.keys() | expected if found.get(n) != expected.get(n))
        assert not different, self.failure(folder, f"differs from an undisturbed run: {different}")
        left = [str(p) for p in folder.glob("*.run/*") if p.name == "tmp" and any(p.iterdir())]
        assert not left, self.failure(folder, f"temporary files are left: {left}")

    def check_codes(self, ranks: Ranks, folder: Path, allowed: set[int | None]) -> None:
        codes = ranks.codes
        assert set(codes) <= allowed, self.failure(folder, f"exit codes {codes}\n{ranks.said()}")

    def failure(self, folder: Path, message: str) -> str:
        return f"seed {self.seed}, kept in {folder}: {message}\n" + "\n".join(map(str, self.kills))


def make_corpus(folder: Path) -> Path:
    """A teacher with its tokenizer, a corpus of some 60 blocks, and its tokens."""
    from megadistill.config import load_config
    from megadistill.data.tokens import build_tokens

    tiny_model(folder / "teacher")
    text = "\n".join(p.read_text() for p in sorted((ROOT / "megadistill").glob("*/*.py"))[:12])
    documents = [text[i : i + 400] for i in range(0, 32_000, 400)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": d}) for d in documents))
    (folder / "config.yaml").write_text(
        json.dumps(
            {
                "data": {
                    "files": [str(folder / "text.jsonl")],
                    "seq_len": 32,
                    "block_size": 8,
                    "workers": 1,
                },
                "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "micro_batch": 4},
                "targets": {"tau": 0.1},
                "cache": {"min_free": 0},
            }
        )
    )
    build_tokens(load_config(str(folder / "config.yaml"), [f"data.dir={folder / 'tokens'}"]))
    return folder


def arguments(corpus: Path, folder: Path, layout: str) -> list[str]:
    """The command line of launch/generate.py."""
    return [
        "--config",
        str(corpus / "config.yaml"),
        f"data.dir={folder / 'tokens'}",
        f"cache.dir={folder / 'cache'}",
        *LAYOUTS[layout][0],
    ]


def start(corpus: Path, folder: Path, layout: str, world: int, notes: Path) -> Ranks:
    argv = arguments(corpus, folder, layout)
    return Ranks(world, "tests.chaos.harness:generate", argv, str(notes), folder=notes)


def generate(argv: list[str], notes: str) -> int:
    """What a forked rank runs: launch/generate.py, writing down which blocks it begins."""
    from megadistill.cache import build
    from megadistill.cli.command_line import run

    rank, _, _ = rank_from_environment()
    take_notes(build, Path(notes), rank)
    return run(program("launch/generate.py").main, argv)


def take_notes(build: Any, notes: Path, rank: int) -> None:
    """joined-R once rank R stands among the others; begun-R a line for each block it begins."""
    build_cache, score = build.build_cache, build.score

    def noting_build(config: Any, mesh: Any, **settings: Any) -> Any:
        (notes / f"joined-{rank}").touch()
        return build_cache(config, mesh, **settings)

    def noting_score(config: Any, teacher: Any, samples: Any, **where: Any) -> Any:
        size = where["block_size"]
        if samples and size == config.data.block_size:  # else it is validation, or padding
            with (notes / f"begun-{rank}").open("a") as file:
                file.write(f"{where['first'] // size}\n")
        return score(config, teacher, samples, **where)

    build.build_cache, build.score = noting_build, noting_score


def begun(note: Path) -> set[int]:
    return set(map(int, note.read_text().split()))


def markers(store: Path) -> set[int]:
    folder = store / "blocks"
    names = os.listdir(folder) if folder.is_dir() else []
    return {int(name[:6]) for name in names if MARKER_NAME.fullmatch(name)}


def files(folder: Path) -> dict[str, str]:
    """What is in the two stores: name to hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for store in ("tokens", "cache")
        for path in sorted((folder / store).rglob("*"))
        if path.is_file()
    }
