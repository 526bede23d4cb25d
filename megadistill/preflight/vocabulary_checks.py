"""Whether teacher, student and tokenizer mean the same tokens by the same ids."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megadistill.config import Config, StudentConfig, TeacherConfig
from megadistill.errors import ConfigError, first_line
from megadistill.models.model_files import (
    ModelFiles,
    has_tokenizer,
    may_be_hub_id,
    tokenizer_source,
)
from megadistill.preflight.model_checks import find_section_model

log = logging.getLogger(__name__)


def find_tokenizer(config: Config) -> Any:
    """The run's tokenizer: data.tokenizer, or the teacher's."""
    from megadistill.data.tokenizer import load_tokenizer

    own = config.data.tokenizer
    if own is not None and not Path(own).is_dir() and not may_be_hub_id(own):
        raise ConfigError(
            f"data.tokenizer: {own} does not exist, expected a folder with a tokenizer.json, or a "
            "hub id (owner/name)"
        )
    return load_tokenizer(config)


def tokenizer_if_there(config: Config) -> Any:
    """The run's tokenizer, or None where it cannot be loaded."""
    try:
        return find_tokenizer(config)
    except ConfigError:
        return None


def check_tokenizer_fits(config: Config, tokenizer: Any, teacher: ModelFiles) -> None:
    """The tokenizer's ids are ids of the teacher, and a data.tokenizer's those of its own."""
    from megadistill.data.tokenizer import count_ids

    largest = count_ids(tokenizer) - 1
    if teacher.vocab_size is not None and largest >= teacher.vocab_size:
        key = "teacher.model" if config.data.tokenizer is None else "data.tokenizer"
        found = (
            f"{key}: the tokenizer {config.data.tokenizer or config.teacher.model} has ids up to "
            f"{largest}, and the teacher {teacher.name} a vocabulary of {teacher.vocab_size}"
        )
        added = _added_beyond(tokenizer, teacher.vocab_size)
        if added:
            raise ConfigError(
                f"{found}: the added {added} no row in the model: remove from the tokenizer what "
                "was added (megadistill pads nothing), or give the model rows with "
                "resize_token_embeddings"
            )
        cure = "set data.tokenizer to the teacher's own"
        if config.data.tokenizer is None:
            cure = f"put the model's own tokenizer into {teacher.name}, or set data.tokenizer to it"
        raise ConfigError(f"{found}: they do not belong together; {cure}")
    if config.data.tokenizer is not None:
        _check_same_ids(
            config.teacher,
            config,
            tokenizer,
            teacher,
            few="set data.tokenizer to the teacher's own",
            other="the teacher would be asked about other tokens; leave data.tokenizer out, or "
            f"train with {_PROJECTED}, for which teacher and student may differ",
        )


def _added_beyond(tokenizer: Any, rows: int) -> str:
    """The added tokens whose ids have no row; empty where other tokens lack one as well."""
    added = {id_: token for token, id_ in tokenizer.get_added_vocab().items() if id_ >= rows}
    if not added or set(added) != {id_ for id_ in tokenizer.get_vocab().values() if id_ >= rows}:
        return ""
    names = [f"{added[id_]!r} (id {id_})" for id_ in sorted(added)]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"token {shown} has" if len(names) == 1 else f"tokens {shown} have"


def student_if_there(config: Config) -> ModelFiles | None:
    """The student's files, or None (and a warning) where it has none yet."""
    if config.student is None:
        return None
    try:
        return find_section_model(config.student, "student.model")
    except ConfigError as error:
        log.warning("the student is not compared with the teacher yet: %s", error)
        return None


def check_other_teacher(
    config: Config, section: TeacherConfig, tokenizer: Any, teacher: ModelFiles
) -> None:
    """Checks one of teacher.ensemble, its section made whole, for the run's tokenizer and ids."""
    _check_same_ids(
        section,
        config,
        tokenizer,
        teacher,
        few="take a teacher of the same family",
        other="it would answer about other tokens; take a teacher of the same tokenizer",
    )


def check_projected(config: Config) -> None:
    """The teacher's tokens can be aligned with the data's; layers only where they are the same."""
    from megadistill.train.online.projected_teacher import Tokenizers

    different = Tokenizers(config).alignment is not None
    for name in config.loss.aligned:
        if different:
            raise ConfigError(
                f"loss.{name}_weight: the teacher {config.teacher.model} has another tokenizer "
                f"than {config.data.tokenizer}, so its layers stand at other positions: set it to 0"
            )


_PROJECTED = "teacher.mode=online targets.method=projected data.tokenizer=(the student's)"


def check_same_vocabulary(config: Config, tokenizer: Any, student: ModelFiles) -> None:
    """The student has the tokenizer's ids, and a tokenizer of the same ids.

    Ids above are padding, or tokens that were added to it.
    """
    if config.student is not None:
        _check_same_ids(
            config.student,
            config,
            tokenizer,
            student,
            few="choose a student of the same family, or one with student.init=random and "
            "vocab_size at least {ids} in its config.json, or train with "
            f"{_PROJECTED}, for which they may differ",
            other="the student would learn from targets that are about other tokens; give it the "
            f"teacher's tokenizer, or train with {_PROJECTED}, for which they may differ",
        )


def _check_same_ids(
    section: TeacherConfig | StudentConfig,
    config: Config,
    tokenizer: Any,
    model: ModelFiles,
    *,
    few: str,
    other: str,
) -> None:
    """ConfigError where the model has too few ids, or a tokenizer of others; what to do is given.

    tokenizer: the run's, or None where it cannot be loaded, which is reported already.
    """
    if tokenizer is None:
        return
    from megadistill.data.tokenizer import count_ids, tokenizer_identity

    ids = count_ids(tokenizer)
    name = config.data.tokenizer or config.teacher.model
    if model.vocab_size is not None and model.vocab_size < ids:
        raise ConfigError(
            f"{model.key}: {model.name} has a vocabulary of {model.vocab_size}, the tokenizer "
            f"{name} has {ids} ids, and a target is about ids: {few.format(ids=ids)}"
        )
    own = _tokenizer_of(section, model)
    if own is None:
        return
    ours, theirs = (tokenizer_identity(t, below=ids)["content"] for t in (tokenizer, own))
    if ours != theirs:
        text = _example_of_difference(tokenizer, own)
        raise ConfigError(
            f"{model.key}: the tokenizer of {model.name} turns text into other ids than {name} "
            f"does{text}: {other}"
        )
    its_ids = count_ids(own)
    if model.vocab_size is not None and model.vocab_size < its_ids:
        raise ConfigError(
            f"{model.key}: {model.name} has a tokenizer of {its_ids} ids and a vocabulary of "
            f"{model.vocab_size}: its added tokens have no rows; give it some with "
            "resize_token_embeddings, or remove the tokens"
        )


def _tokenizer_of(section: TeacherConfig | StudentConfig, files: ModelFiles) -> Any:
    """The model's own tokenizer, or None where it has none (a config.json alone)."""
    name, revision = tokenizer_source(str(section.model), section.revision, key=files.key)
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # noqa: BLE001 - whatever a tokenizer's own code may raise
        raise ConfigError(
            f"{files.key}: {section.model}: its tokenizer cannot be loaded: {first_line(error)}"
        ) from None
    return tokenizer if tokenizer.is_fast else None


def _example_of_difference(ours: Any, theirs: Any) -> str:
    ours, theirs = ours.get_vocab(), theirs.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            other = theirs.get(token, "nothing")
            return f" ({token!r} is {number} in the one and {other} in the other)"
    return ""
