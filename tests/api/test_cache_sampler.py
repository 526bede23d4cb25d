"""The order of training through torch's DataLoader: at every rank count, resumed at every step."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import megadistill
from megadistill.cache.reader import Cache
from megadistill.data.order import Order
from megadistill.errors import ArgumentError, StoreError
from tests.train.stores import SEQ_LEN, make_config, make_store

BATCH, STEPS = 6, 9  # 22 sequences: more than two epochs, and batches that straddle them


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("sampler")
    return megadistill.open_cache(make_store(folder / "cache", sequences=22, block_size=4))


def sampler_of(cache: Cache, **settings: Any) -> megadistill.CacheSampler:
    return megadistill.CacheSampler(
        cache, **{"global_batch": BATCH, "max_steps": STEPS, **settings}
    )


def joined(parts: Iterable[list]) -> list:
    return list(chain.from_iterable(parts))


def global_steps(cache: Cache, *, world: int, state: Any = None, **settings: Any) -> list:
    """Each step's sequences, the micro-batches of all ranks put together."""
    ranks = []
    for rank in range(world):
        sampler = sampler_of(cache, rank=rank, world=world, **settings)
        if state is not None:
            sampler.load_state_dict(state)
        drawn = list(sampler)
        size = sampler.grad_accum_steps
        ranks.append([joined(drawn[i : i + size]) for i in range(0, len(drawn), size)])
    return [joined(parts) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_resumed_at_every_step_and_rank_count_the_sequences_are_the_same(
    cache: Cache, shuffle: bool
) -> None:
    whole = global_steps(cache, world=1, shuffle=shuffle)
    assert len(whole) == STEPS
    for world in (1, 2, 3):
        assert global_steps(cache, world=world, shuffle=shuffle) == whole
        assert global_steps(cache, world=world, micro_batch=1, shuffle=shuffle) == whole
    for step in range(STEPS + 1):
        for saved_by in (1, 2, 3):
            # Every rank draws up to the step; the state is the same on all of them.
            states = []
            for rank in range(saved_by):
                sampler = sampler_of(cache, rank=rank, world=saved_by, shuffle=shuffle)
                for _ in zip(range(step), sampler, strict=False):
                    pass
                states.append(sampler.state_dict(step))
            assert states.count(states[0]) == saved_by
            for world in (1, 2, 3):
                resumed = global_steps(cache, world=world, state=states[0], shuffle=shuffle)
                assert resumed == whole[step:]


def test_three_epochs_have_every_sequence_three_times(cache: Cache) -> None:
    drawn = joined(global_steps(cache, world=1, max_steps=11))  # 66 = 3 epochs of 22
    assert sorted(drawn) == sorted(list(range(22)) * 3)


def test_the_order_is_that_of_the_training_program(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache = megadistill.open_cache(tmp_path / "cache")
    order = Order(
        [24],
        block_size=8,
        global_batch=config.train.global_batch,
        seed=config.order.seed,
        groups=config.order.groups,
        shuffle=config.order.shuffle,
    )
    sampler = megadistill.CacheSampler(
        cache, global_batch=config.train.global_batch, seed=config.order.seed
    )
    for step in range(7):
        assert sampler.step_rows(step) == [i for _, i in order.batch(step)]


def test_without_workers_the_state_is_that_of_the_loop_also_inside_a_step(cache: Cache) -> None:
    sampler = sampler_of(cache, micro_batch=2)
    loader = DataLoader(
        megadistill.CacheDataset(cache), batch_sampler=sampler, collate_fn=megadistill.collate
    )
    assert len(loader) == 3 * STEPS
    for number, batch in enumerate(loader, 1):
        assert len(batch) == 2
        # A step that is not whole is done again: its gradients are not in the checkpoint.
        assert sampler.state_dict()["consumed"] == number // 3 * BATCH
        if number == 8:
            break
    assert len(sampler) == 3 * STEPS - 8
    assert next(iter(sampler)) == sampler.step_rows(2)[4:6]


def test_batches_of_workers_are_those_read_here_and_hold_what_the_cache_holds(cache: Cache) -> None:
    batches = {
        workers: list(
            DataLoader(
                megadistill.CacheDataset(cache),
                batch_sampler=sampler_of(cache, max_steps=4),
                collate_fn=megadistill.collate,
                num_workers=workers,
                multiprocessing_context=context,
            )
        )
        for workers, context in ((0, None), (2, "fork"), (1, "spawn"))
    }
    rows = global_steps(cache, world=1, max_steps=4)
    for here, forked, spawned, step in zip(*batches.values(), rows, strict=True):
        for other in (forked, spawned):
            assert torch.equal(here.tokens_BT, other.tokens_BT)
            assert torch.equal(here.targets.ids, other.targets.ids)
            assert torch.equal(here.targets.weights, other.targets.weights)
        samples = [cache[i] for i in step]
        assert here.tokens_BT.tolist() == [s["tokens"].tolist() for s in samples]
        assert here.targets.counts.tolist() == joined(s["targets"].counts.tolist() for s in samples)
        for row, sample in enumerate(samples):
            tokens, starts = sample["tokens"].tolist(), sample["documents"].tolist()
            assert here.labels_BT[row].tolist() == [
                -100 if t == SEQ_LEN - 1 or t + 1 in starts else tokens[t + 1]
                for t in range(SEQ_LEN)
            ]
        assert here.ce_count == int((here.labels_BT != -100).sum())
        assert here.kd_count == sum(
            label != -100 and count > 0
            for label, count in zip(
                here.labels_BT.flatten().tolist(), here.targets.counts.tolist(), strict=True
            )
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"global_batch": 0}, "global_batch is 0, expected an integer of at least 1"),
        ({"rank": 0, "world": 4}, "global_batch is 6, expected a multiple of world 4"),
        ({"rank": 3, "world": 3}, "rank is 3, expected 0 to 2"),
        ({"rank": 1}, "rank is 1 and world None, expected both or neither"),
        ({"micro_batch": 4}, "micro_batch is 4, expected a divisor of 6"),
        ({"groups": 4}, "groups is 4, expected a divisor of global_batch 6"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(cache: Cache, settings: Any, said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        sampler_of(cache, **settings)
    assert said in str(caught.value)


def test_a_state_of_another_order_is_refused_and_an_endless_sampler_has_no_length(
    cache: Cache,
) -> None:
    state = sampler_of(cache).state_dict(3)
    for name, settings in (("seed", {"seed": 1}), ("global_batch", {"global_batch": 12})):
        with pytest.raises(ArgumentError, match=f"state: {name} is"):
            sampler_of(cache, **settings).load_state_dict(state)
    with pytest.raises(ArgumentError, match="consumed is 7, expected a multiple of global_batch 6"):
        sampler_of(cache).load_state_dict({**state, "consumed": 7})
    with pytest.raises(TypeError, match="no length without max_steps"):
        len(sampler_of(cache, max_steps=None))


def test_an_incomplete_cache_and_what_is_no_cache_are_refused(tmp_path: Path) -> None:
    part = megadistill.open_cache(make_store(tmp_path / "part", blocks=1))
    with pytest.raises(StoreError, match=r"part: is incomplete, 8 of 24 sequences: run"):
        megadistill.CacheDataset(part)
    with pytest.raises(ArgumentError, match="cache is a str, expected a Cache"):
        megadistill.CacheDataset("part")  # type: ignore[arg-type]


def test_samples_of_different_length_or_method_are_no_batch(tmp_path: Path, cache: Cache) -> None:
    other = megadistill.open_cache(make_store(tmp_path / "other", method="topk"))
    with pytest.raises(ArgumentError, match="samples have method, temperature"):
        megadistill.collate([cache[0], other[0]])
    short = {**cache[0], "tokens": np.zeros(4, np.uint32)}
    with pytest.raises(ArgumentError, match=r"samples have tokens \[4, 16\]"):
        megadistill.collate([cache[0], short])


def test_hugging_faces_accelerate_moves_a_batch(cache: Cache) -> None:
    from accelerate.utils import send_to_device

    moved = send_to_device(megadistill.collate([cache[0], cache[1]]), "meta")
    assert moved.tokens_BT.device.type == moved.targets.ids.device.type == "meta"
    assert isinstance(moved.documents[0], np.ndarray)
