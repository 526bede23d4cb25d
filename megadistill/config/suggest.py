"""Did you mean: a guess at the key that an unknown one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other trainers call it.
_ELSEWHERE = {
    "accumulation_steps": "train.global_batch",
    "batch_size": "train.global_batch",
    "clip": "train.grad_clip",
    "grad_accum": "train.global_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.grad_clip",
    "learning_rate": "train.lr",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "max_grad_norm": "train.grad_clip",
    "max_length": "data.seq_len",
    "max_seq_len": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "output_dir": "train.out_dir",
    "per_device_train_batch_size": "train.micro_batch",
    "save_steps": "train.save_every",
    "eval_steps": "train.eval_every",
    "sequence_length": "data.seq_len",
    "top_k": "targets.k",
    "tp_size": "teacher.tp",
    "warmup": "train.warmup_steps",
}


def closest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that looks most like `word`, or None."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(
    key: str, siblings: Iterable[str], *, prefix: str, all_keys: Iterable[str] = ()
) -> str:
    """`, did you mean a.b?`, or what there is to choose from.

    key        the unknown key, without the path to it
    siblings   the keys that may stand there; `prefix` is the path to them, "" at the top
    all_keys   full paths of every key, for a key that stands in the wrong section
    """
    siblings, all_keys = list(siblings), list(all_keys)
    near = closest(key, siblings, cutoff=0.7)
    if near is None:
        leaves = {path.rpartition(".")[2]: path for path in reversed(all_keys)}
        elsewhere = leaves.get(key)
        if elsewhere is None and all_keys:
            elsewhere = _ELSEWHERE.get(key)
        if elsewhere is not None:
            return f", did you mean {elsewhere}?"
        near = closest(key, siblings, cutoff=0.5)
    if near is None and all_keys:
        leaf = closest(key, leaves, cutoff=0.75)
        if leaf is not None:
            return f", did you mean {leaves[leaf]}?"
    if near is not None:
        return f", did you mean {prefix}.{near}?" if prefix else f", did you mean {near}?"
    return f", expected one of {', '.join(sorted(siblings))}"
