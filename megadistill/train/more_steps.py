"""Whether train.steps of a run that has begun may grow.

A longer run must equal one that had this length from its first step on. So nothing that a finished
step used may depend on the length: not the learning rate, not a loss weight, not the order of the
sequences.
"""

from __future__ import annotations

from megadistill.config import Config
from megadistill.train.schedule import decay_begins

STEPS = "train.steps"


def reason_against_growth(
    config: Config, others: list[str], *, old: int, new: int, done: int
) -> str | None:
    """Returns why a run of `old` steps cannot grow to `new` after `done` steps; None if it can.

    others: the other fields in which the two runs differ.
    """
    train, loss = config.train, config.loss
    if new < old:
        return "a run may become longer, not shorter"
    if config.stream_is_unbounded and others:
        # More steps read more text, and the order deals out all that is read.
        return "with teacher.mode=online the order of the sequences depends on it"
    if loss.curriculum is not None:
        return f"loss.curriculum={loss.curriculum} has its phases at fractions of the run"
    if loss.changes:
        return f"loss.{loss.changes[0]} is given by points at fractions of the run"
    if train.schedule == "cosine":
        return "with train.schedule=cosine the learning rate of every step depends on it"
    if train.schedule == "wsd" and done > decay_begins(old, train):
        return (
            f"the decay of train.schedule=wsd began after step {decay_begins(old, train)}, and the "
            f"last checkpoint is of step {done}"
        )
    return None
