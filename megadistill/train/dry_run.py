"""Checks of a training run before it starts, by one process. They write nothing: for a dry run.

They raise what `train` raises before it loads a model, in the same order.
"""

from __future__ import annotations

import tempfile

from megadistill.blocks import BlockReader
from megadistill.cache.cache_recipe import weights_are_here
from megadistill.config import Config
from megadistill.data.token_checks import check_tokens
from megadistill.data.token_plan import TokenPlan, plan_tokens
from megadistill.parallel import Unjoined
from megadistill.train.online.online_teacher import blocks_needed
from megadistill.train.run import prepare
from megadistill.train.run_checks import check_settings, check_student, open_held_out
from megadistill.train.run_folder import RunFolder, run_identity


def check_run(config: Config, *, world: int) -> None:
    """Refuses what training on `world` ranks refuses before it loads a model, without writing.

    Of a remote cache the parts that are looked at are downloaded into a temporary folder. Where an
    online teacher's text is not tokenised yet, or its weights are not on this machine, what
    depends on them is left to the start.
    """
    mesh = Unjoined(world)
    if config.teacher.mode == "online":
        tokens = check_tokens(config, blocks=blocks_needed(config))
        teachers = (each.teacher for each in config.of_each_teacher.values())
        if not isinstance(tokens, BlockReader) or not all(map(weights_are_here, teachers)):
            _check_without_text(config, mesh, plan_tokens(config))
            return
    with tempfile.TemporaryDirectory(prefix="megadistill-dry-run-") as local:
        cache = config.cache.model_copy(update={"local_dir": local})
        run = prepare(config.model_copy(update={"cache": cache}), mesh)
        run.folder.check(run_identity(run.config, run.stores, run.steps), run.config)


def _check_without_text(config: Config, mesh: Unjoined, tokens: TokenPlan) -> None:
    """Checks of `prepare` that do not need the tokenised text."""
    check_settings(config, mesh)
    evaluation = open_held_out(config, mesh, tokens, [])
    check_student(config, mesh, tokens, evaluation)
    RunFolder(config.train.out_dir).check(None, config)
