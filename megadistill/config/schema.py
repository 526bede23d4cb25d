"""The keys of the configuration: sections, types, bounds, defaults, and a sentence on each.

The sentences are the README's reference (`tools/config_reference.py`), so every key has one.
What concerns more than one key stands in rules.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from megadistill.config.rules import default_groups, problems


def _not_a_truth_value(value: Any) -> Any:
    # pydantic takes true for 1; a configuration that says `k: true` is a slip.
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


_Number = BeforeValidator(_not_a_truth_value)

Text = Annotated[str, StringConstraints(min_length=1)]
PositiveInt = Annotated[int, Field(gt=0), _Number]
CountInt = Annotated[int, Field(ge=0), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**63), _Number]
PositiveFloat = Annotated[float, Field(gt=0), _Number]
WeightFloat = Annotated[float, Field(ge=0), _Number]
Share = Annotated[float, Field(ge=0, le=1), _Number]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1), _Number]
Attention = Literal["eager", "sdpa", "flash_attention_2"]


class Section(BaseModel):
    """A part of the configuration: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Text in, sequences of tokens out."""

    source: Literal["python-stdlib"] | None = Field(
        None, description="a corpus every machine has: the running interpreter's standard library"
    )
    files: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="local parquet, jsonl, arrow or text files; patterns allowed"
    )
    name: Text | None = Field(None, description="a dataset on the Hugging Face hub")
    config: Text | None = Field(None, description="the hub dataset's configuration")
    split: Text = Field("train", description="the split to read")
    revision: Text | None = Field(None, description="the hub dataset's branch, tag or commit")
    streaming: bool = Field(
        False, description="read without downloading the whole set first; needs `max_samples`"
    )
    max_samples: PositiveInt | None = Field(None, description="documents to read at most")
    text_field: Text = Field("text", description="the column that holds the text")
    messages_field: Text | None = Field(
        None, description="the column that holds a chat, for the tokenizer's chat template"
    )
    prompt_field: Text | None = Field(
        None, description="the column of prompts, together with `completion_field`"
    )
    completion_field: Text | None = Field(
        None, description="the column of completions; only these are learned from"
    )
    shuffle: bool = Field(False, description="shuffle the documents, by `data.seed`")
    seed: Seed = Field(0, description="seed of the shuffling")
    dir: Text = Field("runs/tokens", description="the token store")
    seq_len: PositiveInt = Field(2048, description="tokens of a sequence")
    block_size: PositiveInt = Field(
        256, description="sequences of a block, the unit of work, commit and resume"
    )
    tokenizer: Text | None = Field(
        None, description="a folder or a hub id; default: the teacher's tokenizer"
    )
    pack: Literal["isolate", "concat"] = Field(
        "isolate", description="whether attention and positions stay within a document, or cross"
    )
    workers: PositiveInt | None = Field(
        None, description="tokenising processes; default: one a core, at most 16"
    )


class TeacherConfig(Section):
    """The model that is learned from, and how it runs."""

    model: Text = Field(description="a folder or a hub id")
    revision: Text | None = Field(None, description="the hub model's branch, tag or commit")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="type of weights and activations"
    )
    tp: PositiveInt = Field(1, description="ranks that hold one copy of the teacher together")
    engine: Literal["tensor_parallel", "zero3"] = Field(
        "tensor_parallel",
        description="every tp ranks hold a copy; or all ranks hold one and gather layer by layer",
    )
    mode: Literal["cached"] = Field("cached", description="targets come from the cache")
    micro_batch: PositiveInt = Field(8, description="sequences of one forward pass of a rank")
    attention: Attention = Field("sdpa", description="transformers' attention implementation")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class TargetsConfig(Section):
    """What is kept of the teacher's distribution at each position."""

    method: Literal["varopt", "topk"] = Field(
        "varopt", description="`varopt` samples without bias; `topk` keeps the k most probable ids"
    )
    tau: Annotated[float, Field(gt=0, le=1), _Number] = Field(
        0.06,
        description="varopt: ids of at least this probability are kept, the rest is sampled in "
        "steps of it; at most 1/tau + 1 entries a position",
    )
    k: PositiveInt = Field(64, description="topk: entries of a position")
    temperature: PositiveFloat = Field(1.0, description="the teacher's softmax temperature")
    seed: Seed = Field(0, description="seed of the sampling")
    positions: Literal["all", "loss_mask"] = Field(
        "all", description="which positions get targets: all, or only completions"
    )


class CacheConfig(Section):
    """Where the targets lie."""

    dir: Text = Field("runs/cache", description="the cache, a block store")
    min_free: WeightFloat = Field(
        0.5, description="GiB of disk that generating leaves free; it stops before it takes more"
    )


