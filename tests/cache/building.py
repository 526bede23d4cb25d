"""Building small caches in tests: a corpus, its configuration, and runs on warm ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megadistill.config import Config
from tests.models.made import tiny_model

SEQ_LEN, BLOCK = 32, 8


def _plain(line: str) -> str:
    return "".join(c for c in line if c.isalnum() or c in " .,:=")


def make_corpus(folder: Path) -> Path:
    """A teacher with its tokenizer, a corpus, and its tokens."""
    from megadistill.data.tokens import build_tokens

    tiny_model(folder / "teacher")
    text = (Path(__file__).parents[1] / "models/made.py").read_text()
    lines = [line for line in text.splitlines() if line.strip()]
    (folder / "text.jsonl").write_text(
        "\n".join(f'{{"text": {line!r}}}'.replace("'", '"') for line in map(_plain, lines))
    )
    build_tokens(settings(folder, folder / "none"))
    return folder


def settings(folder: Path, cache: Path | str, /, **sections) -> Config:
    keys = {
        "data": {
            "files": [str(folder / "text.jsonl")],
            "dir": str(folder / "tokens"),
            "seq_len": SEQ_LEN,
            "block_size": BLOCK,
            "workers": 1,
        },
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "micro_batch": 3},
        "targets": {"tau": 0.1},
        "cache": {"dir": str(cache)},
    }
    for section, values in sections.items():
        keys[section] = {**keys[section], **values}
    return Config.model_validate(keys)


def build(mesh, config: Config, *, stop_after: int | None = None):
    from megadistill.cache import build as module

    if stop_after is not None:
        # A run that dies: its writer refuses the block after `stop_after`.
        class Dying(module.CacheWriter):
            def submit(self, block, samples, targets):
                if block >= stop_after:
                    raise KeyboardInterrupt("planted")
                super().submit(block, samples, targets)

        original, module.CacheWriter = module.CacheWriter, Dying
        try:
            module.build_cache(config, mesh)
        except KeyboardInterrupt:
            return None
        finally:
            module.CacheWriter = original
    return module.build_cache(config, mesh)


def rerun(mesh, config: Config):
    from megadistill.cache import build as module

    def refuse(*_):
        raise AssertionError("a teacher was loaded")

    original, module.load_teacher = module.load_teacher, refuse
    try:
        return module.build_cache(config, mesh)
    finally:
        module.load_teacher = original


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
