"""The sections that make a cache: text, teacher, targets, and where they lie."""

from __future__ import annotations

import json
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from megadistill.config.fields import (
    ModelConfig,
    Number,
    Part,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Share,
    Text,
    WeightFloat,
)
from megadistill.config.registered import RegisteredName
from megadistill.config.sources import SOURCES
from megadistill.errors import ConfigError
from megadistill.storage.disk import is_url
from megadistill.targets import METHODS, find_method


def _template_variables(value: dict[str, Any]) -> dict[str, Any]:
    taken = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"} & set(value)
    if taken:
        raise PydanticCustomError("taken", f"{min(taken)} is set for each chat: leave it out")
    return _plain(value)


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PydanticCustomError(
            "no_json", "expected texts, numbers, truth values, lists and mappings of them"
        ) from error
    return value


def _iso_date(value: Any) -> Any:
    try:
        # YAML reads an unquoted date as one.
        return str(value) if type(value) is date else date.fromisoformat(value).isoformat()
    except (TypeError, ValueError) as error:
        raise PydanticCustomError("date", "expected a date as YYYY-MM-DD") from error


class DataConfig(Section):
    """Text in, sequences of tokens out."""

    source: Annotated[str, AfterValidator(RegisteredName(SOURCES))] | None = Field(
        default=None,
        description="a corpus every machine has: the running interpreter's standard library; or a "
        "name that another distribution registers",
    )
    options: Annotated[dict[str, Any], AfterValidator(_plain)] = Field(
        default={},
        description="parameters of a `source` that another distribution registers, by name",
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
        description="read without downloading the whole set first; needs `max_samples`, or, with "
        "`teacher.mode: online`, `train.steps`, and as much is read as they need",
    )
    max_samples: PositiveInt | None = Field(default=None, description="documents to read at most")
    text_field: Text | None = Field(
        default=None,
        description="the column that holds the text. Without any `*_field` key the columns are "
        "found by name: `messages` or `conversations`, `prompt` with `completion`, or `text`",
    )
    messages_field: Text | None = Field(
        default=None, description="the column that holds a chat, for the tokenizer's chat template"
    )
    prompt_field: Text | None = Field(
        default=None, description="the column of prompts, together with `completion_field`"
    )
    completion_field: Text | None = Field(
        default=None, description="the column of completions; only these are learned from"
    )
    tools_field: Text | None = Field(
        default=None,
        description="the column of tools that a chat may use, as JSON schemas; default: `tools`, "
        "where chats have such a column",
    )
    chat_template: Text | None = Field(
        default=None,
        description="a file with a chat template (.jinja); default: the tokenizer's own",
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_variables)] = Field(
        default={},
        description="variables for the chat template, for example `{enable_thinking: false}`",
    )
    chat_date: Annotated[str, BeforeValidator(_iso_date)] = Field(
        default="2024-07-26",
        description="the date (YYYY-MM-DD) for chat templates that print today's, so that the "
        "same text is made on any day",
    )
    assistant_mask: Literal["generated", "template"] = Field(
        default="generated",
        description="the tokens of a chat that are learned: what the model would generate, from "
        "the generation prompt to the end-of-turn token; or what the template marks with "
        "`{% generation %}`",
    )
    on_bad_document: Literal["error", "skip"] = Field(
        default="error",
        description="a document that cannot be used (a value that is no text, a chat that the "
        "template refuses): `error` stops with its file and row, `skip` leaves it out, counts it "
        "and lists it in `<data.dir>.run/skipped.jsonl`",
    )
    max_document_mib: PositiveInt = Field(
        default=1024,
        description="MiB of the longest document, decompressed; a longer one cannot be used",
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
        description="whether attention, positions and states stay within a document, or cross; "
        "under `isolate` a model with recurrent layers, linear attention or convolutions runs the "
        "documents of a sequence apart",
    )
    packing: Literal["best_fit", "in_order"] | None = Field(
        default=None,
        description="how documents fill sequences: `best_fit` cuts only documents longer than a "
        "sequence, and pads; `in_order` cuts at every sequence's end; default: as the token store "
        "that is there, else `best_fit`, and `in_order` under `pack: concat`",
    )
    workers: PositiveInt | None = Field(
        default=None, description="tokenising processes; default: one a core, at most 16"
    )


class TeacherMember(Section):
    """Further online teacher. What is not given is as `teacher` says, `tp` always."""

    model: Text = Field(description="a folder or a hub id")
    revision: Text | None = Field(default=None, description="the hub model's branch, tag or commit")
    weight: PositiveFloat = Field(
        default=1.0, description="in the distillation loss; that of `teacher.model` is 1"
    )
    trust_remote_code: bool = Field(default=False, description="run code that comes with the model")
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    engine: Literal["tensor_parallel", "zero3"] | None = None
    offload: Literal["cpu"] | None = None
    micro_batch: PositiveInt | None = None