class StudentConfig(Section):
    """The model that learns. Without this section there is nothing to train."""

    model: Text = Field(description="a folder or a hub id")
    revision: Text | None = Field(None, description="the hub model's branch, tag or commit")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="start from the model's weights, or from its config.json alone"
    )
    attention: Attention = Field("sdpa", description="transformers' attention implementation")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class LossConfig(Section):
    """What is minimised: kd_weight x distillation + ce_weight x cross-entropy on true tokens."""

    divergence: Literal["forward_kl"] = Field(
        "forward_kl", description="between the teacher's targets and the student"
    )
    kd_weight: WeightFloat = Field(1.0, description="weight of the distillation loss")
    ce_weight: WeightFloat = Field(0.0, description="weight of the cross-entropy on true tokens")
    label_smoothing: ShareBelowOne = Field(
        0.0, description="share of the cross-entropy's label that is spread over the vocabulary"
    )
    temperature: PositiveFloat = Field(
        1.0, description="softmax temperature of the distillation loss; equal to the targets'"
    )


class OrderConfig(Section):
    """Which sequences form global batch g: the same at every number of ranks."""

    shuffle: Literal["shuffle", "sequential"] = Field(
        "shuffle", description="deal permuted blocks into groups, or take blocks in order"
    )
    groups: PositiveInt = Field(
        64,
        description="groups a batch takes equal shares of; default: the largest divisor of "
        "`train.global_batch` that is at most 64",
    )
    seed: Seed = Field(0, description="seed of the order")


class TrainConfig(Section):
    """The training run: AdamW with warm-up and decay."""

    out_dir: Text = Field("runs/train", description="metrics, checkpoints and the trained model")
    steps: PositiveInt | None = Field(None, description="optimizer steps; or set `epochs`")
    epochs: PositiveFloat | None = Field(None, description="passes over the cache; or set `steps`")
    global_batch: PositiveInt = Field(64, description="sequences of a step, over all ranks")
    micro_batch: PositiveInt = Field(8, description="sequences of one pass of a rank")
    lr: PositiveFloat = Field(1e-4, description="learning rate at its peak")
    min_lr_ratio: Share = Field(0.1, description="the last learning rate, as a share of `lr`")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up: cosine decay; stable, then decay; or constant"
    )
    warmup_steps: CountInt = Field(0, description="steps over which the learning rate rises")
    decay_steps: PositiveInt | None = Field(
        None, description="wsd: steps of the decay at the end; default: a fifth of the steps"
    )
    weight_decay: WeightFloat = Field(0.1, description="AdamW's, on matrices only")
    betas: tuple[ShareBelowOne, ShareBelowOne] = Field((0.9, 0.95), description="AdamW's")
    grad_clip: WeightFloat = Field(1.0, description="largest gradient norm; 0: not clipped")
    save_every: PositiveInt | None = Field(
        None, description="steps between checkpoints; default: at the end only"
    )
    eval_every: PositiveInt | None = Field(
        None, description="steps between held-out evaluations; default: at the end only"
    )
    keep: PositiveInt = Field(2, description="checkpoints to keep")
    seed: Seed = Field(0, description="seed of random weights")
    deterministic: bool = Field(
        False, description="repeatable to the bit on a GPU too, at some cost in speed"
    )


class EvalConfig(Section):
    """Held-out evaluation."""

    cache: Text | None = Field(None, description="a `topk` cache of held-out text")
    max_sequences: PositiveInt | None = Field(
        None, description="sequences to evaluate at most; default: all"
    )


class ParallelConfig(Section):
    """Hosts and ranks."""

    expect_hosts: PositiveInt | None = Field(
        None, description="refuse to start on another number of hosts"
    )
    timeout_s: PositiveInt = Field(1800, description="seconds until a stuck collective gives up")


class Config(Section):
    """Every stage's configuration. One file serves them all."""

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
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="DeepSpeed's own keys for the student (`zero_optimization`, `bf16`, ...); "
        "those that would contradict ours are refused",
    )

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, value: Any, handler: ModelWrapValidatorHandler[Config], info: ValidationInfo):
        config = handler(value)
        if config is value:
            return config
        if "groups" not in config.order.model_fields_set:
            groups = default_groups(config.train.global_batch)
            order = config.order.model_copy(update={"groups": groups})
            config = config.model_copy(update={"order": order})
        # The loader applies the rules itself, so as to report them beside wrong single keys.
        found = [] if (info.context or {}).get("rules_later") else list(problems(config))
        if found:
            raise ValueError("; ".join(str(problem) for problem in found))
        return config
