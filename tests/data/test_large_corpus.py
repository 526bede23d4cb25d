"""A streamed corpus much larger than the memory it is allowed, with a kill in the middle.

Run by itself it makes the corpus and prints the figures:

    python -m tests.data.test_large_corpus FOLDER MEGABYTES
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from megadistill.config import Config, DataConfig
from megadistill.data.sources.source import documents
from tests.data.stores import same_store
from tests.models.made import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# Imports everything that the run will import before it says that it starts.
PROGRAM = """
import logging, sys
import datasets, transformers
from megadistill.blocks.mds import load_streaming
from megadistill.config import Config
from megadistill.data.tokens import build_tokens
load_streaming()
logging.basicConfig(level=logging.INFO, format="%(message)s")
build_tokens(Config.model_validate_json(sys.argv[1]), progress=False)
"""


def write_corpus(path: Path, *, megabytes: float) -> int:
    """Stretches of the standard library of many lengths, some of them a megabyte; documents."""
    text = "".join(d.text or "" for d in documents(DataConfig(source="python-stdlib")))
    draw = random.Random(0)
    written = count = 0
    with path.open("w") as file:
        while written < megabytes * 1e6:
            length = 1_000_000 if draw.random() < 1e-4 else int(draw.expovariate(1 / 4000))
            begin = draw.randrange(len(text))
            written += file.write(json.dumps({"id": count, "text": text[begin : begin + length]}))
            written += file.write("\n")
            count += 1
    return count


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its children: pages that several share count once."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue  # it ended meanwhile
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
    return total


def run(config: Config, *, kill_at_block: int | None = None) -> tuple[int, int]:
    """(memory when tokenising starts, the most of it afterwards), in bytes."""
    command = [sys.executable, "-c", PROGRAM, config.model_dump_json()]
    log = Path(f"{config.data.dir}.log")
    marker = Path(config.data.dir, "blocks", f"{kill_at_block or 0:06d}.json")
    with log.open("w") as stderr:
        child = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
    process, children = psutil.Process(child.pid), []
    start = peak = 0
    try:
        while child.poll() is None:
            if start == 0 and "processes" in log.read_text():
                start, children = memory(process), process.children()
            if start:
                peak = max(peak, memory(process))
            if kill_at_block is not None and marker.exists():
                child.send_signal(signal.SIGKILL)
                child.wait()
                _, alive = psutil.wait_procs(children, timeout=20)
                assert not alive, "tokenising processes outlived the run"
                return start, peak
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, log.read_text()
    return start, peak


def settings(folder: Path, name: str, *, count: int, tokenizer: str) -> Config:
    data = {"files": [str(folder / "corpus.jsonl")], "streaming": True, "max_samples": count}
    data |= {"seq_len": 1024, "block_size": 64, "workers": 2, "dir": str(folder / name)}
    return Config(data=data, teacher={"model": tokenizer})


def check(folder: Path, *, megabytes: float, vocab_size: int) -> dict[str, float]:
    """Tokenise undisturbed, then killed once and resumed; the figures."""
    count = write_corpus(folder / "corpus.jsonl", megabytes=megabytes)
    tokenizer = tiny_tokenizer(folder / "tokenizer", vocab_size=vocab_size)
    config = partial(settings, folder, count=count, tokenizer=tokenizer)
    begun = time.monotonic()
    start, peak = run(config("undisturbed"))
    seconds = time.monotonic() - begun
    blocks = len(list(Path(folder, "undisturbed", "blocks").iterdir()))
    run(config("resumed"), kill_at_block=blocks // 2)
    done = len(list(Path(folder, "resumed", "blocks").iterdir()))
    assert blocks // 2 < done < blocks
    _, peak_resumed = run(config("resumed"))
    assert same_store(folder / "undisturbed", folder / "resumed")
    return {
        "documents": count,
        "blocks": blocks,
        "killed_after_blocks": done,
        "start_mb": start / 1e6,
        "peak_over_start_mb": (peak - start) / 1e6,
        "resumed_peak_over_start_mb": (peak_resumed - start) / 1e6,
        "seconds": seconds,
        "mb_per_s": megabytes / seconds,
    }


def test_a_streamed_corpus_is_tokenised_in_bounded_memory(tmp_path):
    count = write_corpus(tmp_path / "corpus.jsonl", megabytes=6)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer", vocab_size=512)
    start, peak = run(settings(tmp_path, "tokens", count=count, tokenizer=tokenizer))
    assert peak - start <= 300e6


@pytest.mark.long
def test_a_gigabyte_of_streamed_text_takes_at_most_300_mb_over_the_start(tmp_path):
    figures = check(tmp_path, megabytes=1000, vocab_size=4096)
    sys.stdout.write(json.dumps(figures, indent=1))  # pytest shows it with -rP
    assert figures["peak_over_start_mb"] <= 300
    assert figures["resumed_peak_over_start_mb"] <= 300


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True)
    figures = check(place, megabytes=float(sys.argv[2]), vocab_size=4096)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
