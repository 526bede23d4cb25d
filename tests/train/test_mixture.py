"""Training from several caches: which may be mixed, where they may lie, how it resumes."""

import json

import fsspec
import pytest

from megadistill.blocks.copy import copy_store
from megadistill.errors import ConfigError, RecipeError, StoreError
from megadistill.train.data import open_sources
from tests.ranks import run_ranks
from tests.train.stores import TOKENIZER, make_config, make_store

RUN, STOPPED, MESSAGE = (f"tests.train.runs:{n}" for n in ("run", "run_until_told", "message"))


def losses(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line)["loss"] for line in file]


def mixed(folder, second, **sections):
    return make_config(
        folder,
        cache={"dir": [str(folder / "cache"), {"dir": second, "weight": 2}]},
        **sections,
    )


def test_a_mixture_trains_and_goes_on_bit_for_bit(tmp_path):
    second = make_store(tmp_path / "second", sequences=10, seed=3)
    config = mixed(tmp_path, second, train={"steps": None, "epochs": 1})
    # 24 + 2 * 10 sequences in batches of 8.
    assert run_ranks(2, RUN, config=config) == [6, 6]
    stopped = mixed(
        tmp_path, second,
        train={"steps": None, "epochs": 1, "out_dir": str(tmp_path / "stopped")},
    )  # fmt: skip
    assert 1 <= run_ranks(2, STOPPED, config=stopped, lines=1)[0] < 6
    assert run_ranks(2, RUN, config=stopped) == [6, 6]
    assert losses(stopped) == losses(config)


def test_a_run_is_not_resumed_with_other_weights(tmp_path):
    second = make_store(tmp_path / "second", sequences=10, seed=3)
    run_ranks(1, RUN, config=mixed(tmp_path, second, train={"steps": 2}))
    other = make_config(tmp_path, cache={"dir": [str(tmp_path / "cache"), second]},
                        train={"steps": 2})  # fmt: skip
    kind, said = run_ranks(1, MESSAGE, config=other)[0]
    assert kind == RecipeError.__name__
    assert "run.json: cache.1.weight is 2.0, this run's is 1.0: restore" in said


def test_training_from_a_url_is_training_from_the_folder(tmp_path):
    config = make_config(tmp_path, train={"steps": 2})
    url = f"file://{tmp_path}/far"
    copy_store(config.cache.dir, url)
    far = make_config(
        tmp_path, cache={"dir": url, "local_dir": str(tmp_path / "local")},
        train={"steps": 2, "out_dir": str(tmp_path / "far_out")},
    )  # fmt: skip
    run_ranks(1, RUN, config=config)
    run_ranks(1, RUN, config=far)
    assert losses(far) == losses(config)
    assert list((tmp_path / "local").glob("far-*/shard.*.mds"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": TOKENIZER | {"content": "1" * 64}}, "tokenizer is 0000000000000000 in "),
        ({"temperature": 2.0}, "temperature is 1.0 in "),
        ({"vocab_size": 97}, "vocab_size is 96 in "),
        ({"method": "topk"}, "method is varopt in "),
    ],
)
def test_caches_that_cannot_be_mixed_are_refused_naming_both(tmp_path, changes, said):
    second = make_store(tmp_path / "second", **changes)
    with pytest.raises(ConfigError) as caught:
        open_sources(mixed(tmp_path, second))
    assert str(caught.value).startswith(f"cache.dir: {said}{tmp_path}/cache and ")
    assert f"in {second}, expected one" in str(caught.value)


def test_what_a_url_holds_of_credentials_is_not_told(tmp_path):
    fsspec.filesystem("memory").store.clear()
    copy_store(make_store(tmp_path / "cache"), "memory://far/cache")
    config = make_config(
        tmp_path,
        cache={"dir": "memory://far/cache?key=pa55word", "local_dir": str(tmp_path / "local")},
    )
    # In memory a query is part of the name, and nothing lies there.
    with pytest.raises(StoreError) as caught:
        open_sources(config)
    assert str(caught.value).startswith("memory://far/cache: holds no tokens.json")
    assert "pa55word" not in str(caught.value)