class TeacherConfig(ModelConfig):
    """The model that is learned from, and how it runs.

    To train from a cache `model` may be left out. Where it is set it must be the cache's.
    """

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
        description="targets come from a cache, or from an online teacher, which "
        "`launch/train.py` then runs on the same ranks over the text of `data`",
    )
    micro_batch: PositiveInt = Field(
        default=8, description="sequences of one forward pass of a rank"
    )
    ensemble: list[TeacherMember] = Field(
        default=[],
        description="with `mode: online` more teachers of the same tokenizer, `{model: ..., "
        "weight: ...}` each, and of `revision`, `dtype`, `engine`, `offload`, `attention`, "
        "`micro_batch`, `trust_remote_code` what is another. The distillation loss is the mean of "
        "each teacher's, by weights, that of `model` being 1; `features` are of `model` alone",
    )

    @property
    def members(self) -> dict[str, TeacherConfig]:
        """Each teacher as a section of its own, by where it stands: `teacher` itself first."""
        found = {"teacher": self.model_copy(update={"ensemble": []})}
        for number, member in enumerate(self.ensemble):
            given = member.model_dump(exclude={"weight"}, exclude_none=True)
            update = {"revision": None, "ensemble": [], **given}
            found[f"teacher.ensemble.{number}"] = self.model_copy(update=update)
        return found


class TargetsConfig(Section):
    """Targets that are kept of the teacher's distribution at each position."""

    method: Annotated[str, AfterValidator(RegisteredName(METHODS, find_method))] = Field(
        default="varopt",
        description="`varopt` and `multinomial` sample without bias; `topk` keeps the k most "
        "probable ids, `topp` as many of them as have mass p. With `teacher.mode: online` also "
        "`exact`, the whole distribution, and `union`, the k most probable ids of the teacher and "
        "the k of the student, at `loss.temperature`; and `projected`, for a teacher of another "
        "tokenizer (`data.tokenizer` is then the student's): its hidden states through a learned "
        "matrix, read by the student's own head. Installed distributions may register more",
    )
    tau: Annotated[float, Field(gt=0, le=1), Number] = Field(
        default=0.06,
        description="`varopt`: ids of at least this probability are kept, the rest is sampled in "
        "steps of it; at most ceil(1/tau) + 1 entries per token",
    )
    draws: Annotated[int, Field(gt=0, le=65_535), Number] = Field(
        default=50, description="`multinomial`: draws with replacement at a position"
    )
    k: PositiveInt = Field(
        default=64,
        description="`topk`: entries of a position; `topp`: the most entries; the true token is "
        "added where it is not among them; `union`: ids of each side",
    )
    p: Annotated[float, Field(gt=0, le=1), Number] = Field(
        default=0.95, description="`topp`: the mass to keep"
    )
    options: Annotated[dict[str, Any], AfterValidator(_plain)] = Field(
        default={},
        description="parameters of a `method` that another distribution registers, by name",
    )
    temperature: PositiveFloat = Field(default=1.0, description="the teacher's softmax temperature")
    seed: Seed = Field(default=0, description="seed of the sampling")
    positions: Literal["all", "loss_mask", "entropy"] | None = Field(
        default=None,
        description="which positions get targets: all, only those of the loss mask (completions, "
        "what the assistant says), or those where the teacher's entropy is at least "
        "`min_entropy`; default: `loss_mask` where the data has one, else all",
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
    """Entry of a list of caches to train from."""

    dir: Text = Field(description="the cache: a folder or a URL")
    weight: PositiveFloat = Field(default=1.0, description="passes over it in an epoch")


class CacheTeacher(Section):
    """The cache of one more teacher, of the tokens that `cache.dir` holds."""

    dir: Text = Field(description="the teacher's cache: a folder or a URL")
    weight: PositiveFloat = Field(
        default=1.0, description="of its teacher in the distillation loss; that of `cache.dir` is 1"
    )


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
    ensemble: list[Annotated[CacheTeacher, BeforeValidator(_source)]] = Field(
        default=[],
        description="caches of more teachers, made from the same token store: folders or URLs, or "
        "`{dir: ..., weight: ...}`. The distillation loss is the mean of each teacher's, by "
        "weights, that of `dir` being 1",
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
    def part_index(self) -> tuple[int, int]:
        """(i, n): the blocks b with b mod n = i are to be generated."""
        index, _, parts = (self.part or "0/1").partition("/")
        return int(index), int(parts)

    @property
    def sources(self) -> list[CacheSource]:
        """Returns the caches to train from; a single cache is a list of one."""
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
