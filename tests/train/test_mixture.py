"""Training from several caches: which may be mixed, where they may lie, how it resumes."""

import json

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.blocks.remote.upload import copy_store
from megadistill.data.order import Order
from megadistill.errors import ConfigError, RecipeError, StoreError
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import labels
from megadistill.train.training_source import open_sources
from tests.ranks import run_ranks
from tests.student.loss.reference import dense_terms
from tests.train.stores import TOKENIZER, make_config, make_store

RUN, STOPPED, MESSAGE = (f"tests.train.runs:{n}" for n in ("run", "run_until_told", "message"))


def losses(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line)["loss"] for line in file]


def mixed(folder, second, **sections):
    return make_config(
        folder, cache={"dir": [str(folder / "cache"), {"dir": second, "weight": 2}]}, **sections
    )


def test_a_mixture_trains_and_goes_on_bit_for_bit(tmp_path):
    second = make_store(tmp_path / "second", sequences=10, seed=3)
    config = mixed(tmp_path, second, train={"steps": None, "epochs": 1})
    # 24 + 2 * 10 sequences in batches of 8.
    assert run_ranks(2, RUN, config=config) == [6, 6]
    stopped = mixed(
        tmp_path, second, train={"steps": None, "epochs": 1, "out_dir": str(tmp_path / "stopped")}
    )
    assert 1 <= run_ranks(2, STOPPED, config=stopped, lines=1)[0] < 6
    assert run_ranks(2, RUN, config=stopped) == [6, 6]
    assert losses(stopped) == losses(config)


def test_caches_of_several_methods_are_mixed_each_by_its_own(tmp_path):
    """The loss of the first step is that of each sequence by the method of its cache."""
    second = make_store(tmp_path / "second", sequences=10, seed=3, method="topk", k=5)
    config = mixed(tmp_path, second, train={"steps": 2})
    assert run_ranks(2, RUN, config=config) == [2, 2]
    stores = open_sources(config)
    order = Order(
        [24, 10],
        block_size=[8, 8],
        weights=[1, 2],
        global_batch=8,
        seed=config.order.seed,
        groups=config.order.groups,
        shuffle=config.order.shuffle,
    )
    names = order.batch(0)
    assert {store for store, _ in names} == {0, 1}
    model = AutoModelForCausalLM.from_pretrained(config.student.model, dtype=torch.float32)
    kd_sum, ce_sum, positions = 0.0, 0.0, 0
    for store, sequence in names:
        sample = stores[store][sequence]
        tokens, documents = sample["tokens"][None], [sample["documents"]]
        with torch.no_grad():
            inputs = forward_inputs(model, tokens, documents)
            hidden_NH = model.model(**inputs).last_hidden_state.flatten(0, 1)
            labels_N = torch.as_tensor(labels(sample["tokens"], sample["documents"]))
            _, kd, ce = dense_terms(
                hidden_NH, model.lm_head.weight, sample["targets"].torch(), labels_N
            )
        kd_sum, ce_sum = kd_sum + float(kd), ce_sum + float(ce)
        positions += int((labels_N != -100).sum())
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        first = json.loads(file.readline())
    assert first["kd_loss"] == pytest.approx(kd_sum / positions, rel=1e-5)
    assert first["ce_loss"] == pytest.approx(ce_sum / positions, rel=1e-5)


def test_a_list_is_checked_cache_by_cache_against_the_loss(tmp_path):
    second = make_store(tmp_path / "second", method="topk", k=5)
    config = mixed(tmp_path, second, loss={"divergence": "tvd"})
    ((kind, said),) = run_ranks(1, MESSAGE, config=config)
    assert kind == ConfigError.__name__
    assert "tvd cannot be computed from varopt targets" in said
    assert f"({tmp_path}/cache holds varopt targets)" in said


def test_caches_with_and_without_notes_of_the_teacher_are_mixed(tmp_path):
    second = make_store(tmp_path / "second", method="topk", k=5, seed=4)
    third = make_store(tmp_path / "third", method="topk", k=5, notes=False)
    config = make_config(tmp_path, cache={"dir": [second, third]}, train={"steps": 2})
    assert run_ranks(1, RUN, config=config) == [2]


def test_a_run_is_not_resumed_with_other_weights(tmp_path):
    second = make_store(tmp_path / "second", sequences=10, seed=3)
    run_ranks(1, RUN, config=mixed(tmp_path, second, train={"steps": 2}))
    other = make_config(
        tmp_path, cache={"dir": [str(tmp_path / "cache"), second]}, train={"steps": 2}
    )
    kind, said = run_ranks(1, MESSAGE, config=other)[0]
    assert kind == RecipeError.__name__
    assert "run.json: cache.dir.1.weight is 2.0, this run's is 1.0: restore" in said


def test_training_from_a_url_is_training_from_the_folder(tmp_path):
    config = make_config(tmp_path, train={"steps": 2})
    url = f"file://{tmp_path}/far"
    copy_store(config.cache.dir, url)
    far = make_config(
        tmp_path,
        cache={"dir": url, "local_dir": str(tmp_path / "local")},
        train={"steps": 2, "out_dir": str(tmp_path / "far_out")},
    )
    run_ranks(1, RUN, config=config)
    run_ranks(1, RUN, config=far)
    assert losses(far) == losses(config)
    assert list((tmp_path / "local").glob("far-*/shard.*.mds"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": TOKENIZER | {"content": "1" * 64}}, "tokenizer is 0000000000000000 in "),
        ({"vocab_size": 97}, "vocab_size is 96 in "),
        ({"method": None}, "kind is cache in "),
    ],
)
def test_caches_that_cannot_be_mixed_are_refused_naming_both(tmp_path, changes, said):
    second = make_store(tmp_path / "second", **changes)
    loss = {"kd_weight": 0.0} if changes.get("method", "") is None else {}
    with pytest.raises(ConfigError) as caught:
        open_sources(mixed(tmp_path, second, loss=loss))
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
