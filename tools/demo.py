"""The whole path on real text, on this machine: `make demo`.

Trains a tokenizer and a small teacher on the Python standard library, writes a cache of the
teacher's targets on two ranks, trains two equal students for the same number of steps, one on hard
labels alone and one from the cache, and compares them on text that nobody trained on.

Every stage is a command that is printed before it runs; a stage that is complete is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megadistill.inspect.training_report import RunRecords

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/demo")
VOCAB, SEQ_LEN = 4096, 128
TEACHER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "heads": 6}
STUDENT = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "heads": 4}
RANKS = 2

log = logging.getLogger("demo")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="students of each kind to train")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="a.b=c",
        dest="overrides",
        help="overrides for every stage (for a smaller demo)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    # As the programs do for themselves; said here, DeepSpeed's launcher need not guess, and warn.
    from megadistill import parallel

    parallel.choose_accelerator()
    RUN.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        stages = Stages(arguments.overrides)
        build(stages, arguments.seeds)
    except subprocess.CalledProcessError as error:
        log.error("the demo stopped: %s (exit code %d)", shlex_join(error.cmd), error.returncode)
        log.error("`make demo` resumes from here; `rm -r %s` and it starts anew", RUN)
        return 1
    report(stages, arguments.seeds)
    log.info("\nall of it took %.0f s; what lies where: %s/", time.monotonic() - started, RUN)
    return 0


def build(stages: Stages, seeds: int) -> None:
    stages.function("tokenizer", "train a BPE tokenizer on the standard library", make_models)
    hard = ["loss.kd_weight=0", "loss.ce_weight=1"]
    stages.python(
        "teacher text",
        "tools/make_tokens.py",
        "data.max_samples=null",
        f"data.dir={RUN}/teacher_tokens",
    )
    stages.deepspeed(
        "teacher",
        "launch/train.py",
        *hard,
        f"cache.dir={RUN}/teacher_tokens",
        f"student.model={RUN}/teacher_init",
        f"train.out_dir={RUN}/teacher_run",
        "train.steps=350",
        "train.lr=3e-3",
        "train.micro_batch=8",
        "train.eval_every=1000",
        "eval.cache=null",
    )
    stages.function("teacher export", "the trained teacher becomes runs/demo/teacher", use_teacher)
    stages.deepspeed("cache", "launch/generate.py")
    stages.deepspeed(
        "held-out cache",
        "launch/generate.py",
        "data.split=validation",
        "data.max_samples=12",
        f"data.dir={RUN}/heldout_tokens",
        f"cache.dir={RUN}/heldout",
        "targets.method=topk",
    )
    stages.python("inspect", "tools/inspect_cache.py", cache=True)
    for seed in range(seeds):
        run = [f"train.seed={seed}", f"order.seed={seed}"]
        for name, loss in (("labels", hard), ("cache", [])):
            stages.deepspeed(
                f"student from {name}, seed {seed}",
                "launch/train.py",
                *loss,
                *run,
                f"train.out_dir={student_folder(name, seed)}",
            )


def student_folder(name: str, seed: int) -> Path:
    return RUN / f"student_{name}_{seed}"


class Stages:
    """Runs each stage once: what it did is remembered with its command line in stages.json."""

    def __init__(self, overrides: list[str]) -> None:
        self.overrides, self.file, self.chain = overrides, RUN / "stages.json", ""
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}

    def deepspeed(self, name: str, script: str, *overrides: str) -> None:
        launcher = Path(sys.executable).parent / "deepspeed"
        self._command(name, [str(launcher), "--quiet", "--num_gpus", str(RANKS), script], overrides)

    def python(self, name: str, script: str, *overrides: str, cache: bool = False) -> None:
        if cache:
            self._run(name, [sys.executable, script, str(RUN / "cache")])
        else:
            self._command(name, [sys.executable, script], overrides)

    def _command(self, name: str, command: list[str], overrides: tuple[str, ...]) -> None:
        self._run(name, [*command, "--config", "demo.yaml", *overrides, *self.overrides])

    def _run(self, name: str, command: list[str]) -> None:
        shown = shlex_join(command)

        def run() -> None:
            subprocess.run(command, check=True)

        self.function(name, shown, run)

    def function(self, name: str, shown: str, run) -> None:
        # A stage stands on those before it: its key holds theirs.
        key = self.chain = hashlib.sha256((self.chain + shown).encode()).hexdigest()[:16]
        if self.done.get(name, {}).get("key") == key:
            log.info("== %s: done already (%.0f s)", name, self.done[name]["seconds"])
            return
        log.info("\n== %s\n   %s", name, shown)
        started = time.monotonic()
        run()
        self.done[name] = {"key": key, "seconds": round(time.monotonic() - started, 1)}
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=1))
        temporary.replace(self.file)


def shlex_join(command: list[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])


def make_models() -> None:
    """The tokenizer, and the two models' shapes: folders with config.json and tokenizer only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from megadistill.config import load_config
    from megadistill.data.sources.source import documents

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = load_config("demo.yaml", ["data.max_samples=null"]).data
    pieces = (
        unit.text or ""
        for number, document in enumerate(documents(corpus))
        for unit in document.units(number)
    )
    tokenizer.train_from_iterator(pieces, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    for folder, shape in (("teacher_init", TEACHER), ("student_init", STUDENT)):
        sizes = {key: value for key, value in shape.items() if key != "heads"}
        LlamaConfig(
            vocab_size=VOCAB,
            num_attention_heads=shape["heads"],
            bos_token_id=None,
            num_key_value_heads=shape["heads"],
            max_position_embeddings=SEQ_LEN,
            eos_token_id=0,
            pad_token_id=0,
            tie_word_embeddings=True,
            initializer_range=0.05,
            architectures=["LlamaForCausalLM"],
            **sizes,
        ).save_pretrained(RUN / folder)
        fast.save_pretrained(RUN / folder)


def use_teacher() -> None:
    target = RUN / "teacher"
    if target.exists():
        shutil.rmtree(target)
    shutil.copytree(RUN / "teacher_run" / "model", target)


def report(stages: Stages, seeds: int) -> None:
    """The comparison: a table on the terminal, report.json and report.png in the run's folder."""
    from megadistill.inspect.training_report import held_out_table

    inspected = subprocess.run(
        [sys.executable, "tools/inspect_cache.py", str(RUN / "cache"), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    cache = json.loads(inspected.stdout)
    runs = students_runs(seeds)
    students = [
        {"student": ("labels", "cache")[i % 2], "seed": i // 2, **run.evaluations[-1]}
        for i, run in enumerate(runs)
    ]
    gains = [
        labels["loss"] - cached["loss"]
        for labels, cached in zip(students[::2], students[1::2], strict=True)
    ]
    summary = {
        "students": students,
        "teacher_held_out_loss": students[0]["teacher_loss"],
        "gain_in_held_out_loss": gains,
        "cache": {
            key: cache[key]
            for key in ("num_positions", "entries_per_position", "bytes_per_position", "entropy")
        },
        "seconds": {name: stage["seconds"] for name, stage in stages.done.items()},
    }
    (RUN / "report.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(runs)
    log.info("\nheld-out text (nobody trained on it), equal steps, equal start:\n")
    log.info("%s", held_out_table(runs))
    log.info(
        "\nthe cache: %d positions, %.1f entries and %.1f bytes per token",
        cache["num_positions"],
        cache["entries_per_position"],
        cache["bytes_per_position"],
    )
    log.info("distilling lowered the held-out loss by %s", ", ".join(f"{g:.3f}" for g in gains))
    log.info("\nstage                        seconds")
    for name, seconds in summary["seconds"].items():
        log.info("%-28s %7.0f", name, seconds)
    log.info("\n%s/report.json, %s/report.png", RUN, RUN)


def students_runs(seeds: int) -> list[RunRecords]:
    """The students' runs, for each seed that on hard labels and that from the cache."""
    from megadistill.inspect.training_report import read_run

    return [
        read_run(student_folder(kind, seed), name=f"{title}, seed {seed}")
        for seed in range(seeds)
        for kind, title in (("labels", "hard labels"), ("cache", "the teacher's cache"))
    ]


def plot(runs: list[RunRecords]) -> None:
    """The held-out curves of all students, a colour for either kind."""
    from megadistill.inspect.training_plots import HELD_OUT_PANELS, plot_runs

    kinds = [dataclasses.replace(run, name=run.name.partition(", seed")[0]) for run in runs]
    plot_runs(kinds, RUN / "report.png", panels=HELD_OUT_PANELS)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    sys.exit(main())
