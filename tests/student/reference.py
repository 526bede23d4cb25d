"""The loss as one would write it on a blackboard: dense, float64, one position after another."""

import numpy as np
import torch

from megadistill.targets import SAMPLED, SparseTargets


def random_targets(counts, vocab, *, method="varopt", seed=0, temperature=1.0):
    """Targets with rows of the given lengths; a row of 0 is an empty one."""
    rng = np.random.default_rng(seed)
    ids, weights, tails = [], [], []
    for count in counts:
        ids.append(rng.choice(vocab, count, replace=False))
        share = rng.dirichlet(np.ones(count + 1))
        if method in SAMPLED or count == vocab:
            share = share[:count] / share[:count].sum() if count else share[:0]
            tails.append(0.0)
        else:
            tails.append(share[count] if count else 0.0)
            share = share[:count]
        weights.append(share)
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.concatenate(ids).astype(np.int64),
        weights=np.concatenate(weights).astype(np.float32),
        tail=np.array(tails, np.float32),
        method=method,
        temperature=temperature,
    ).torch()


def dense_terms(
    hidden_NH, weight_VH, targets, labels_N, *, temperature=1.0, kd_weight=1.0, ce_weight=0.0,
    label_smoothing=0.0, normalizer=None, bias_V=None, logit_scale=1.0, softcap=None,
):  # fmt: skip
    """(loss, kd_sum, ce_sum) in float64, differentiable by autograd."""
    logits = hidden_NH.double() @ weight_VH.double().T
    if bias_V is not None:
        logits = logits + bias_V.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    kd_sum = ce_sum = logits.new_zeros(())
    kd_count = ce_count = 0
    for n, label in enumerate(labels_N.tolist()):
        if label == -100:
            continue
        log_q = logits[n].log_softmax(0)
        smooth = torch.full_like(log_q, label_smoothing / len(log_q))
        smooth[label] += 1 - label_smoothing
        ce_sum, ce_count = ce_sum - (smooth * log_q).sum(), ce_count + 1
        first, last = targets.offsets[n].item(), targets.offsets[n + 1].item()
        if first == last:
            continue
        kd_count += 1
        ids, p = targets.ids[first:last], targets.weights[first:last].double()
        log_q = (logits[n] / temperature).log_softmax(0)
        kd_sum = kd_sum - (p * log_q[ids]).sum()
        if targets.method not in SAMPLED:
            kd_sum = kd_sum + torch.xlogy(p, p).sum()
            unlisted = torch.ones_like(log_q, dtype=torch.bool)
            unlisted[ids] = False
            tail = targets.tail[n].double()
            if not unlisted.any():
                tail = tail * 0
            # Weights rounded to float32 do not quite sum to 1; this is what bucket_kl adds.
            kd_sum = kd_sum + 1 - p.sum() - tail
            if tail > 0:
                kd_sum = kd_sum + tail * (tail.log() - log_q[unlisted].logsumexp(0))
    kd_normalizer, ce_normalizer = normalizer or (max(kd_count, 1), max(ce_count, 1))
    loss = kd_weight * temperature**2 * kd_sum / kd_normalizer + ce_weight * ce_sum / ce_normalizer
    return loss, kd_sum, ce_sum
