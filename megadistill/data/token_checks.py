"""Checks of a token store before it is made or continued. They write nothing: for a dry run.

They raise what `build_tokens` raises at its start. Of a corpus that is still to be read only the
beginning is tokenised, in this process.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from megadistill.blocks import BlockReader
from megadistill.blocks.existing import find_existing, require_unlocked
from megadistill.config import Config
from megadistill.data.continuation import require_no_fewer
from megadistill.data.packing.stream import Cursor
from megadistill.data.token_plan import TokenPlan, plan_tokens
from megadistill.data.tokens import CorpusRun, check_learned, holds_enough, open_stream, too_short
from megadistill.data.workers import InProcess
from megadistill.errors import DataError


def check_tokens(config: Config, *, blocks: int | None = None) -> BlockReader | TokenPlan:
    """The token store of `config.data` where it holds enough, else the plan of it.

    blocks: as for `build_tokens`. Raises DataError, ConfigError, RecipeError, StoreError and
    LockedError as `build_tokens` does.
    """
    planned = plan_tokens(config)
    store = find_existing(planned.data.dir, **planned.settings) if planned.is_begun else None
    if store is None:
        check_beginning(planned)
        return planned
    if holds_enough(store, planned.data, blocks):
        return store
    require_unlocked(store)
    require_no_fewer(store, planned.data)
    return planned


def check_beginning(planned: TokenPlan) -> None:
    """Tokenises the first documents, up to a sequence that is learned from. Writes nothing.

    DataError for a column that is missing, a document that cannot be used, a corpus shorter than a
    sequence, and for one of at most a block of which nothing is learned.
    """
    data, settings = planned.data, planned.settings
    stream = open_stream(settings | {"block_size": 1}, planned.spec, 0, Cursor())
    run = CorpusRun(data, stream, Cursor(), progress=False)
    counted: Counter[str] = Counter()
    for block in run.blocks(InProcess(planned.spec)):
        counted.update(block.statistics)
        counted["sequences"] += 1
        learned = counted.get("learned_tokens")
        if learned is None or learned > 0 or counted["sequences"] > planned.block_size:
            return
    if not counted["sequences"]:
        raise DataError(too_short(data, run))
    tokens = counted["sequences"] * data.seq_len - counted["padding_tokens"]
    check_learned(counted | {"tokens": tokens}, name=str(Path(data.dir)))
