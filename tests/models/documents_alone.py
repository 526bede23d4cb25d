"""Each document alone in plain transformers: logits, and the steps of a student."""

import contextlib
import sys

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megadistill.cache.reader import open_cache
from megadistill.models.packed_sequences import labels
from megadistill.targets import concatenate
from megadistill.train.schedule import learning_rate
from tests.models.architectures import save_architecture
from tests.train.plain import optimizer_and_order


def saved(folder, name, **more):
    path = folder / name / ("student" if more else "model")
    if not path.exists():
        save_architecture(path, name, **more)
    return str(path)


def plain(path):
    config = AutoConfig.from_pretrained(path)
    kind = type(AutoModelForCausalLM.from_config(config))
    attention = "sdpa" if kind._supports_sdpa else "eager"
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=attention
    ).eval()


def alone(model, tokens_BT, documents):
    """[N, V]: the logits of plain transformers for each document by itself."""
    rows = []
    for tokens_T, starts in zip(tokens_BT, documents, strict=True):
        for first, last in zip(starts, [*starts[1:], len(tokens_T)], strict=True):
            ids = torch.as_tensor(tokens_T[None, first:last].astype(np.int64))
            rows.append(model(ids, use_cache=False).logits)
    return torch.cat(rows, 1)[0].float()


def plain_steps(config):
    """[loss, routers' loss, gradient norm] of each step, each document run alone in torch."""
    train, cache = config.train, open_cache(config.cache.dir)
    model = plain(config.student.model).train()  # in eval mode xLSTM has no gradients
    optimizer, order = optimizer_and_order(config, model, cache)
    weight = getattr(model, "router_aux_loss_coef", 0.0) if has_routers(model) else 0.0
    results = []
    for step in range(train.steps):
        samples = [cache[i] for _, i in order.batch(step)]
        counts = [sum(counted(s)[i] for s in samples) for i in (0, 1)]
        optimizer.zero_grad()
        total = routers = 0.0
        for first in range(0, len(samples), train.micro_batch):
            batch = samples[first : first + train.micro_batch]
            with router_logits_kept(model) as kept:
                logits_NV = alone(
                    model, np.stack([s["tokens"] for s in batch]), [s["documents"] for s in batch]
                )
            loss = distillation(logits_NV, batch, config, counts)
            if weight:
                router = balance(model, kept) * train.micro_batch / len(samples)
                loss, routers = loss + weight * router, routers + router.item()
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train.steps, train)
        optimizer.step()
        results.append([total, routers, norm.item()])
    return results


def has_routers(model):
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


@contextlib.contextmanager
def router_logits_kept(model):
    """The router logits of every forward inside: a list of tuples, one entry a layer."""
    kept, forward = [], model.base_model.forward

    def kept_forward(*args, **options):
        output = forward(*args, **options)
        kept.append(getattr(output, "router_logits", None))
        return output

    model.base_model.forward = kept_forward
    try:
        yield kept
    finally:
        del model.base_model.forward


def balance(model, kept):
    layers = tuple(
        torch.cat([each.flatten(0, -2) for each in layer]) for layer in zip(*kept, strict=True)
    )
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    return function(layers, model.num_experts, model.num_experts_per_tok)


def counted(sample):
    valid = labels(sample["tokens"], sample["documents"]) != -100
    return int((valid & (sample["targets"].counts > 0)).sum()), int(valid.sum())


def distillation(logits_NV, batch, config, counts):
    log_probs_NV = torch.log_softmax(logits_NV, 1)
    labels_N = torch.as_tensor(np.concatenate([labels(s["tokens"], s["documents"]) for s in batch]))
    ce = torch.nn.functional.nll_loss(log_probs_NV, labels_N, ignore_index=-100, reduction="sum")
    targets = concatenate([s["targets"] for s in batch]).torch()
    rows = torch.repeat_interleave(torch.arange(len(targets)), targets.counts)
    valid = labels_N[rows] != -100
    kd = -(targets.weights * log_probs_NV[rows, targets.ids.long()])[valid].sum()
    return config.loss.kd_weight * kd / counts[0] + config.loss.ce_weight * ce / counts[1]
