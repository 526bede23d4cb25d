"""Names of teacher and data: for reading, without a place or a secret, never compared."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.cache.build import _prepare
from megadistill.config import DataConfig
from megadistill.data.names import data_names, shown_name
from megadistill.data.recipe_keys import keys_of
from megadistill.errors import RecipeError
from megadistill.inspect.difference import diff_stores
from megadistill.inspect.inspection import inspect_store
from tests.cache.building import settings
from tests.models.made import teacher_and_text, tiny_llama
from tests.programs import program
from tests.ranks import run_ranks

BUILD = "tests.cache.building:build"
PLANTED = "hf_0123456789"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("/data/alice/models/my-teacher", "my-teacher"),
        ("/data/alice/models/my-teacher/", "my-teacher"),
        ("~/models/my-teacher", "my-teacher"),
        ("../models/./my-teacher", "my-teacher"),
        ("/h/hub/models--meta-llama--Llama/snapshots/0e9e39f249a1", "meta-llama/Llama"),
        ("/h/hub/models--gpt2/snapshots/0e9e39f249a1", "gpt2"),
        (f"https://alice:{PLANTED}@host/corpus/a.jsonl?token={PLANTED}", "a.jsonl"),
        (f"s3://{PLANTED}@bucket/corpus/part%201.parquet#x", "part 1.parquet"),
        ("hf://datasets/owner/name/data/a.parquet", "owner/name"),
        (f"hf://datasets/{PLANTED}@owner/name", "name"),
        ("sftp://alice@host", "a URL"),
    ],
)
def test_a_name_is_a_hub_id_or_the_last_part_of_a_path(name, shown):
    assert shown_name(name) == shown
    assert PLANTED not in shown_name(name)
    assert "alice" not in shown_name(name)


def test_a_corpus_is_named_by_its_key():
    def names(**keys) -> dict[str, str]:
        return data_names(DataConfig(**keys))

    assert names(source="python-stdlib") == {"data.source": "python-stdlib"}
    assert names(name="a/b", config="c", split="test") == {"data.name": "a/b, c, test"}
    assert names(files=["/x/a.jsonl", "/y/a.jsonl"]) == {"data.files": "a.jsonl"}
    files = [f"/x/{i}.txt" for i in range(5)]
    assert names(files=files) == {"data.files": "0.txt, 1.txt, 2.txt and 2 more"}
    assert names() == {}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = teacher_and_text(tmp_path_factory.mktemp("secret-place"), documents=90)
    shutil.copytree(folder / "teacher", folder / "another-name")
    for name in ("teacher", "another-name"):
        for part in range(2):
            place = {"dir": str(folder / f"{name}.{part}"), "part": f"{part}/2"}
            config = settings(folder, folder, cache=place, teacher={"model": str(folder / name)})
            run_ranks(1, BUILD, config=config)
    return folder


def test_a_cache_says_whose_it_is_and_nothing_of_where(corpus):
    facts = inspect_store(corpus / "teacher.0")
    assert facts["teacher"]["name"] == "teacher"
    assert facts["tokenizer"]["name"] == "teacher"
    assert facts["data"] == "text.jsonl"
    for file in ("teacher.0/cache.json", "tokens/tokens.json"):
        assert "secret-place" not in (corpus / file).read_text()


def test_inspect_cache_shows_the_names(corpus, capsys):
    from megadistill.cli.command_line import run

    tool = program("tools/inspect_cache.py").main
    run(tool, [str(corpus / "teacher.0"), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["teacher"]["name"], facts["data"]) == ("teacher", "text.jsonl")
    run(tool, [str(corpus / "teacher.0")])
    shown = capsys.readouterr().out
    assert "name teacher, architecture LlamaForCausalLM" in shown
    assert "text.jsonl" in shown


def test_parts_of_one_teacher_under_two_names_are_one_cache(corpus, tmp_path, capsys):
    from megadistill.cli.command_line import run

    parts = [str(corpus / "teacher.0"), str(corpus / "another-name.1")]
    code = run(
        program("tools/merge_and_inspect.py").main, ["--out", str(tmp_path / "whole"), *parts]
    )
    assert code == 0, capsys.readouterr().err
    assert open_store(tmp_path / "whole").names["teacher.model"] == "teacher"
    assert diff_stores(corpus / "teacher.0", corpus / "another-name.0")["equal"]
    config = settings(
        corpus,
        corpus,
        cache={"dir": str(corpus / "teacher.0"), "part": "0/2"},
        teacher={"model": str(corpus / "another-name")},
    )
    with contextlib.ExitStack() as held:
        assert _prepare(config, held) == []  # complete, under whichever name


def test_all_differences_are_said_at_once_in_the_keys_of_the_user(corpus):
    tiny_llama(corpus / "other", seed=1)
    shutil.copy(corpus / "teacher/tokenizer.json", corpus / "other")
    shutil.copy(corpus / "teacher/tokenizer_config.json", corpus / "other")
    config = settings(
        corpus,
        corpus,
        cache={"dir": str(corpus / "teacher.0")},
        teacher={"model": str(corpus / "other"), "dtype": "bfloat16"},
        targets={"tau": 0.2, "seed": 3},
    )
    with contextlib.ExitStack() as held, pytest.raises(RecipeError) as caught:
        _prepare(config, held)
    lines = str(caught.value).splitlines()
    keys = [line.split(": ")[1].split(" is ")[0] for line in lines]
    assert sorted(keys) == ["targets.seed", "targets.tau", "teacher.dtype", "teacher.model"]
    (teacher,) = [line for line in lines if "teacher.model" in line]
    assert "teacher.model is teacher (" in teacher
    assert "this run's is other (" in teacher
    assert all(line.endswith("or set cache.dir to another folder") for line in lines)


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("recipe.tau", "targets.tau"),
        ("recipe.seed", "targets.seed"),
        ("recipe.teacher.config", "teacher.model"),
        ("recipe.dtype", "teacher.dtype"),
        ("recipe.micro_batch", "teacher.micro_batch"),
        ("recipe.seq_len", "data.seq_len"),
        ("recipe.tokens.seq_len", "data.seq_len"),
        ("recipe.pack", "data.pack"),
        ("recipe.tokens.tokenizer.eos", "data.tokenizer"),
        ("recipe.vocab_size", "data.tokenizer"),
        ("recipe.source.content", "data.files"),
        ("recipe.source.fields", "data.text_field"),
        ("recipe.source.shuffle.seed", "data.seed"),
        ("recipe.source.revision", "data.revision"),
        ("recipe.tokens.something_new", "data.something_new"),
        ("block_size", "data.block_size"),
        ("columns.loss_mask", "data.text_field"),
        ("columns.tokens", "data.seq_len"),
    ],
)
def test_every_field_of_a_recipe_has_a_key(field, key):
    assert keys_of(None, kind="cache").of(field) == key
