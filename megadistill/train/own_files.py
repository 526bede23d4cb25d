"""Files of the student's own folder that its export keeps beside config.json.

save_pretrained makes generation_config.json from config.json: of several stop tokens it keeps those
that config.json happens to list, of sampling settings none. The student's own file is copied
byte for byte instead. Code of the model's own, tokenizer files that are not JSON, and licences are
copied as well, where save_pretrained of model and tokenizer has not written a file of the name.
"""

from __future__ import annotations

import json
import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megadistill.config import StudentConfig
from megadistill.errors import first_line
from megadistill.models.model_files import ModelFiles, find_model, hub_file_names

log = logging.getLogger(__name__)

GENERATION = "generation_config.json"
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_TOKENIZER = ("tokenizer.model", "tiktoken.model", "tekken.json")
# Of generating, but also of the model: config.json may have them without any setting for sampling.
_NOT_OF_SAMPLING = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
}


def own_files(config: StudentConfig, *, tokenizer: Any = None) -> dict[str, bytes]:
    """Returns the files by name. Rank 0 only; logs once where generation settings are invalid.

    tokenizer: what is exported beside the model, or None. A tokenizer of other origin than the
    student's folder keeps none of the folder's tokenizer files.
    """
    model = find_model(config.model, key="student.model", revision=config.revision)
    patterns = [GENERATION]
    if config.init == "pretrained":
        patterns += _LICENCES
    if tokenizer is not None and str(tokenizer.name_or_path) in (model.name, str(model.folder)):
        patterns += _TOKENIZER
    if config.trust_remote_code and model.settings.get("auto_map"):
        patterns += ["*.py"]
    names = [name for name in _names(model) if any(fnmatch(name, p) for p in patterns)]
    found = {name: content for name in names if (content := _content(model, name)) is not None}
    if GENERATION not in found and (sampling := _in_config(model.settings)):
        found[GENERATION] = json.dumps(sampling, indent=2, sort_keys=True).encode() + b"\n"
    if GENERATION in found:
        _say_if_invalid(found[GENERATION], model)
    return found


def special_ids(files: dict[str, bytes]) -> list[int]:
    """The token ids for beginning, stopping and padding that `own_files` name."""
    settings = _parsed(files.get(GENERATION, b"{}"))
    ids: list[Any] = []
    for kind in ("bos", "eos", "pad"):
        value = settings.get(f"{kind}_token_id")
        ids += value if isinstance(value, list) else [value]
    return [i for i in ids if isinstance(i, int)]


def _names(model: ModelFiles) -> list[str]:
    on_hub = hub_file_names(model) if model.on_hub else None
    here = [path.name for path in model.folder.iterdir() if path.is_file()]
    return sorted(here if on_hub is None else {name for name in on_hub if "/" not in name})


def _content(model: ModelFiles, name: str) -> bytes | None:
    file = model.folder / name
    try:
        if model.on_hub and not file.is_file():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model.name, name, revision=model.revision))
        return file.read_bytes()
    except Exception as error:  # noqa: BLE001 - the hub's client raises its own, httpx's and OSError
        log.warning(
            "student.model: %s of %s cannot be read (%s: %s) and is missing in the exported model: "
            "copy it there",
            name,
            model.name,
            type(error).__name__,
            first_line(error),
        )
        return None


def _in_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Generation settings in an old config.json, with its special tokens; {} if there are none."""
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict())
    found = {
        name: value
        for name, value in {**(settings.get("text_config") or {}), **settings}.items()
        if name in known and value is not None
    }
    return found if set(found) - _NOT_OF_SAMPLING else {}


def _say_if_invalid(content: bytes, model: ModelFiles) -> None:
    import transformers
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(json.loads(content)).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        lines = [line.strip("- ") for line in str(error).splitlines()]
        reason = next((line for line in lines if not line.startswith("GenerationConfig is")), "")
        log.warning(
            "student.model: the generation settings of %s are copied to the exported model as they "
            "are, although transformers %s calls them invalid: %s",
            model.name,
            transformers.__version__,
            reason,
        )


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
