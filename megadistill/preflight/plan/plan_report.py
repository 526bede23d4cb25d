"""Report of tools/plan.py: for people, and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megadistill.config import Config
from megadistill.preflight.plan import corpus_size
from megadistill.preflight.plan.estimate import Plan
from megadistill.preflight.plan.sizes import Rates, Row, row, table
from megadistill.storage.disk import free_bytes, readable_bytes

if TYPE_CHECKING:
    from megadistill.preflight.plan.measure import Measured


@dataclass(frozen=True)
class Report:
    """A run at all sizes, by what was measured, or by `rates` alone where nothing was run."""

    config: Config
    plan: Plan
    ranks: int
    rates: Rates
    measured: Measured | None = None
    price: float | None = None
    currency: str = "USD"

    @property
    def rows(self) -> list[Row]:
        """Returns a row for each size."""
        return list(table(self.config, self.rates, ranks=self.ranks, price=self.price))

    @property
    def own(self) -> Row | None:
        """The configured run; None where its size is not known."""
        if self.plan.sequences is None:
            return None
        tokens = corpus_size.tokens(self.config.data, self.plan.sequences)
        return row(
            self.config, self.rates, tokens, ranks=self.ranks, price=self.price, plan=self.plan
        )

    def as_json(self) -> dict[str, Any]:
        """Returns a JSON object: numbers only, null for what is not known."""
        return {
            "ranks": self.ranks,
            "price": self.price,
            "currency": self.currency,
            "measured": None if self.measured is None else dataclasses.asdict(self.measured),
            "rates": dataclasses.asdict(self.rates),
            "free_bytes": free_bytes(self.config.cache.folder),
            "this_run": None if self.own is None else dataclasses.asdict(self.own),
            "sizes": [dataclasses.asdict(r) for r in self.rows],
        }

    def as_text(self) -> str:
        """Lines for people."""
        price = "" if self.price is None else f" at {self.price:g} {self.currency} a rank-hour"
        text = f"{self._found()}\nby size, on {self.ranks} rank(s){price}:\n"
        text += _table(self.rows, currency=self.currency)
        text += f"\nthis configuration: {dict(self.plan.lines)['sequences']}\n"
        return text + (_table([self.own], currency=self.currency) if self.own else "")

    def _found(self) -> str:
        m, rates = self.measured, self.rates
        a_token = (
            f"{rates.cache_bytes:.2f} bytes a token in the cache, {rates.token_store_bytes:.2f} in "
            "the token store\n"
        )
        if m is None:
            return f"assumed, nothing was run: {a_token}"
        return (
            f"measured on {m.ranks} rank(s), {m.blocks} block(s) of {m.block_sequences} x "
            f"{self.config.data.seq_len} tokens:\n"
            f"  {m.tokens_per_s:,.0f} tokens/s on all ranks together, "
            f"{m.tokens_per_s / m.ranks:,.0f} a rank\n"
            f"  {self.config.targets.method}: {m.entries_per_position:.2f} entries and "
            f"{m.bytes_per_position:.2f} bytes per token\n  {a_token}"
        )


def _table(rows: list[Row], *, currency: str) -> str:
    head = ["tokens", "sequences", "blocks", "token store", "cache", "hours", "rank-hours"]
    head += ["cost", "disk"]
    body = [
        [
            _tokens(r.tokens),
            f"{r.sequences:,}",
            f"{r.blocks:,}",
            readable_bytes(r.token_store_bytes),
            readable_bytes(r.cache_bytes),
            _number(r.hours),
            _number(r.rank_hours),
            "-" if r.cost is None else f"{_number(r.cost)} {currency}",
            "holds it" if r.fits else "too small",
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [_line(head, widths)]
    for cells, r in zip(body, rows, strict=True):
        note = r.block_size_note
        lines.append(_line(cells, widths) + (f"  {note}" if note else ""))
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _line(cells: list[str], widths: list[int]) -> str:
    return "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _tokens(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:,}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
