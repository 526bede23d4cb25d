"""A student of several teachers, from their caches of the same tokens."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from megadistill.blocks.remote.upload import copy_store
from megadistill.errors import ConfigError, StoreError
from megadistill.train.teachers import check_divergences, with_caches
from megadistill.train.training_source import micro_batch, open_sources
from tests.ranks import run_ranks
from tests.train.plain import plain_steps
from tests.train.stores import SEQ_LEN, TOKENIZER, make_config, make_store

RUN, STOPPED, MESSAGE = (f"tests.train.runs:{n}" for n in ("run", "run_until_told", "message"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Caches of two teachers of the same tokens, of which one knows fewer ids; a student."""
    folder = tmp_path_factory.mktemp("place")
    make_config(folder)
    make_store(folder / "second", seed=1, teacher=1, method="topk", vocab=90)
    make_store(folder / "third", seed=1, teacher=2)
    return folder


def two(place, out="out", ensemble=None, **sections):
    others = ensemble or [{"dir": str(place / "second"), "weight": 3}, str(place / "third")]
    train = {"out_dir": str(place / out), **sections.pop("train", {})}
    cache = {"dir": str(place / "cache"), "ensemble": others, **sections.pop("cache", {})}
    return make_config(place, cache=cache, train=train, **sections)


def series(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return np.array([[r["loss"], r["grad_norm"]] for r in map(json.loads, file)])


@pytest.fixture(scope="module")
def trained(place):
    config = two(place, "trained", train={"save_every": 1, "keep": 9})
    run_ranks(2, RUN, config=config)
    return config


def test_its_losses_are_the_means_of_the_teachers_own(place, trained):
    expected, _ = plain_steps(trained)
    np.testing.assert_allclose(series(trained), expected, rtol=1e-5)
    config = two(place, "one")
    run_ranks(1, RUN, config=config)
    np.testing.assert_allclose(series(config), expected, rtol=1e-5)
    assert (place / "one" / "model" / "README.md").read_text().count(
        "- learned from: cache (weight 1, varopt) and second (weight 3, topk) "
        "and third (weight 1, varopt)\n"
    ) == 1


def test_resumed_it_goes_on_bit_for_bit(place, trained):
    config = two(place, "resumed")
    shutil.copytree(trained.train.out_dir, config.train.out_dir)
    shutil.rmtree(f"{config.train.out_dir}/model")
    for step in (3, 4):
        shutil.rmtree(f"{config.train.out_dir}/checkpoints/step-{step:06d}")
    assert run_ranks(2, RUN, config=config) == [4, 4]
    assert (series(config) == series(trained)).all()


@pytest.mark.parametrize(
    ("ensemble", "said"),
    [
        ([{"dir": "second", "weight": 2}, "third"], r"cache\.ensemble\.0\.weight is 3\.0, this"),
        ([{"dir": "second", "weight": 3}], r"cache\.ensemble\.1 is .*, this run's is not set"),
        ([], r"cache\.ensemble is .*, this run's is not set"),
        (
            [{"dir": "third", "weight": 3}, "third"],
            r"targets\.method of cache\.ensemble\.0\.dir is 't",
        ),
    ],
)
def test_with_other_teachers_it_is_another_run(place, trained, ensemble, said):
    here = [
        {**e, "dir": f"{place}/{e['dir']}"} if isinstance(e, dict) else f"{place}/{e}"
        for e in ensemble
    ]
    config = two(place, "trained", cache={"ensemble": here})
    ((kind, text),) = run_ranks(1, MESSAGE, config=config)
    assert kind == "RecipeError"
    assert re.search(said, text), text
    assert "restore the setting to resume" in text


def test_one_teacher_twice_of_which_one_is_far_away_is_that_teacher(place, tmp_path):
    url = f"file://{tmp_path}/far"
    copy_store(str(place / "cache"), url)
    twice = two(
        place, "twice", [{"dir": url, "weight": 2}], cache={"local_dir": str(tmp_path / "local")}
    )
    alone = make_config(place, train={"out_dir": str(place / "alone")})
    for config in (twice, alone):
        run_ranks(1, RUN, config=config)
    np.testing.assert_allclose(series(twice), series(alone), rtol=1e-6)
    assert len(list((tmp_path / "local").glob("far-*/shard.*.mds"))) == 3


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"tokenizer": TOKENIZER | {"content": "1" * 64}}, ConfigError, "the tokenizer is 1111"),
        ({"block_size": 12}, ConfigError, "block_size is 12 in "),
        ({"sequences": 23}, ConfigError, "the number of sequences is 23 in "),
        ({"positions": "loss_mask"}, ConfigError, "targets.positions is loss_mask in "),
        ({"tokens": {"pack": "concat"}}, ConfigError, "was made from other tokens than "),
        ({"seed": 2}, StoreError, "block 0 of "),
        ({"blocks": 2}, StoreError, "other is incomplete, 16 of 24 sequences"),
        ({"blocks": 0}, StoreError, "other holds no sequence yet"),
        ({"method": None}, ConfigError, "other is a token store, without targets"),
        ({"temperature": 2.0}, ConfigError, "other: loss.temperature: 1.0 differs from"),
    ],
)
def test_caches_that_do_not_belong_together_are_refused_naming_the_key(
    place, tmp_path, changes, kind, said
):
    make_store(tmp_path / "other", **{"seed": 1, "teacher": 1, **changes})
    with pytest.raises(kind) as caught:
        opened(two(place, ensemble=[str(place / "third"), str(tmp_path / "other")]))
    assert str(caught.value).startswith("cache.ensemble.1.dir: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_another_temperature_go_with_it(place, tmp_path):
    make_store(tmp_path / "other", seed=1, method="topk", temperature=2.0)
    (store,) = opened(two(place, ensemble=[str(tmp_path / "other")]))
    assert [other.recipe["temperature"] for other in store.other_teachers] == [2.0]


def test_positions_that_a_teacher_chose_by_itself_are_refused(tmp_path):
    for name in ("cache", "other"):
        make_store(tmp_path / name, positions="entropy")
    said = r"cache\.ensemble\.0\.dir: .*other leaves out positions by its own teacher's entropy"
    with pytest.raises(ConfigError, match=said):
        opened(make_config(tmp_path, cache={"ensemble": [str(tmp_path / "other")]}))


class WithoutTheFirst:
    """A cache whose sequences have no target at their first position."""

    def __init__(self, cache):
        self._cache = cache

    def __getitem__(self, index):
        sample = self._cache[index]
        targets = sample["targets"]
        count = int(targets.counts[0])
        left = replace(
            targets,
            offsets=np.maximum(targets.offsets - count, 0),
            ids=targets.ids[count:],
            weights=targets.weights[count:],
        )
        return sample | {"targets": left}


def test_targets_at_other_positions_are_found_when_they_are_read(place):
    (store,) = opened(two(place, ensemble=[str(place / "third")]))
    names = [(0, 1), (0, 2)]
    batch = micro_batch([store], names, with_targets=True)
    assert len(batch.targets) == 2 * SEQ_LEN
    assert batch.kd_count == 2 * (SEQ_LEN - 2)
    (other,) = store.other_teachers
    wrong = replace(other, source=WithoutTheFirst(other.source))
    with pytest.raises(StoreError, match=r"ensemble\.0\.dir: .*third has .* sequences 1, 2: "):
        micro_batch([replace(store, other_teachers=(wrong,))], names, with_targets=True)


def opened(config):
    """What a run looks at of its caches before it loads anything."""
    stores = with_caches(config, open_sources(config))
    check_divergences(config, stores[0])
    return stores
