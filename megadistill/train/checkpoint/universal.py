"""A checkpoint for another number of ranks, through DeepSpeed's universal checkpoint.

    step-000200/, of 2 ranks -> .universal/step-000200/zero/<parameter>/fp32.pt, exp_avg.pt, ...
                             -> every rank of the new run takes its part -> .universal/ is removed

Rank 0 converts. That takes, for the time of it, twice the room of the optimizer's files (24 bytes a
parameter beside 12), and host memory for one old rank's. What is left by a run that died meanwhile
has no manifest, so that nothing takes it for a checkpoint, and is removed by the next.

DeepSpeed's loading has two bugs, which are cured here: it gives every parameter group the
hyper-parameters of group 0 (biases and norms would decay), and makes one tensor the step count of
every sub-group (AdamW would count each step once a sub-group). It brings back fp32 weights, moments
and the loss scaler; random states and averages are ours (checkpoint/, train/ema.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megadistill.errors import TrainError
from megadistill.parallel import Mesh
from megadistill.storage.disk import free_bytes, readable_bytes
from megadistill.storage.files import LOCAL, named_os_errors

log = logging.getLogger(__name__)

FOLDER = ".universal"  # beside the checkpoints
_ROOM = 2.1  # of the optimizer's files: fragments and merged, and names


def load_universal(engine: Any, mesh: Mesh, path: Path, *, written_by: int) -> None:
    """Loads weights, moments and counters of a checkpoint of `written_by` ranks. Collective.

    Raises TrainError if the disk has no room to convert.
    """
    folder = path.parent / FOLDER
    if mesh.rank == 0:
        log.info("%s: written by %d rank(s), %d here: converting", path, written_by, mesh.world)
    mesh.run_on_rank0(lambda: _convert(path, folder / path.name))
    with _universal(engine), _own_hyperparameters(engine.optimizer.optimizer):
        loaded, _ = engine.load_checkpoint(str(folder), tag=path.name)
    if loaded is None:
        raise TrainError(f"{path}: DeepSpeed cannot load it converted, although it is as written")
    mesh.barrier()
    mesh.run_on_rank0(lambda: LOCAL.remove_tree(folder))


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    LOCAL.remove_tree(target.parent)
    LOCAL.mkdir(target)
    needed = _ROOM * sum(file.stat().st_size for file in source.glob("*_optim_states.pt"))
    free = free_bytes(target)
    if needed > free:
        raise TrainError(
            f"{target}: {source.name} takes {readable_bytes(needed)} to be converted to another "
            f"number of ranks, and the disk has {readable_bytes(free)}: make room, or start as "
            "many ranks as wrote it"
        )
    settings = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
        # More would fork this process, which has threads and connections.
        num_extract_workers=1,
        num_merge_workers=1,
    )
    # It talks to the terminal, bars and all.
    with (
        named_os_errors("convert a checkpoint", target),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        main(settings)


@contextlib.contextmanager
def _universal(engine: Any) -> Iterator[None]:
    """Switches DeepSpeed to universal checkpoints inside, and off again."""
    settings = engine._config
    before, settings.load_universal_checkpoint = settings.load_universal_checkpoint, True
    try:
        yield
    finally:
        settings.load_universal_checkpoint = before


@contextlib.contextmanager
def _own_hyperparameters(optimizer: Any) -> Iterator[None]:
    """Restores each group's hyper-parameters, and gives each state its own step, at the end."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    # Saved from a GPU, a step comes back on the GPU it was on, whichever rank loads it.
    devices = {p: s["step"].device for p, s in optimizer.state.items() if "step" in s}
    yield
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for parameter, state in optimizer.state.items():
        step = state["step"]
        state["step"] = step.to(devices.get(parameter, step.device), copy=True)
