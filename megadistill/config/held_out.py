"""The held-out text of `eval.files` or `eval.name`, and the configuration that makes its cache.

Generating writes it after the main cache, with the same teacher, into folders beside the main ones:
`<data.dir>.heldout` and `<cache.dir>.heldout`. Targets are `topk`, which evaluation needs, with
`targets.k` entries at `targets.temperature`; tokenizer, sequence length, packing and columns are
those of `data`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from megadistill.config.problem import Problem
from megadistill.config.rules import largest_block_size
from megadistill.config.sections import Sections
from megadistill.errors import ConfigError, DataError, RecipeError
from megadistill.targets import find_method

AnyConfig = TypeVar("AnyConfig", bound=Sections)

SUFFIX = ".heldout"
_OF_NAME = ("config", "split", "revision")  # keys of `eval` that say more about `eval.name`
_KEYS = re.compile(r"\bdata\.(files|name|config|split|revision|max_samples)\b")


def held_out(config: AnyConfig) -> AnyConfig | None:
    """The configuration that makes the held-out cache; None where none is asked for."""
    wanted, data = config.eval, config.data
    if wanted.files is None and wanted.name is None:
        return None
    text: dict[str, Any] = {
        "source": None,
        "options": {},
        "files": wanted.files,
        "name": wanted.name,
        "config": wanted.config,
        "split": wanted.split or "train",
        "revision": wanted.revision,
        "max_samples": wanted.max_samples,
        "shuffle": False,
        "dir": data.dir + SUFFIX,
        # The first documents are read without the rest of the set.
        "streaming": wanted.name is not None and wanted.max_samples is not None,
    }
    positions = config.targets.positions
    targets: dict[str, Any] = {
        "method": "topk",
        "options": {},
        "min_entropy": None,
        "entropy": True,
        "nll": True,
        "positions": None if positions == "entropy" else positions,
    }
    teacher: dict[str, Any] = {"mode": "cached", "ensemble": []}
    if config.teacher.engine == "tensor_parallel":
        teacher["offload"] = None  # the teacher is not idle here, as it is beside a student
    made = config.model_copy(
        update={
            "data": data.model_copy(update=text),
            "targets": config.targets.model_copy(update=targets),
            "teacher": config.teacher.model_copy(update=teacher),
            "cache": config.cache.model_copy(
                update={"dir": held_out_cache(config), "part": None, "ensemble": []}
            ),
            "eval": type(wanted)(),
        }
    )
    size = max(1, min(data.block_size, largest_block_size(made)))
    smaller = made.data.model_copy(update={"block_size": size})
    return made.model_copy(update={"data": smaller})


def held_out_cache(config: Sections) -> str:
    """Where the held-out cache lies: beside the cache, of several beside the first."""
    return config.cache.sources[0].dir.rstrip("/") + SUFFIX


def evaluation_cache(config: Sections) -> tuple[str, str] | None:
    """(the key that asks for it, the folder or URL) of the held-out cache; None without one."""
    wanted = config.eval
    if wanted.cache is not None:
        return "eval.cache", wanted.cache
    if wanted.files is None and wanted.name is None:
        return None
    return f"eval.{'files' if wanted.files is not None else 'name'}", held_out_cache(config)


@contextmanager
def in_eval_keys(made: Sections) -> Iterator[None]:
    """Errors about the text of a held-out configuration, in the keys that the user set.

    made: that configuration. An error that names no key says that it is about the held-out text.
    """
    try:
        yield
    except (ConfigError, DataError, RecipeError) as error:
        said = _KEYS.sub(r"eval.\1", str(error))
        if "eval." not in said:
            said = f"eval.{'files' if made.data.files is not None else 'name'}: {said}"
        raise type(error)(said) from error


def evaluation_problems(config: Sections) -> Iterator[Problem]:
    """Every rule about `eval` that the configuration breaks."""
    wanted, data = config.eval, config.data
    given = [f"eval.{name}" for name in ("cache", "files", "name") if getattr(wanted, name)]
    if len(given) > 1:
        yield Problem(
            ("eval", *given),
            f"{' and '.join(given)} are set, expected one held-out text: keep one, for example "
            f"with {' '.join(f'{key}=null' for key in given[1:])}",
        )
    for name in _OF_NAME if wanted.name is None else ():
        if getattr(wanted, name) is not None:
            yield Problem(
                (f"eval.{name}", "eval.name"),
                "is read with eval.name only, a dataset on the hub: set eval.name"
                + (f", for example eval.name={data.name}" if data.name else "")
                + f", or remove eval.{name}",
            )
    if wanted.max_samples is not None and wanted.files is None and wanted.name is None:
        yield Problem(
            ("eval.max_samples", "eval.files", "eval.name"),
            "documents of a held-out text that is not named: set eval.files or eval.name (of a "
            "cache, eval.max_sequences limits what is evaluated)",
        )
    theirs = (wanted.name, wanted.config, wanted.split or "train", wanted.revision)
    if wanted.name is not None and theirs == (data.name, data.config, data.split, data.revision):
        yield Problem(
            ("eval.name", "data.name"),
            f"{wanted.name} is the text that is trained on: set eval.split or eval.config to "
            "another part of it",
        )
    shared = sorted(set(wanted.files or ()) & set(data.files or ()))
    if shared:
        yield Problem(
            ("eval.files", "data.files"),
            f"{shared[0]} is among the text that is trained on: set eval.files to other files",
        )
    own_tokenizer = find_method(config.targets.method).own_tokenizer
    if own_tokenizer and evaluation_cache(config) and not wanted.cache:
        yield Problem(
            (given[0], "targets.method"),
            f"with targets.method={config.targets.method}, whose teacher has other token ids than "
            "the student: leave it out",
        )
