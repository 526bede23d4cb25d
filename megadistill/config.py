"""The configuration of every stage: one YAML file, one typed tree. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(Section):
    """Text in, sequences out."""

    source: Literal["python-stdlib"] | None = Field(None, description="a corpus that every machine has: the running interpreter's standard library")
    files: list[str] | None = Field(None, description="local parquet, jsonl, arrow or text files; globs allowed")
    name: str | None = Field(None, description="a dataset on the Hugging Face hub")
    config: str | None = Field(None, description="the hub dataset's configuration")
    split: str = Field("train", description="the split to read")
    revision: str | None = Field(None, description="the hub dataset's revision")
    streaming: bool = Field(False, description="read without downloading the whole set; needs max_samples")
    max_samples: PositiveInt | None = Field(None, description="documents to read at most")
    text_field: str = Field("text", description="the column that holds the text")
    messages_field: str | None = Field(None, description="the column that holds a chat; the tokenizer's chat template is used")
    prompt_field: str | None = Field(None, description="the column of prompts, with completion_field")
    completion_field: str | None = Field(None, description="the column of completions; only they are learned from")
    shuffle: bool = Field(False, description="shuffle the documents, by data.seed")
    seed: int = 0
    dir: str = Field("runs/tokens", description="the token store")
    seq_len: PositiveInt = 2048
    block_size: PositiveInt = Field(256, description="sequences a block")
    tokenizer: str | None = Field(None, description="default: the teacher's")
    pack: Literal["isolate", "concat"] = "isolate"
    workers: PositiveInt | None = Field(None, description="tokenising processes; default: the cores, at most 16")


class TeacherConfig(Section):
    model: str = Field(description="a folder or a hub id")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    tp: PositiveInt = 1
    engine: Literal["tensor_parallel", "zero3"] = "tensor_parallel"
    mode: Literal["cached"] = "cached"
    micro_batch: PositiveInt = 8
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


class TargetsConfig(Section):
    method: Literal["varopt", "topk"] = "varopt"
    tau: Annotated[float, Field(gt=0, le=1)] = 0.06
    k: PositiveInt = 64
    temperature: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    positions: Literal["all", "loss_mask"] = "all"


class CacheConfig(Section):
    dir: str = "runs/cache"
    min_free: Annotated[float, Field(ge=0)] = 0.5


class StudentConfig(Section):
    model: str
    revision: str | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = False


class LossConfig(Section):
    divergence: Literal["forward_kl"] = "forward_kl"
    kd_weight: Annotated[float, Field(ge=0)] = 1.0
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0


class OrderConfig(Section):
    shuffle: Literal["shuffle", "sequential"] = "shuffle"
    groups: PositiveInt = 64
    seed: int = 0


class TrainConfig(Section):
    out_dir: str = "runs/train"
    steps: PositiveInt | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch: PositiveInt = 64
    micro_batch: PositiveInt = 8
    lr: Annotated[float, Field(gt=0)] = 1e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: PositiveInt | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    save_every: PositiveInt | None = None
    eval_every: PositiveInt | None = None
    keep: PositiveInt = 2
    seed: int = 0
    deterministic: bool = False


class EvalConfig(Section):
    cache: str | None = None
    max_sequences: PositiveInt | None = None


class ParallelConfig(Section):
    expect_hosts: PositiveInt | None = None
    timeout_s: PositiveInt = 1800


class Config(Section):
    data: DataConfig
    teacher: TeacherConfig
    targets: TargetsConfig = TargetsConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig | None = None
    loss: LossConfig = LossConfig()
    order: OrderConfig = OrderConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)
