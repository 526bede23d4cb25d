"""The sections that train a student: the model, its loss, the order, the run, its evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from megadistill.config.curves import curve_of, value_at, values
from megadistill.config.fields import (
    CountInt,
    InnerShare,
    ModelConfig,
    Number,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Share,
    ShareBelowOne,
    Text,
    WeightFloat,
)
from megadistill.config.optimizer_registry import OPTIMIZERS
from megadistill.config.registered import RegisteredName
from megadistill.targets.divergence_registry import DIVERGENCES


class StudentConfig(ModelConfig):
    """The model that learns. Without this section there is nothing to train."""

    model: Text = Field(description="a folder or a hub id")
    init: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="start from the model's weights, or from its config.json alone",
    )


CURVES = (
    "kd_weight",
    "ce_weight",
    "hidden_weight",
    "attention_weight",
    "label_smoothing",
    "temperature",
)
FEATURES_FROM, ALL_TERMS_FROM = 0.3, 0.6  # of a run, under curriculum: three_phase


class LossConfig(Section):
    """Training loss: kd_weight x distillation + ce_weight x cross-entropy on true tokens.

    In place of a number stand points `[[0, 1.0], [0.5, 1.0], [1, 0.2]]`: the value at fractions of
    the run, straight lines between them, two points at one fraction for a jump.
    """

    divergence: Annotated[str, AfterValidator(RegisteredName(DIVERGENCES))] = Field(
        default="forward_kl",
        description="between the teacher's targets and the student; `topk`, `topp` and `union` "
        "serve all of them, the tail as one bucket, `exact` all of them without a tail, `varopt` "
        "and `multinomial` only `forward_kl`; or a name that another distribution registers",
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
    options: dict[str, Any] = Field(
        default={}, description="parameters of a divergence that another distribution registers"
    )
    kd_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=1.0, description="weight of the distillation loss"
    )
    ce_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=0.0, description="weight of the cross-entropy on true tokens"
    )
    hidden_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=0.0,
        description="weight of the alignment of hidden states, see `features`; with "
        "`teacher.mode: online`",
    )
    attention_weight: curve_of(WeightFloat) = Field(  # type: ignore[valid-type]
        default=0.0,
        description="weight of the alignment of attention, likewise; `attention: eager` in teacher "
        "and student",
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
        description="softmax temperature of the distillation loss; default: the targets' own, of "
        "several caches the first's. For `topk` and `topp` also another: a coarse divergence over "
        "the listed ids and the tail, softened",
    )
    memory_budget: WeightFloat | None = Field(
        default=None,
        description="GiB that the head's gradients may take from the forward to the backward pass; "
        "above it they are recomputed, at a fourth matrix product; default: they are kept",
    )
    curriculum: Literal["three_phase"] | None = Field(
        default=None,
        description="`three_phase`: the teacher's targets alone until 0.3 of the run, with its "
        "hidden states and attention until 0.6, where they have a weight, then the true tokens as "
        "well",
    )

    def at(self, done: float) -> LossConfig:
        """The loss when `done` of the run, 0 to 1, is behind: numbers in place of points."""
        now = {name: value_at(getattr(self, name), done) for name in CURVES}
        if self.curriculum == "three_phase" and done < ALL_TERMS_FROM:
            now["ce_weight"] = 0.0
        if self.curriculum == "three_phase" and done < FEATURES_FROM:
            now |= {"hidden_weight": 0.0, "attention_weight": 0.0}
        return self.model_copy(update=now | {"curriculum": None})

    @property
    def learns_from_teacher(self) -> bool:
        """Whether the distillation loss has a weight at any time of the run."""
        return any(values(self.kd_weight))

    @property
    def aligned(self) -> tuple[str, ...]:
        """Returns which of "hidden" and "attention" have a weight at any time of the run."""
        both = ("hidden", "attention")
        return tuple(name for name in both if any(values(getattr(self, f"{name}_weight"))))

    @property
    def changes(self) -> tuple[str, ...]:
        """The keys whose value changes over the run."""
        preset: tuple[str, ...] = ()
        if self.curriculum:
            preset = ("ce_weight", *(f"{name}_weight" for name in self.aligned))
        return tuple(n for n in CURVES if n in preset or isinstance(getattr(self, n), tuple))


LayerPairs = Annotated[list[tuple[int, int]], Field(min_length=1)]


class FeaturesConfig(Section):
    """Which layers of teacher and student are aligned, where `loss` gives that a weight.

    Layers are numbered from 1, the first, or from -1, the last.
    """

    hidden_layers: LayerPairs = Field(
        default=[(-1, -1)],
        description="pairs [teacher's, student's] of layers whose outputs are aligned",
    )
    hidden_loss: Literal["mse", "cosine"] = Field(
        default="mse",
        description="`mse`: squared difference over the square of the teacher's state, position by "
        "position, so that it is 1 for states of zeros whatever the model's scale; `cosine`: one "
        "minus the cosine",
    )
    projection: Literal["learned", "none"] | None = Field(
        default=None,
        description="`learned`: the student's states go through a matrix a pair, which is trained "
        "with it and left out of the export; default: where the widths differ",
    )
    attention_layers: LayerPairs = Field(
        default=[(-1, -1)],
        description="pairs [teacher's, student's] of layers whose attention, averaged over heads, "
        "is aligned",
    )


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
    """The training run: an optimizer, with warm-up and decay."""

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
    optimizer: Annotated[str, AfterValidator(RegisteredName(OPTIMIZERS))] = Field(
        default="adamw", description="torch's AdamW; or a name that another distribution registers"
    )
    optimizer_options: dict[str, Any] = Field(
        default={}, description="options of an optimizer that another distribution registers"
    )
    weight_decay: WeightFloat = Field(default=0.1, description="decoupled, on matrices only")
    betas: tuple[ShareBelowOne, ShareBelowOne] = Field(default=(0.9, 0.95), description="AdamW's")
    grad_clip: WeightFloat = Field(default=1.0, description="largest gradient norm; 0: not clipped")
    save_every: PositiveInt | None = Field(
        default=None,
        description="steps between checkpoints, besides `save_minutes`; one is written at the end "
        "in any case",
    )
    save_minutes: WeightFloat | None = Field(
        default=15.0,
        description="minutes after which a checkpoint is written, by rank 0's clock; 0 or null: "
        "off",
    )
    save_in_background: bool = Field(
        default=False,
        description="write checkpoints while training continues, from a copy in host memory: 12 "
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
    ema_decay: Annotated[float, Field(gt=0, lt=1), Number] = Field(
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
    """Held-out evaluation.

    With `files` or `name` `launch/generate.py` makes the held-out cache after the main one, with
    the same teacher, in `<cache.dir>.heldout` (its tokens in `<data.dir>.heldout`), and
    `launch/train.py` evaluates on it. Tokenizer, columns and sequence length are those of `data`.
    With `teacher.mode: online` `launch/generate.py` makes the held-out cache alone.
    """

    files: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None, description="held-out text, local files as in `data.files`"
    )
    name: Text | None = Field(default=None, description="held-out text, a dataset on the hub")
    config: Text | None = Field(default=None, description="the hub dataset's configuration")
    split: Text | None = Field(default=None, description="its split; default: `train`")
    revision: Text | None = Field(default=None, description="its branch, tag or commit")
    max_samples: PositiveInt | None = Field(
        default=None, description="held-out documents to read at most"
    )
    cache: Text | None = Field(
        default=None,
        description="in place of text: a `topk` cache of held-out text that is there already, a "
        "folder or a URL",
    )
    max_sequences: PositiveInt | None = Field(
        default=None, description="sequences to evaluate at most; default: all"
    )
