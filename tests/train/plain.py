"""The same training as anyone would write it: dense, in one process, with torch alone."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from megadistill.cache.reader import open_cache
from megadistill.data.order import Order
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import labels
from megadistill.targets import concatenate
from megadistill.train.schedule import learning_rate
from tests.student.loss.reference import dense_terms

FEATURES = ("hidden_weight", "attention_weight")


def batch_of(store, order, step):
    """(tokens_BT, documents, labels_N) of a global batch."""
    samples = [store[i] for _, i in order.batch(step)]
    tokens, documents = [s["tokens"] for s in samples], [s["documents"] for s in samples]
    labels_BT = np.stack(list(map(labels, tokens, documents)))
    for row, sample in enumerate(samples):
        labels_BT[row, len(tokens[row]) - int(sample.get("padding", 0)) :] = -100
    labels_N = torch.as_tensor(labels_BT.reshape(-1))
    return np.stack(tokens), documents, labels_N


def clip_and_step(optimizer, model, loss, step, settings):
    """The norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.steps, settings)
    optimizer.step()
    return norm


def optimizer_and_order(config, model, cache, make=None):
    """AdamW, with decay on matrices alone, and the order of the run that `config` says.

    make: another optimizer over these groups.
    """
    settings = config.train
    groups = [[p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)]
    groups = [
        {"params": groups[0], "weight_decay": settings.weight_decay},
        {"params": groups[1], "weight_decay": 0.0},
    ]
    adamw = {"betas": settings.betas, "lr": settings.lr}
    optimizer = make(groups) if make else torch.optim.AdamW(groups, **adamw)
    order = Order(
        [len(cache)],
        block_size=8,
        global_batch=settings.global_batch,
        seed=config.order.seed,
        groups=config.order.groups,
        shuffle=config.order.shuffle,
    )
    return optimizer, order


def plain_steps(config, make=None):
    """[loss, gradient norm] of each step, and the parameters, of the run that `config` says.

    Of an ensemble the loss is the mean of those from each cache, by weights.
    A step whose loss is not finite is left out, with None for its numbers.
    """
    folder = config.student.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings, cache = config.train, open_cache(config.cache.dir)
    teachers = [(cache, 1.0), *((open_cache(c.dir), c.weight) for c in config.cache.ensemble)]
    optimizer, order = optimizer_and_order(config, model, cache, make)
    results = []
    for step in range(settings.steps):
        samples = [cache[i] for _, i in order.batch(step)]
        inputs = forward_inputs(
            model, np.stack([s["tokens"] for s in samples]), [s["documents"] for s in samples]
        )
        labels_N = np.concatenate([labels(s["tokens"], s["documents"]) for s in samples])
        hidden = model.model(**inputs).last_hidden_state.flatten(0, 1)
        loss = 0
        for teacher, weight in teachers:
            targets = concatenate([teacher[i]["targets"] for _, i in order.batch(step)]).torch()
            loss_from_it, _kd_sum, _ce_sum = dense_terms(
                hidden,
                model.lm_head.weight,
                targets,
                torch.as_tensor(labels_N),
                **config.loss.model_dump(
                    exclude={"memory_budget", "curriculum", "options", *FEATURES}
                ),
            )
            loss += weight / sum(w for _, w in teachers) * loss_from_it
        if not loss.isfinite():
            results.append([None, None])
            continue
        norm = clip_and_step(optimizer, model, loss, step, settings)
        results.append([loss.item(), norm.item()])
    return results, dict(model.named_parameters())
