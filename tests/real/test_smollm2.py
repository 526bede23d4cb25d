"""A real language model through the programs: bfloat16, 2,048 positions, documents and chats.

The truth is plain transformers on the same tokens, each document alone.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import megadistill
from tests.real.smollm2 import smollm2

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN, SEQUENCES = 2048, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus of documents, one of chats, and a small student with the model's own tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    model = smollm2()
    folder = tmp_path_factory.mktemp("real")
    texts = documents()
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Explain this.\n\n{text[:600]}"},
                {"role": "assistant", "content": text[600:2000]},
                {"role": "user", "content": "Shorter, please."},
                {"role": "assistant", "content": text[600:900]},
            ]
        }
        for text in texts
        if len(text) > 2500
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    settings = AutoConfig.from_pretrained(model)
    settings.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
        }
    )
    settings.save_pretrained(folder / "student")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "student")
    return folder


def documents() -> list[str]:
    """Technical English: the docstrings of the standard library's modules and their classes."""
    found = []
    names = "argparse asyncio collections csv datetime decimal email fractions functools heapq"
    names += " inspect json logging pathlib pickle random re statistics subprocess tarfile"
    for name in names.split():
        module = __import__(name)
        parts = [inspect.getdoc(module)]
        for _, member in sorted(vars(module).items(), key=lambda item: item[0]):
            if inspect.isclass(member) or inspect.isroutine(member):
                parts.append(inspect.getdoc(member))
        text = "\n\n".join(dict.fromkeys(part for part in parts if part))
        found.append(f"{name}\n\n{text}")
    return found


def run(place: Path, program: str, name: str, **sections) -> str:
    """What a program of launch/ prints, which must end with code 0."""
    base = {
        "data": {
            "files": ["documents.jsonl"],
            "dir": f"{name}-tokens",
            "seq_len": SEQ_LEN,
            "block_size": 2,
            "shuffle": False,
            "workers": 1,
        },
        "teacher": {"model": str(smollm2()), "engine": "tensor_parallel", "micro_batch": 1},
        "cache": {"dir": f"{name}-cache", "min_free": 0},
    }
    for section, keys in sections.items():
        base[section] = base.get(section, {}) | keys
    (place / f"{name}.yaml").write_text(yaml.safe_dump(base))
    command = [sys.executable, ROOT / "launch" / f"{program}.py", "--config", f"{name}.yaml"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.bfloat16).eval()
    torch.set_num_threads(2)
    yield model
    torch.set_num_threads(1)


def plain_log_probs(model, sample) -> torch.Tensor:
    """float32 [T, V]: every document of a sequence on its own."""
    tokens = torch.from_numpy(sample["tokens"].astype(np.int64))
    starts = [int(start) for start in sample["documents"]]
    with torch.no_grad():
        rows = [
            model(tokens[None, first:last]).logits[0].float()
            for first, last in zip(starts, [*starts[1:], len(tokens)], strict=True)
        ]
    return torch.log_softmax(torch.cat(rows), 1)


def test_the_nll_in_caches_of_documents_is_plain_transformers(place, plain, capsys):
    for method in ("varopt", "topk"):
        said = run(
            place,
            "generate",
            method,
            data={"max_samples": 12, "dir": "documents-tokens"},
            targets={"method": method},
        )
        with capsys.disabled():
            sys.stdout.write("\n" + next(x for x in said.splitlines() if "compared with" in x))
        cache = megadistill.open_cache(place / f"{method}-cache")
        assert len(cache) >= SEQUENCES
        apart, sizes = [], []
        for number in range(SEQUENCES):
            sample = cache[number]
            log_probs = plain_log_probs(plain, sample)
            targets = sample["targets"]
            next_T = torch.from_numpy(np.roll(sample["tokens"], -1).astype(np.int64))
            expected = -log_probs.gather(1, next_T[:, None])[:, 0].numpy()
            counted = np.diff(targets.offsets) > 0
            difference = np.where(counted, targets.nll - expected, np.nan)
            apart.append(difference.reshape(4, -1))
            sizes.append(np.nansum(counted))
            if method == "topk":
                check_topk(targets, log_probs, counted)
        quarters = np.nanmean(np.stack(apart), axis=(0, 2))
        with capsys.disabled():
            sys.stdout.write(f"\n{method}: mean nll - plain by quarter: {quarters}\n")
        assert (np.abs(quarters) <= 0.01).all()


def check_topk(targets, log_probs: torch.Tensor, counted: np.ndarray) -> None:
    """The listed ids are nearly those of plain transformers, their probabilities its own."""
    position = np.repeat(np.arange(len(counted)), np.diff(targets.offsets))
    own = log_probs[position, targets.ids.astype(np.int64)].numpy()
    apart = np.abs(targets.weights - np.exp(own))
    assert apart.mean() < 0.002


def test_only_what_the_assistant_says_is_cached_of_chats(place, plain):
    run(place, "generate", "chats", data={"files": ["chats.jsonl"], "max_samples": 8})
    cache = megadistill.open_cache(place / "chats-cache")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    sample = cache[0]
    text = tokenizer.decode(sample["tokens"])
    assert "<|im_start|>assistant" in text
    counted = np.diff(sample["targets"].offsets) > 0
    mask = np.roll(sample["loss_mask"], -1).astype(bool)
    assert counted[~mask].sum() == 0
    assert 0.1 < counted.mean() < 0.9
    learned = tokenizer.decode(sample["tokens"][1:][counted[:-1]])
    assert "Explain this." not in learned
    assert "<|im_end|>" in learned


def test_a_small_student_learns_from_it_and_is_exported(place):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run(
        place,
        "train",
        "varopt",
        data={"max_samples": 12, "dir": "documents-tokens"},
        targets={"method": "varopt"},
        student={"model": "student", "init": "random"},
        train={"out_dir": "run", "steps": 4, "global_batch": 2, "micro_batch": 1, "lr": 1e-3},
        deepspeed={"zero_optimization": {"stage": 3}},
    )
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    model = AutoModelForCausalLM.from_pretrained(place / "run/model")
    tokenizer = AutoTokenizer.from_pretrained(place / "run/model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**ids, max_new_tokens=4).shape[1] > ids["input_ids"].shape[1]
