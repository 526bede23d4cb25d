"""A training loop of one's own: a student learns from a cache, by torch and megadistill alone."""

from __future__ import annotations

import megadistill  # before transformers

# isort: split
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def train(cache_dir: str, student_dir: str, *, steps: int, workers: int = 0) -> list[float]:
    cache = megadistill.open_cache(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    student = megadistill.wrap_student(model, cache)
    sampler = megadistill.CacheSampler(cache, global_batch=8, max_steps=steps)
    dataset = megadistill.CacheDataset(cache)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=megadistill.collate, num_workers=workers
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for batch in loader:
        loss = student(batch, ce_weight=0.5).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
