"""A data source of another installed distribution, from its entry point to a token store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megadistill import registry
from megadistill.blocks import open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.config import Config
from megadistill.config.sources import SOURCES
from megadistill.data.tokens import build_tokens
from megadistill.errors import ConfigError, DataError, RecipeError
from megadistill.preflight.plan.assumptions import TOKENS_A_DOCUMENT
from megadistill.preflight.plan.corpus_size import sequences
from tests.blocks.stores import tree

MODULE = """
from megadistill.data.sources.base import Document, Source


class Counting(Source):
    def read(self, config, start):
        for number in range(start, config.options["documents"]):
            if number == config.options.get("wrong_at"):
                raise KeyError("no such row")
            yield Document(text=f"document {number} of a text. " * (number % 5 + 1))

    def count(self, config):
        return config.options["documents"]


class Asking(Source):
    def read(self, config, start):
        for number in range(start, 60):
            yield Document(prompt=f"what is {number}?", completion=f"{number} it is")

    def resolved(self, config):
        update = {"prompt_field": "prompt", "completion_field": "completion"}
        return config.model_copy(update=update)


class Texts(Source):
    def read(self, config, start):
        yield "a text"


COUNTING, ASKING, TEXTS, NOTHING = Counting(), Asking(), Texts(), "a text"
"""
ENTRY_POINTS = """[megadistill]
source.counting = tiny_source:COUNTING
source.asking = tiny_source:ASKING
source.texts = tiny_source:TEXTS
source.nothing = tiny_source:NOTHING
source.lost = tiny_source:LOST
"""


def install(folder: Path, *, version: str = "2.5", name: str = "tiny-source") -> Path:
    """A distribution in `folder` as pip leaves it: a module and its metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (folder / "tiny_source.py").write_text(MODULE)
    return folder


def forget() -> None:
    """Make the next lookup see what is installed now."""
    registry._entry_points.cache_clear()
    SOURCES._loaded.clear()
    sys.modules.pop("tiny_source", None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = install(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    forget()
    yield folder
    forget()


def counted(documents: int = 60, **options: object) -> dict[str, object]:
    return {"source": "counting", "options": {"documents": documents, **options}}


def test_its_documents_become_a_token_store(installed, config, tokenizer):
    store = build_tokens(config(**counted(), pack="concat"))
    encode = AutoTokenizer.from_pretrained(tokenizer)
    texts = [f"document {n} of a text. " * (n % 5 + 1) for n in range(60)]
    expected = [t for text in texts for t in [*encode(text)["input_ids"], encode.eos_token_id]]
    found = np.concatenate([sample["tokens"] for sample in store])
    assert len(found) > 1000
    assert found.tolist() == expected[: len(found)]
    assert store.complete()
    assert verify_store(store) == []


def test_recipe_and_made_with_name_the_distribution_and_its_version(installed, config):
    store = build_tokens(config(**counted()))
    assert store.recipe["source"] == {
        "source": "counting",
        "distribution": "tiny-source",
        "split": "train",
        "options": {"documents": 60},
    }
    assert store.names["data.source"] == "counting"
    assert {str(store.marker(b)["made_with"]) for b in store.committed()} == {
        "{'tiny-source': '2.5'}"
    }


def test_nothing_is_added_for_a_source_of_megadistills_own(installed, config):
    store = build_tokens(config(source="python-stdlib", max_samples=3))
    assert sorted(store.recipe["source"]) == ["content", "python", "source", "split"]
    assert "made_with" not in store.marker(0)


def test_several_workers_and_a_kill_leave_the_same_store(installed, config, tmp_path):
    shape = counted(300) | {"block_size": 8}
    whole = build_tokens(config(**shape, dir=str(tmp_path / "whole")))
    settings = config(**shape, workers=2)
    program = (
        "import os, signal, sys\n"
        "from megadistill.blocks import BlockWriter\n"
        "from megadistill.config import Config\n"
        "from megadistill.data.tokens import build_tokens\n"
        "commit = BlockWriter.commit\n"
        "def commit_and_die(self, block, *args, **kwargs):\n"
        "    commit(self, block, *args, **kwargs)\n"
        "    if block == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "BlockWriter.commit = commit_and_die\n"
        "build_tokens(Config.model_validate_json(sys.argv[1]))\n"
    )
    root = Path(__file__).parents[3]
    killed = subprocess.run(
        [sys.executable, "-c", program, settings.model_dump_json()],
        env=os.environ | {"PYTHONPATH": f"{installed}:{root}"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert open_store(settings.data.dir).committed() == [0, 1, 2]
    build_tokens(settings)
    assert tree(Path(settings.data.dir)) == tree(whole.path)


def test_a_source_of_prompts_and_completions_has_a_loss_mask(installed, config):
    assert config(source="asking").targets.positions is None
    settings = config(source="asking")
    masked = settings.model_dump(mode="json") | {"targets": {"positions": "loss_mask"}}
    store = build_tokens(Config.model_validate(masked))
    masks = np.concatenate([sample["loss_mask"] for sample in store])
    assert 0 < masks.sum() < len(masks)


def test_another_version_is_recorded_and_other_options_are_refused(installed, config):
    build_tokens(config(**counted()))
    with pytest.raises(RecipeError, match=r"tokens.json: data.options is .*60.* 61"):
        build_tokens(config(**counted(61)))
    with pytest.raises(RecipeError, match=r"tokens.json: data.source is '?counting"):
        build_tokens(config(source="python-stdlib"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (counted(wrong_at=7), "data.source: counting: cannot be read: KeyError: 'no such row'"),
        ({"source": "counting"}, "data.source: counting: cannot be read: KeyError: 'documents'"),
        (
            {"source": "texts"},
            "data.source: texts: gave a str, expected a megadistill.data.sources.base.Document",
        ),
        (
            {"source": "lost"},
            "data.source: the source lost of tiny-source 2.5 cannot be imported from "
            "tiny_source:LOST: AttributeError: module 'tiny_source' has no attribute 'LOST'",
        ),
        (
            {"source": "nothing"},
            "data.source: tiny_source:NOTHING of tiny-source 2.5 is a str, expected a "
            "megadistill.data.sources.base.Source",
        ),
    ],
)
def test_what_goes_wrong_in_a_source_is_one_line(data, said, installed, config):
    with pytest.raises((DataError, ConfigError)) as error:
        build_tokens(config(**data))
    assert str(error.value) == said


def test_a_source_that_is_not_installed_is_refused_with_those_that_are(config, installed):
    with pytest.raises(ValueError, match="expected one of python-stdlib, asking, counting"):
        config(source="poems")


def test_options_without_a_source_that_reads_them_are_refused(config):
    with pytest.raises(ValueError, match=r"data.options: speed set, which only a data.source of"):
        config(source="python-stdlib", options={"speed": 3})


def test_the_plan_knows_its_size_where_it_says_how_many_documents_it_has(installed, config):
    known, how = sequences(config(**counted()), vocab_size=None)
    assert known == round(60 * TOKENS_A_DOCUMENT / 32)
    assert "60 documents" in how
    unknown, how = sequences(config(source="asking"), vocab_size=None)
    assert unknown is None
    assert how.startswith("unknown: ")
