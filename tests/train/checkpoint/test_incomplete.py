"""An unfinished cache: trained on where it is asked for, and always on the same blocks."""

import json
import logging
import re
import shutil

import pytest

from megadistill.cli.command_line import run
from megadistill.errors import StoreError
from megadistill.train.run_folder import _numbers, _ranges
from megadistill.train.training_source import blocks_there, open_sequences
from tests.cache.caches import fill_cache
from tests.programs import program
from tests.ranks import run_ranks
from tests.train.checkpoint.test_universal import cut
from tests.train.stores import make_config, make_store
from tests.train.test_loop import series, weights

RUN, MESSAGE = "tests.train.runs:run", "tests.train.runs:message"


@pytest.fixture
def unfinished(tmp_path):
    """A run over a cache of blocks 0 and 2 of three, the last of them short."""
    make_store(tmp_path / "whole", sequences=20, seed=1)
    config = make_config(
        tmp_path,
        cache={"dir": str(tmp_path / "cache"), "allow_incomplete": True},
        train={"save_every": 1, "keep": 10, "steps": 4},
    )
    shutil.rmtree(tmp_path / "cache")
    shutil.copytree(tmp_path / "whole", tmp_path / "cache")
    for name in ("shard.000001.mds", "blocks/000001.json"):
        (tmp_path / "cache" / name).unlink()
    return config


def grow(config):
    """The missing block is made."""
    folder = config.cache.dir
    for name in ("shard.000001.mds", "blocks/000001.json"):
        shutil.copy(f"{folder}/../whole/{name}", f"{folder}/{name}")


def test_what_is_there_is_trained_on_and_said(unfinished, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        (blocks,) = blocks_there(unfinished)
    assert "incomplete: the run trains on the 12 of 20 sequences it has now" in caplog.text
    sequences = open_sequences(
        unfinished.cache.dir, key="cache.dir", with_targets=True, blocks=blocks
    )
    whole = open_sequences(str(tmp_path / "whole"), key="cache.dir", with_targets=True)
    assert [sequences.number(i) for i in range(len(sequences))] == [*range(8), *range(16, 20)]
    for i in range(len(sequences)):
        assert (sequences[i]["tokens"] == whole[sequences.number(i)]["tokens"]).all()
    assert run_ranks(2, RUN, config=unfinished) == [4, 4]
    identity = json.loads((tmp_path / "out" / "run.json").read_text().splitlines()[0])
    assert identity["cache"]["0"]["blocks"] == "0,2"


def test_resumed_over_a_cache_that_has_grown_it_keeps_to_the_same_blocks(unfinished, tmp_path):
    run_ranks(2, RUN, config=unfinished)
    before = series(unfinished), weights(unfinished)
    cut(unfinished, 2)
    grow(unfinished)
    assert run_ranks(2, RUN, config=unfinished) == [4, 4]
    assert series(unfinished) == before[0]
    for name, value in weights(unfinished).items():
        assert (value == before[1][name]).all()


@pytest.mark.long
def test_resumed_without_the_key_over_a_cache_that_is_finished_it_is_refused(unfinished, tmp_path):
    run_ranks(1, RUN, config=unfinished)
    cut(unfinished, 2)
    shutil.rmtree(unfinished.cache.dir)
    shutil.copytree(tmp_path / "whole", unfinished.cache.dir)
    cache = unfinished.cache.model_copy(update={"allow_incomplete": False})
    ((kind, text),) = run_ranks(1, MESSAGE, config=unfinished.model_copy(update={"cache": cache}))
    assert kind == "RecipeError"
    assert re.search(r"blocks of cache\.dir \(cache\.allow_incomplete\) is .*, this run's is", text)


def test_a_block_that_is_gone_is_refused_by_number(unfinished):
    run_ranks(1, RUN, config=unfinished)
    cut(unfinished, 2)
    with open(f"{unfinished.cache.dir}/blocks/000000.json") as file:
        assert file.read()
    shutil.move(f"{unfinished.cache.dir}/blocks/000000.json", f"{unfinished.cache.dir}/../gone")
    ((kind, text),) = run_ranks(1, MESSAGE, config=unfinished)
    assert kind == "StoreError"
    assert re.search(r"cache\.dir: .* has no block 0, on which this run was begun", text)


def test_a_held_out_cache_must_be_complete_whatever_the_key_says(tmp_path):
    path = make_store(tmp_path / "heldout", method="topk", blocks=1)
    with pytest.raises(StoreError, match=r"is incomplete, 8 of 24 sequences: .* stopped$"):
        open_sequences(path, key="eval.cache", with_targets=True)


@pytest.mark.parametrize(
    ("blocks", "text"), [((0,), "0"), ((0, 1, 2), "0-2"), ((1, 3, 4, 9), "1,3-4,9")]
)
def test_blocks_are_written_as_ranges(blocks, text):
    assert _ranges(blocks) == text
    assert _numbers(text) == blocks


@pytest.mark.parametrize("name", ["blocks.bin", "index.json"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_a_cache_with_all_blocks_is_not_called_incomplete_and_repair_cures_it(tmp_path, name, how):
    path = str(fill_cache(tmp_path / "cache").path)
    file = tmp_path / "cache" / name
    whole = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes(whole[:-1] + b"x")
    with pytest.raises(StoreError) as refused:
        open_sequences(path, key="cache.dir", with_targets=True)
    assert "is damaged: all its blocks are there, but blocks.bin or index.json" in str(
        refused.value
    )
    assert f"--repair {path}`" in str(refused.value)
    assert run(program("tools/merge_and_inspect.py").main, ["--repair", path]) == 0
    assert file.read_bytes() == whole
    open_sequences(path, key="cache.dir", with_targets=True)


def test_a_missing_shard_is_named_with_what_makes_it_again(tmp_path):
    path = fill_cache(tmp_path / "cache").path
    lost = sorted(path.glob("shard.*.mds"))[0]
    lost.unlink()
    with pytest.raises(StoreError) as refused:
        open_sequences(str(path), key="cache.dir", with_targets=True)
    assert f"{lost.name} is missing or of another size (1 such shard(s))" in str(refused.value)
    assert f"--repair {path}`, then the command that made it again" in str(refused.value)
