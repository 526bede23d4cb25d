"""train.out_dir: whose run it holds, and whether that run goes on, is finished, or is another.

run.json        what the run is, written first, never changed
trackers.json   with train.trackers, what the run is called there
metrics.jsonl   a line a step
eval.jsonl      a line an evaluation
checkpoints/    of which the newest sound one is resumed
model_best/     with train.keep_best, the model of the lowest held-out loss
model/          the trained model; put in place last, so that it says the run is finished
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megadistill.blocks.files import LOCAL
from megadistill.blocks.recipe import require_same_recipe
from megadistill.blocks.records import encode_json, put_file, read_json
from megadistill.config import Config
from megadistill.errors import TrainError
from megadistill.train.data import Sequences
from megadistill.train.journal import JOURNALS, read_records

# Where and how often something is written, and how a step is cut up, are no part of what is run.
_FREE = (
    "out_dir", "save_every", "eval_every", "keep", "keep_best", "micro_batch", "use_ema",
    "non_finite", "skip_budget", "activation_checkpointing", "save_in_background",
    "trackers", "project", "run_name",
)  # fmt: skip
# Without an average nothing is said of it, as before there was one.
_EMA = ("ema", "ema_decay")


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.model = self.path / "checkpoints", self.path / "model"
        self.best = self.path / "model_best"
        self._identity = self.path / "run.json"

    def claim(self, identity: dict[str, Any]) -> bool:
        """Make the folder this run's own, or see that it is; whether the run is finished.

        TrainError where the folder holds something else or a damaged journal, RecipeError naming
        the key where it is a run of another configuration.
        """
        if not self._identity.exists():
            temporary = self.path / ".run.json"
            LOCAL.unlink(temporary)  # of a run that died writing it
            if self.path.exists() and any(self.path.iterdir()):
                raise TrainError(
                    f"train.out_dir: {self.path} holds something that is no run of ours (there is "
                    f"no {self._identity.name}): choose another folder, or empty it"
                )
            LOCAL.mkdir(self.path)
            put_file(LOCAL, self._identity, encode_json(identity), temporary=temporary)
        require_same_recipe(
            read_json(self._identity), identity, file=str(self._identity), other="this run's is",
            way_out="restore the setting to go on, or choose another train.out_dir",
        )  # fmt: skip
        for journal in JOURNALS:
            read_records(self.path / journal)
        return self.model.is_dir()

    def blocks(self) -> list[tuple[int, ...] | None] | None:
        """Of each store the blocks that the run was begun on, None for a complete one.

        None where no run has begun here.
        """
        if not self._identity.exists():
            return None
        stores = read_json(self._identity)["cache"]
        return [_numbers(stores[str(i)].get("blocks")) for i in range(len(stores))]


def run_identity(config: Config, stores: list[Sequences], steps: int) -> dict[str, Any]:
    """Everything the trained weights depend on and that the configuration decides."""
    assert config.student is not None
    free = {*_FREE, "steps", "epochs", *(() if config.train.ema else _EMA)}
    train = config.train.model_dump(mode="json", exclude=free)
    return {
        "cache": {
            str(i): {"recipe": s.recipe, "sequences": len(s), "weight": s.weight}
            | ({} if s.blocks is None else {"blocks": _ranges(s.blocks)})
            | _ensemble(s)
            for i, s in enumerate(stores)
        },
        "data": {"pack": config.data.pack},
        "deepspeed": config.deepspeed,
        "features": config.features.model_dump(mode="json"),
        "format_version": 1,
        "loss": config.loss.model_dump(mode="json"),
        "order": config.order.model_dump(mode="json"),
        "student": config.student.model_dump(mode="json"),
        "train": {**train, "steps": steps},
    }


def _ensemble(store: Sequences) -> dict[str, Any]:
    """What the other teachers are; nothing where there are none, as before there were any."""
    beside = {
        str(i): {"recipe": other.recipe, "weight": other.teacher_weight}
        for i, other in enumerate(store.beside)
    }
    return {"ensemble": beside} if beside else {}


def _ranges(blocks: tuple[int, ...]) -> str:
    """Blocks 0 to 5 and 8 are "0-5,8"."""
    ends = [i for i, b in enumerate(blocks) if i + 1 == len(blocks) or blocks[i + 1] != b + 1]
    starts = [0, *(i + 1 for i in ends[:-1])]
    return ",".join(
        f"{blocks[a]}" if a == b else f"{blocks[a]}-{blocks[b]}"
        for a, b in zip(starts, ends, strict=True)
    )


def _numbers(ranges: str | None) -> tuple[int, ...] | None:
    if ranges is None:
        return None
    pairs = (part.partition("-")[::2] for part in ranges.split(","))
    return tuple(b for first, last in pairs for b in range(int(first), int(last or first) + 1))
