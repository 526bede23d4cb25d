"""Small stores and configurations for training tests: real files, random text and targets."""

from pathlib import Path

import numpy as np

from megadistill.blocks import BlockWriter
from megadistill.cache.codec import encode_targets
from megadistill.cache.statistics import block_statistics
from megadistill.config import Config
from tests.models.made import tiny_llama
from tests.student.loss.reference import random_targets

VOCAB, SEQ_LEN = 96, 16
TOKENIZER = {"content": "0" * 64, "vocab_size": VOCAB, "bos": None, "eos": 0}


def make_store(
    path,
    *,
    method="varopt",
    sequences=24,
    block_size=8,
    vocab=VOCAB,
    seed=0,
    blocks=None,
    only_in=None,
    masked=False,
    teacher=0,
    nothing=False,
    few=False,
    notes=True,
    documents=(None,),
    words=VOCAB,
    **recipe,
):
    """A cache, or with method=None a token store; `blocks`: commit only so many.

    masked: only the end of each sequence is learned from, of a length of its own.
    teacher: stores that differ in it alone have other targets of the same tokens.
    nothing: the mask leaves out every token. few: all but one, the fourth of sequence 0.
    notes: whether topk targets have the teacher's entropy and nll.
    documents: where each sequence's documents start, in turn; None: two, at random.
    words: the tokens are ids below.
    only_in: the one sequence that holds the last id of VOCAB, in its middle.
    """
    rng = np.random.default_rng(seed)
    kind = "tokens" if method is None else "cache"
    common = {"tokenizer": TOKENIZER, "seq_len": SEQ_LEN}
    columns = {"tokens": f"ndarray:uint32:{SEQ_LEN}", "documents": "ndarray:uint32"}
    if method is not None:
        common |= {"method": method, "temperature": 1.0, "vocab_size": vocab}
        columns["targets"] = "bytes"
    if masked or nothing or few:
        columns["loss_mask"] = f"ndarray:uint8:{SEQ_LEN}"
    common |= recipe
    store = BlockWriter.create(
        path, kind=kind, header={"recipe": common}, columns=columns, block_size=block_size
    )
    store.plan(sequences)
    for block in list(range(store.num_blocks))[:blocks]:
        size = min(block_size, sequences - block * block_size)
        first = 1000 * seed + block * 50 + 1_000_000 * teacher
        drawn = [make_sample(rng, method, vocab, first + i, notes=notes) for i in range(size)]
        samples = [sample for sample, _ in drawn]
        for i, sample in enumerate(samples):
            sample["tokens"] %= words
            starts = documents[(block * block_size + i) % len(documents)]
            if starts is not None:
                sample["documents"] = np.array(starts, np.uint32)
            if masked:
                begin = rng.integers(1, SEQ_LEN)
                sample["loss_mask"] = (np.arange(SEQ_LEN) >= begin).astype(np.uint8)
            if nothing or few:
                sample["loss_mask"] = np.zeros(SEQ_LEN, np.uint8)
                sample["documents"] = np.array([0], np.uint32)
            if few and block == i == 0:
                sample["loss_mask"][3] = 1
            if only_in is not None:
                sample["tokens"][sample["tokens"] == VOCAB - 1] = 0
                if block * block_size + i == only_in:
                    sample["tokens"][SEQ_LEN // 2] = VOCAB - 1
        statistics = {}
        if method is not None:
            targets = [t for _, t in drawn]
            statistics = block_statistics(targets, [len(s["targets"]) for s in samples])
        if few:
            statistics["positions"] = int(block == 0)
        store.commit(block, samples, statistics=statistics)
    store.finish()
    return str(path)


def make_sample(rng, method, vocab, seed, *, notes=True):
    second = int(rng.integers(1, SEQ_LEN))
    sample = {
        "tokens": rng.integers(0, VOCAB, SEQ_LEN).astype(np.uint32),
        "documents": np.array([0, second], np.uint32),
    }
    if method is None:
        return sample, None
    counts = rng.integers(1, 6, SEQ_LEN)
    counts[[second - 1, SEQ_LEN - 1]] = 0
    targets = random_targets(counts, vocab, method=method, seed=seed).numpy()
    if method == "varopt":
        # As the codec wants it: equal weights for what was sampled; here all of a row is heads.
        targets = type(targets)(**{**vars(targets), "heads": counts.astype(np.int64)})
    else:
        # topk lists fall; the notes are what a teacher would have left.
        for n, (a, b) in enumerate(zip(targets.offsets[:-1], targets.offsets[1:], strict=True)):
            order = np.argsort(-targets.weights[a:b], kind="stable")
            targets.ids[a:b] = targets.ids[a:b][order]
            targets.weights[a:b] = targets.weights[a:b][order]
            if a == b:
                targets.tail[n] = 0
        kept = (
            {"entropy": np.full(SEQ_LEN, 1.5, np.float32), "nll": np.full(SEQ_LEN, 2.5, np.float32)}
            if notes
            else {}
        )
        kept["truth_added"] = np.zeros(SEQ_LEN, bool)
        targets = type(targets)(**{**vars(targets), **kept})
    return sample | {"targets": encode_targets(targets, vocab_size=vocab)}, targets


def make_config(folder, **sections):
    """A configuration over `folder`/cache and `folder`/model, both made where they are missing."""
    folder = Path(folder)
    if not (folder / "cache").exists():
        # Of this seed no gradient is by chance so near zero that Adam makes steps of its rounding.
        make_store(folder / "cache", seed=1)
    if not (folder / "model").exists():
        tiny_llama(folder / "model", vocab_size=VOCAB, hidden_size=32, intermediate_size=48)
    defaults = {
        "data": {"source": "python-stdlib", "seq_len": SEQ_LEN, "dir": str(folder / "tokens")},
        "teacher": {"model": str(folder / "teacher")},
        "cache": {"dir": str(folder / "cache")},
        "student": {"model": str(folder / "model")},
        "loss": {"ce_weight": 0.5},
        "train": {
            "out_dir": str(folder / "out"),
            "steps": 4,
            "global_batch": 8,
            "micro_batch": 2,
            "lr": 1e-2,
            "warmup_steps": 1,
            "weight_decay": 0.1,
        },
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section}
    return Config(**defaults)
