"""Whether the models can be held at all: what surely does not fit is refused before it is loaded.

Weights alone, and a student's gradients and optimizer with them, against all the memory there is:
the device's, or on a CPU each rank's part of the host's. What activations add is for the plan to
estimate; it can be had with smaller micro-batches.
"""

from __future__ import annotations

import os

from megadistill.config import Config
from megadistill.errors import ConfigError
from megadistill.models.model_files import ModelFiles
from megadistill.preflight.plan.memory import at_once, student_states, teacher_weights
from megadistill.storage.disk import readable_bytes


def check_memory(
    config: Config,
    *,
    teachers: list[tuple[Config, ModelFiles]],
    student: ModelFiles | None,
    world: int,
) -> None:
    """ConfigError where a rank's share of the models is more than it has.

    teachers: each with the configuration of it alone. None for a student that is not loaded, or
    whose files are not here.
    """
    needs = {}
    sizes = [
        (each, size)
        for each, files in teachers
        if (size := teacher_weights(each, files, world)) is not None
    ]
    if sizes:
        needs["teacher"] = at_once(sizes)
    states = student_states(config, student, world)
    if states is not None:
        needs["student"] = states
    available = _available()
    if not needs or sum(needs.values()) <= available:
        return
    largest = max(needs, key=needs.__getitem__)
    several = f"{len(sizes)} teachers" if len(sizes) > 1 else "teacher"
    parts = " and ".join(
        f"{readable_bytes(n)} for the {several if name == 'teacher' else name}"
        for name, n in needs.items()
    )
    raise ConfigError(
        f"{largest}.model: a rank of {world} needs {parts}, without activations, and has "
        f"{readable_bytes(available)}: {_WAYS_OUT[largest]}"
    )


_WAYS_OUT = {
    "teacher": "start more ranks with a larger teacher.tp, or with teacher.engine=zero3, which "
    "spreads it over all of them; teacher.offload=cpu keeps it in host memory",
    "student": "start more ranks, over which ZeRO-3 spreads it, or offload to the host: "
    "deepspeed.zero_optimization.offload_optimizer.device=cpu",
}


def _available() -> int:
    import torch

    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return int(torch.cuda.get_device_properties(local_rank).total_memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
