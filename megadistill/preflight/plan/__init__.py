"""Plan of a run: sequences, blocks, bytes, memory, steps, hours.

`estimate` works it out from the files and the assumptions and loads nothing: for --dry_run, for the
disk's check, and printed before generating. `measure` runs a few blocks for real, `sizes` scales
what it found from 1 million to 100 billion tokens, and `report` says it: tools/plan.py.
"""

from megadistill.preflight.plan.estimate import Plan, log_plan, make_plan, show_plan

__all__ = ["Plan", "log_plan", "make_plan", "show_plan"]
