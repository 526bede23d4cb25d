"""A run at other sizes: bytes, hours, cost, and whether the disk holds it, for N tokens.

Everything grows with the tokens; only the blocks do not: a store has at most a million of them, and
a shard at most 4 GiB. Hours are those of the teacher on these ranks; tokenising, on the CPU, comes
before it, and a run that starts again loads the teacher again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megadistill.blocks.layout import MAX_BLOCKS
from megadistill.config import Config
from megadistill.config.rules import largest_block_size
from megadistill.preflight.plan.assumptions import position
from megadistill.preflight.plan.corpus_size import target_share
from megadistill.preflight.plan.estimate import Plan, token_store_bytes
from megadistill.storage.disk import device_of, free_bytes

SIZES = tuple(10**n for n in range(6, 12))  # tokens: 1 million to 100 billion


@dataclass(frozen=True)
class Rates:
    """Rates per token. `tokens_per_s` on all ranks; None where it is not measured."""

    token_store_bytes: float
    cache_bytes: float
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Row:
    """A run over `tokens` tokens. Bytes are on disk; `fits` beside what is there already."""

    tokens: int
    sequences: int
    blocks: int
    token_store_bytes: int
    cache_bytes: int
    hours: float | None
    rank_hours: float | None
    cost: float | None
    fits: bool
    block_size_at_least: int
    block_size_at_most: int

    @property
    def block_size_note(self) -> str:
        """Returns the error in data.block_size at this size; empty where there is none."""
        least, most = self.block_size_at_least, self.block_size_at_most
        if self.blocks <= MAX_BLOCKS:
            return ""
        if least > most:
            return f"needs data.block_size >= {least}, and 4 GiB a shard hold {most}: split it"
        return f"needs data.block_size >= {least}"


def assumed_rates(config: Config, *, vocab_size: int | None) -> Rates:
    """From the assumptions alone: no pace."""
    token = token_store_bytes(config) / config.data.seq_len
    a_position = position(config.targets, vocab_size=vocab_size).bytes
    return Rates(token, token + a_position * target_share(config))


def table(config: Config, rates: Rates, *, ranks: int, price: float | None) -> Iterator[Row]:
    """A row for each of SIZES, on disks that hold nothing of it yet."""
    for tokens in SIZES:
        yield row(config, rates, tokens, ranks=ranks, price=price)


def row(
    config: Config,
    rates: Rates,
    tokens: int,
    *,
    ranks: int,
    price: float | None,
    plan: Plan | None = None,
) -> Row:
    """The run over `tokens` tokens; `plan` where it is the configured one, partly there perhaps."""
    sequences = -(-tokens // config.data.seq_len)
    hours = None if rates.tokens_per_s is None else tokens / rates.tokens_per_s / 3600
    rank_hours = None if hours is None else hours * ranks
    store, cache = round(tokens * rates.token_store_bytes), round(tokens * rates.cache_bytes)
    shares = (1.0, 1.0) if plan is None else _shares_to_come(plan)
    return Row(
        tokens=tokens,
        sequences=sequences,
        blocks=-(-sequences // config.data.block_size),
        token_store_bytes=store,
        cache_bytes=cache,
        hours=hours,
        rank_hours=rank_hours,
        cost=None if price is None or rank_hours is None else rank_hours * price,
        fits=_fits(config, round(store * shares[0]), round(cache * shares[1])),
        block_size_at_least=-(-sequences // MAX_BLOCKS),
        block_size_at_most=largest_block_size(config),
    )


def _shares_to_come(plan: Plan) -> tuple[float, float]:
    """Returns the fractions of the token store and of the cache that are not there yet."""

    def share(to_come: int | None, total: int | None) -> float:
        return 1.0 if to_come is None or not total else min(1.0, to_come / total)

    return (
        share(plan.token_bytes_to_come, plan.token_bytes),
        share(plan.cache_bytes_to_come, plan.cache_bytes),
    )


def _fits(config: Config, store: int, cache: int) -> bool:
    floor = int(config.cache.min_free * 2**30)
    first, second = config.data.dir, config.cache.folder
    if device_of(first) == device_of(second):
        return store + cache + floor <= free_bytes(second)
    return store + floor <= free_bytes(first) and cache + floor <= free_bytes(second)
