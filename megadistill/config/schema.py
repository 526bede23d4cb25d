"""The keys of the configuration: sections, types, bounds, defaults, and a sentence on each.

The sentences are the README's reference (`tools/config_reference.py`), so every key has one.
What concerns more than one key stands in rules.py.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megadistill.config.curves import curve_of, value_at, values
from megadistill.config.rules import problems
from megadistill.config.training_rules import default_groups
from megadistill.disk import is_url
from megadistill.errors import ConfigError


def _not_a_truth_value(value: Any) -> Any:
    # pydantic takes true for 1; a configuration that says `k: true` is a slip.
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "expected a number")
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
InnerShare = Annotated[float, Field(gt=0, lt=1), _Number]


def _an_existing_part(text: str) -> str:
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise PydanticCustomError("part", "expected I/N with I from 0 to N-1, such as 0/3")
    return text


Part = Annotated[str, AfterValidator(_an_existing_part)]


class Section(BaseModel):
    """A part of the configuration: frozen, and without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(Section):
    """Text in, sequences of tokens out."""

    source: Literal["python-stdlib"] | None = Field(
        default=None,
        description="a corpus every machine has: the running interpreter's standard library",
    )
    files: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="local parquet, jsonl, arrow or text files; patterns allowed"
    )
    name: Text | None = Field(default=None, description="a dataset on the Hugging Face hub")
    config: Text | None = Field(default=None, description="the hub dataset's configuration")
    split: Text = Field(default="train", description="the split to read")
    revision: Text | None = Field(
        default=None, description="the hub dataset's branch, tag or commit"
    )
    streaming: bool = Field(
        default=False,
        description="read without downloading the whole set first; needs `max_samples`",
    )
    max_samples: PositiveInt | None = Field(default=None, description="documents to read at most")
    text_field: Text = Field(default="text", description="the column that holds the text")
    messages_field: Text | None = Field(
        default=None, description="the column that holds a chat, for the tokenizer's chat template"
    )
    prompt_field: Text | None = Field(
        default=None, description="the column of prompts, together with `completion_field`"
    )
    completion_field: Text | None = Field(
        default=None, description="the column of completions; only these are learned from"
    )
    shuffle: bool = Field(default=False, description="shuffle the documents, by `data.seed`")
    seed: Seed = Field(default=0, description="seed of the shuffling")
    dir: Text = Field(default="runs/tokens", description="the token store")
    seq_len: PositiveInt = Field(default=2048, description="tokens of a sequence")
    block_size: PositiveInt = Field(
        default=256, description="sequences of a block, the unit of work, commit and resume"
    )
    tokenizer: Text | None = Field(
        default=None, description="a folder or a hub id; default: the teacher's tokenizer"
    )
    pack: Literal["isolate", "concat"] = Field(
        default="isolate",
        description="whether attention and positions stay within a document, or cross",
    )
    workers: PositiveInt | None = Field(
        default=None, description="tokenising processes; default: one a core, at most 16"
    )


