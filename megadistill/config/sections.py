"""The sections of the configuration together. `schema.Config` adds the rules that bind them.

Every key has its type, bounds, default and a sentence, here, in generating.py and in training.py;
the sentences are the README's reference (`tools/config_reference.py`). The rules (rules.py and what
it collects) read `Sections`, so that they stand below the class that applies them.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field

from megadistill.config.fields import PositiveInt, Section
from megadistill.config.generating import CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from megadistill.config.training import (
    EvalConfig,
    FeaturesConfig,
    LossConfig,
    OrderConfig,
    StudentConfig,
    TrainConfig,
)
from megadistill.targets import find_method


class ParallelConfig(Section):
    """Hosts and ranks."""

    expect_hosts: PositiveInt | None = Field(
        default=None, description="refuse to start on another number of hosts"
    )
    timeout_s: PositiveInt = Field(
        default=1800, description="seconds until a stuck collective gives up"
    )
    heartbeat_s: PositiveInt = Field(
        default=60, description="seconds without an answer until another host counts as gone"
    )
    cpu_threads: PositiveInt = Field(
        default=1,
        description="torch's threads a rank; sums on a CPU, and so a cache's bytes, depend on it",
    )


class Sections(Section):
    """Every section, and what follows from several of them."""

    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    targets: TargetsConfig = TargetsConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig | None = None
    loss: LossConfig = LossConfig()
    features: FeaturesConfig = FeaturesConfig()
    order: OrderConfig = OrderConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed's own keys for the student (`zero_optimization`, `bf16`, ...); "
        "those that would contradict ours are refused",
    )

    @property
    def of_each_teacher(self) -> dict[str, Self]:
        """The same with one teacher alone, by where that stands: `teacher` first."""
        members = self.teacher.members
        return {key: self.model_copy(update={"teacher": each}) for key, each in members.items()}

    @property
    def stream_is_unbounded(self) -> bool:
        """Whether the corpus has no known end, and as much of it is read as training needs."""
        endless = self.data.streaming and self.data.max_samples is None
        return endless and self.teacher.mode == "online" and self.train.steps is not None

    @property
    def may_train_from_cache(self) -> bool:
        """Whether neither a corpus nor a teacher is needed: a cache stands for both."""
        return self.student is not None and self.teacher.mode == "cached"

    @property
    def follows_targets(self) -> bool:
        """Whether the loss takes its temperature from `targets`, with the teacher online."""
        online = self.teacher.mode == "online" and find_method(self.targets.method).cached
        return online and "temperature" not in self.loss.model_fields_set

    @property
    def sequences_needed(self) -> int:
        """Number of sequences of all steps; 0 without train.steps."""
        return (self.train.steps or 0) * self.train.global_batch
