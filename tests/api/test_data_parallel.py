"""The loop of one's own under torch's DistributedDataParallel: the steps of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import megadistill
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.train.stores import VOCAB, make_store

STEPS = 4


def train(mesh: Any, *, cache_dir: str, student_dir: str) -> list[float]:
    """The sum of all weights after each step. Rank and world are those of torch.distributed."""
    cache = megadistill.open_cache(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float64)
    student: Any = megadistill.wrap_student(model, cache)
    world = 1
    if dist.is_initialized():
        world, student = dist.get_world_size(), DistributedDataParallel(student)
    loader = DataLoader(
        megadistill.CacheDataset(cache),
        batch_sampler=megadistill.CacheSampler(cache, global_batch=8, max_steps=STEPS),
        collate_fn=megadistill.collate,
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    sums = []
    for batch in loader:
        counts = torch.tensor([batch.kd_count, batch.ce_count], dtype=torch.float64)
        if world > 1:
            dist.all_reduce(counts)
        kd_count, ce_count = (counts / world).tolist()  # gradients are averaged over ranks
        student(batch, ce_weight=0.5, normalizer=(kd_count, ce_count)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sums.append(float(sum(p.detach().abs().sum() for p in model.parameters())))
    return sums


@pytest.mark.parametrize("world", [2])
def test_ranks_together_take_the_steps_of_one_process(tmp_path: Path, world: int) -> None:
    folders = {
        "cache_dir": make_store(tmp_path / "cache", masked=True),  # ranks with other counts
        "student_dir": tiny_llama(tmp_path / "student", vocab_size=VOCAB, hidden_size=32),
    }
    alone = train(None, **folders)
    assert len(set(alone)) == STEPS
    for of_rank in run_ranks(world, "tests.api.test_data_parallel:train", **folders):
        np.testing.assert_allclose(of_rank, alone, rtol=1e-9)
