"""Checks before a run starts: what is wrong is refused before a model is loaded.

A run that fails for a reason that was plain at its start, after an hour of loading, costs the hour
on every GPU. Each check belongs to what it checks, and is called from two places: the start and
`--dry_run`. They come in two parts.

1. Files and settings, on every rank, before the ranks join. All mistakes are reported at once.

       check_generate, check_train   generating.py, training.py
       teacher, student              model_checks.py, memory_checks.py, vocabulary_checks.py
       corpus, folders, disks        folder_checks.py
       caches                        cache_checks.py
       number formats, trackers      train/hardware_checks.py, train/reporting/trackers.py

2. Stores and run folders, on rank 0: recipes, columns, locks, an earlier run's settings. The start
   makes them as it opens the stores, the dry run without writing.

       token store                   data/token_checks.py    (start: data/tokens.py)
       cache                         cache/build_checks.py   (start: cache/build.py)
       training run                  train/dry_run.py        (start: train/run.py)

What only a loaded model can tell is left to the start.
"""

from __future__ import annotations

from megadistill.preflight.dry_run import dry_run_generate, dry_run_plan, dry_run_train
from megadistill.preflight.generating import check_generate
from megadistill.preflight.training import check_train

__all__ = ["check_generate", "check_train", "dry_run_generate", "dry_run_plan", "dry_run_train"]