class ModelConfig(Section):
    """A model of transformers: teacher or student."""

    model: Text = Field(description="a folder or a hub id")
    revision: Text | None = Field(default=None, description="the hub model's branch, tag or commit")
    attention: Literal["eager", "sdpa", "flash_attention_2"] = Field(
        default="sdpa", description="transformers' attention implementation"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")


class TeacherConfig(ModelConfig):
    """The model that is learned from, and how it runs."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="type of weights and activations"
    )
    tp: PositiveInt = Field(
        default=1, description="ranks that hold one copy of the teacher together"
    )
    engine: Literal["tensor_parallel", "zero3"] = Field(
        default="tensor_parallel",
        description="every tp ranks hold a copy; or all ranks hold one and gather layer by layer",
    )
    offload: Literal["cpu"] | None = Field(
        default=None,
        description="`cpu`: the weights lie in host memory; `zero3` fetches each layer's when its "
        "turn comes, `tensor_parallel`, with `mode: online` only, all of them while it answers",
    )
    mode: Literal["cached", "online"] = Field(
        default="cached",
        description="targets come from a cache, or from the teacher beside the student, which "
        "`launch/train.py` then runs on the same ranks over the text of `data`",
    )
    micro_batch: PositiveInt = Field(
        default=8, description="sequences of one forward pass of a rank"
    )


class TargetsConfig(Section):
    """What is kept of the teacher's distribution at each position."""

    method: Literal["varopt", "multinomial", "topk", "topp", "union", "exact"] = Field(
        default="varopt",
        description="`varopt` and `multinomial` sample without bias; `topk` keeps the k most "
        "probable ids, `topp` as many of them as have mass p. With `teacher.mode: online` also "
        "`exact`, the whole distribution, and `union`, the k most probable ids of the teacher and "
        "the k of the student, at `loss.temperature`",
    )
    tau: Annotated[float, Field(gt=0, le=1), _Number] = Field(
        default=0.06,
        description="`varopt`: ids of at least this probability are kept, the rest is sampled in "
        "steps of it; at most ceil(1/tau) + 1 entries a position",
    )
    draws: Annotated[int, Field(gt=0, le=65_535), _Number] = Field(
        default=50, description="`multinomial`: draws with replacement at a position"
    )
    k: PositiveInt = Field(
        default=64,
        description="`topk`: entries of a position; `topp`: the most entries; the true token is "
        "added where it is not among them; `union`: ids of each side",
    )
    p: Annotated[float, Field(gt=0, le=1), _Number] = Field(
        default=0.95, description="`topp`: the mass to keep"
    )
    temperature: PositiveFloat = Field(default=1.0, description="the teacher's softmax temperature")
    seed: Seed = Field(default=0, description="seed of the sampling")
    positions: Literal["all", "loss_mask", "entropy"] = Field(
        default="all",
        description="which positions get targets: all, only completions, or those where the "
        "teacher's entropy is at least `min_entropy`",
    )
    min_entropy: PositiveFloat | None = Field(
        default=None, description="`positions: entropy`: in nats, at `temperature`"
    )
    entropy: bool = Field(default=True, description="keep the teacher's entropy, a byte a position")
    nll: bool = Field(
        default=True,
        description="keep minus the teacher's log-probability of the true token, a byte a position",
    )


class CacheSource(Section):
    """One of several caches to train from."""

    dir: Text = Field(description="the cache: a folder or a URL")
    weight: PositiveFloat = Field(default=1.0, description="passes over it in an epoch")


def _source(value: Any) -> Any:
    return {"dir": value} if isinstance(value, str) else value


# The tags end up in the places of pydantic's errors, where what has brackets is no key.
CacheDir = Annotated[
    Annotated[Text, Tag("[text]")]
    | Annotated[
        list[Annotated[CacheSource, BeforeValidator(_source)]], Field(min_length=1), Tag("[list]")
    ],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[text]"),
]


class CacheConfig(Section):
    """Where the targets lie."""

    dir: CacheDir = Field(
        default="runs/cache",
        description="the cache, a folder; to train from, also a URL (`sftp://`, `s3://`, `gs://`, "
        "`hf://`, `file://`), or a list of these, or of `{dir: ..., weight: ...}` with the passes "
        "over each in an epoch",
    )
    local_dir: Text | None = Field(
        default=None,
        description="where shards of caches at URLs are kept; default: `~/.cache/megadistill`",
    )
    local_limit: PositiveFloat = Field(
        default=50.0, description="GiB of such shards to keep at most, of all caches together"
    )
    min_free: WeightFloat = Field(
        default=0.5,
        description="GiB of disk to leave free; looked at before a run starts and after each block",
    )
    reserve: Share = Field(
        default=0.5,
        description="share of the bytes still to come that must be free: where less is, generating "
        "stops cleanly and can go on later; 0: do not watch, nor refuse a disk that is too small",
    )
    allow_incomplete: bool = Field(
        default=False,
        description="train on the blocks that an unfinished cache has when the run begins; the run "
        "keeps to them, also when it is resumed and there are more by then",
    )
    part: Part | None = Field(
        default=None,
        description="`I/N`: generate only the blocks b with b mod N = I; the parts, in folders of "
        "their own, are merged with tools/merge_and_inspect.py",
    )

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): the blocks b with b mod n = i are to be generated."""
        index, _, parts = (self.part or "0/1").partition("/")
        return int(index), int(parts)

    @property
    def sources(self) -> list[CacheSource]:
        """What to train from; a single cache is a list of one."""
        return [CacheSource(dir=self.dir)] if isinstance(self.dir, str) else self.dir

    @property
    def is_folder(self) -> bool:
        """Whether there is one cache, in a folder, which can be generated into."""
        return isinstance(self.dir, str) and not is_url(self.dir)

    @property
    def folder(self) -> str:
        """The one folder that is generated into. ConfigError for a list or a URL."""
        if not isinstance(self.dir, str):
            raise ConfigError(
                f"cache.dir: a list of {len(self.dir)} caches is to train from, and generating "
                "writes one: set cache.dir to one folder"
            )
        if is_url(self.dir):
            raise ConfigError(
                "cache.dir: a URL is to train from, and generating writes to a folder: set "
                "cache.dir to one, then copy it with tools/copy_cache.py"
            )
        return self.dir


class StudentConfig(ModelConfig):
    """The model that learns. Without this section there is nothing to train."""

    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="start from the model's weights, or from its config.json alone",
    )


CURVES = ("kd_weight", "ce_weight", "label_smoothing", "temperature")  # of LossConfig
ALL_TERMS_FROM = 0.6  # of a run, under curriculum: three_phase


class LossConfig(Section):
    """What is minimised: kd_weight x distillation + ce_weight x cross-entropy on true tokens.

    In place of a number stand points `[[0, 1.0], [0.5, 1.0], [1, 0.2]]`: the value at fractions of
    the run, straight lines between them, two points at one fraction for a jump.
    """

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl", "tvd", "adaptive_kl"
    ] = Field(
        default="forward_kl",
        description="between the teacher's targets and the student; `topk`, `topp` and `union` "
        "serve all of them, the tail as one bucket, `exact` all of them without a tail, `varopt` "
        "and `multinomial` only `forward_kl`",
    )
    beta: InnerShare = Field(
        default=0.5,
        description="`jsd`: share of the teacher in the mixture that both are compared with",
    )
    alpha: InnerShare = Field(
        default=0.1,
        description="`skewed_kl`: KL(teacher, alpha teacher + (1 - alpha) student); "
        "`skewed_reverse_kl`: KL(student, alpha student + (1 - alpha) teacher)",
    )
    head_mass: InnerShare = Field(
        default=0.5,
        description="`adaptive_kl`: the teacher's mass whose gap weighs forward against reverse KL",
    )
    kd_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=1.0, description="weight of the distillation loss"
    )
    ce_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=0.0, description="weight of the cross-entropy on true tokens"
    )
    label_smoothing: curve_of(ShareBelowOne) = Field(  # type: ignore[valid-type]
        default=0.0,
        description="share of the cross-entropy's label that is spread over the vocabulary",
    )
    z_loss: WeightFloat = Field(
        default=0.0,
        description="weight of the squared log-sum-exp of the logits, which keeps them from "
        "drifting; 1e-4 is usual",
    )
    ground_truth_residual: bool = Field(
        default=False,
        description="put the mass that `topk` and `topp` leave out on the true token; "
        "`forward_kl` only",
    )
    temperature: curve_of(PositiveFloat) = Field(  # type: ignore[valid-type]
        default=1.0,
        description="softmax temperature of the distillation loss; the targets' own, or for `topk` "
        "and `topp` another: a coarse divergence over the listed ids and the tail, softened",
    )
    memory_budget: WeightFloat | None = Field(
        default=None,
        description="GiB that the head's gradients may take from the forward to the backward pass; "
        "above it they are recomputed, at a fourth matrix product; default: they are kept",
    )
    curriculum: Literal["three_phase"] | None = Field(
        default=None,
        description="`three_phase`: the teacher's targets alone until 0.3 of the run, with its "
        "attention and features until 0.6 (a cache has none), then the true tokens as well",
    )

    def at(self, done: float) -> LossConfig:
        """The loss when `done` of the run, 0 to 1, is behind: numbers in place of points."""
        now = {name: value_at(getattr(self, name), done) for name in CURVES}
        if self.curriculum == "three_phase" and done < ALL_TERMS_FROM:
            now["ce_weight"] = 0.0
        return self.model_copy(update=now | {"curriculum": None})

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the distillation loss has a weight at any time of the run."""
        return any(values(self.kd_weight))

    @property
    def changes(self) -> tuple[str, ...]:
        """The keys whose value changes over the run."""
        preset = ("ce_weight",) if self.curriculum else ()
        return tuple(n for n in CURVES if n in preset or isinstance(getattr(self, n), tuple))


class OrderConfig(Section):
    """Which sequences form global batch g: the same at every number of ranks."""

    shuffle: Literal["shuffle", "sequential"] = Field(
        default="shuffle", description="deal permuted blocks into groups, or take blocks in order"
    )
    groups: PositiveInt = Field(
        default=64,
        description="groups a batch takes equal shares of; default: the largest divisor of "
        "`train.global_batch` that is at most 64",
    )
    seed: Seed = Field(default=0, description="seed of the order")


class TrainConfig(Section):
    """The training run: AdamW with warm-up and decay."""

    out_dir: Text = Field(
        default="runs/train", description="metrics, checkpoints and the trained model"
    )
    steps: PositiveInt | None = Field(default=None, description="optimizer steps; or set `epochs`")
    epochs: PositiveFloat | None = Field(
        default=None, description="passes over the cache; or set `steps`"
    )
    global_batch: PositiveInt = Field(default=64, description="sequences of a step, over all ranks")
    micro_batch: PositiveInt = Field(default=8, description="sequences of one pass of a rank")
    lr: PositiveFloat = Field(default=1e-4, description="learning rate at its peak")
    min_lr_ratio: Share = Field(
        default=0.1, description="the last learning rate, as a share of `lr`"
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        default="cosine", description="after warm-up: cosine decay; stable, then decay; or constant"
    )
    warmup_steps: CountInt = Field(
        default=0, description="steps over which the learning rate rises"
    )
    decay_steps: PositiveInt | None = Field(
        default=None,
        description="`wsd`: steps of the decay at the end; default: a fifth of the steps",
    )
    weight_decay: WeightFloat = Field(default=0.1, description="AdamW's, on matrices only")
    betas: tuple[ShareBelowOne, ShareBelowOne] = Field(default=(0.9, 0.95), description="AdamW's")
    grad_clip: WeightFloat = Field(default=1.0, description="largest gradient norm; 0: not clipped")
    save_every: PositiveInt | None = Field(
        default=None, description="steps between checkpoints; default: at the end only"
    )
    save_in_background: bool = Field(
        default=False,
        description="write checkpoints while training goes on, from a copy in host memory: 12 "
        "bytes a parameter over all ranks, 16 with `ema`",
    )
    eval_every: PositiveInt | None = Field(
        default=None, description="steps between held-out evaluations; default: at the end only"
    )
    keep: PositiveInt = Field(default=2, description="checkpoints to keep, the newest")
    keep_best: bool = Field(
        default=False,
        description="keep that of the lowest held-out loss as well, and export it to `model_best/`",
    )
    ema: bool = Field(
        default=False,
        description="keep a moving average of the weights: 4 bytes a parameter over all ranks",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1), _Number] = Field(
        default=0.9999, description="its decay; at first less, (1 + t) / (10 + t) after t steps"
    )
    use_ema: bool = Field(
        default=False, description="evaluate and export the average instead of the weights"
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="at a loss or gradient that is not finite: stop with an error, or leave the "
        "step out on all ranks; both name the sequences",
    )
    skip_budget: CountInt = Field(
        default=10, description="`non_finite: skip`: steps to leave out at most in the whole run"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[],
        description="where rank 0's figures go besides `metrics.jsonl` and `eval.jsonl`, each "
        "through its own library (`pip install` it)",
    )
    project: Text = Field(
        default="megadistill", description="`wandb`, `trackio`: the project the run belongs to"
    )
    run_name: Text | None = Field(
        default=None,
        description="`wandb`, `trackio`: the run's name; default: the last two parts of `out_dir`",
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="keep only each layer's input and compute the rest again in the backward pass: "
        "a third more arithmetic, and the memory of one layer's activations in place of all",
    )
    seed: Seed = Field(default=0, description="seed of random weights")
    deterministic: bool = Field(
        default=False, description="repeatable to the bit on a GPU too, at some cost in speed"
    )


class EvalConfig(Section):
    """Held-out evaluation."""

    cache: Text | None = Field(
        default=None, description="a `topk` cache of held-out text, a folder or a URL"
    )
    max_sequences: PositiveInt | None = Field(
        default=None, description="sequences to evaluate at most; default: all"
    )


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

    @model_validator(mode="after")
    def _as_a_whole(self, info: ValidationInfo) -> Config:
        if "groups" not in self.order.model_fields_set:
            groups = default_groups(self.train.global_batch)
            # The model is frozen for everybody else; here it is still being made.
            self.__dict__["order"] = self.order.model_copy(update={"groups": groups})
        # The loader applies the rules itself, so as to report them beside wrong single keys.
        found = [] if (info.context or {}).get("rules_later") else list(problems(self))
        if found:
            raise ValueError("; ".join(str(problem) for problem in found))
        return self
