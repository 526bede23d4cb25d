"""The loss as one would write it on a blackboard: dense, float64, one position after another."""

import numpy as np
import torch

from megadistill.targets import SparseTargets
from tests.cache.targets import SAMPLED

STEPS = 2**20  # weights are multiples of 1 / STEPS, so that float32 rows sum to exactly 1


def random_targets(counts, vocab, *, method="varopt", seed=0, temperature=1.0):
    """Targets with rows of the given lengths; a row of 0 is an empty one. No weight is 0."""
    rng = np.random.default_rng(seed)
    ids, weights, tails = [], [], []
    for count in counts:
        ids.append(rng.choice(vocab, count, replace=False))
        has_tail = method not in SAMPLED and 0 < count < vocab
        share = rng.dirichlet(np.ones(count + has_tail)) if count else np.zeros(0)
        steps = np.floor(share * (STEPS - len(share))) + 1
        if count:
            steps[0] += STEPS - steps.sum()
        weights.append(steps[:count] / STEPS)
        tails.append(steps[count] / STEPS if has_tail else 0.0)
    return SparseTargets(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        ids=np.concatenate(ids).astype(np.int64),
        weights=np.concatenate(weights).astype(np.float32),
        tail=np.array(tails, np.float32),
        method=method,
        temperature=temperature,
    ).torch()


def dense_terms(
    hidden_NH,
    weight_VH,
    targets,
    labels_N,
    *,
    divergence="forward_kl",
    beta=0.5,
    alpha=0.1,
    head_mass=0.5,
    temperature=1.0,
    kd_weight=1.0,
    ce_weight=0.0,
    label_smoothing=0.0,
    z_loss=0.0,
    ground_truth_residual=False,
    normalizer=None,
    bias_V=None,
    logit_scale=1.0,
    softcap=None,
    vocab_size=None,
):
    """(loss, kd_sum, ce_sum) in float64, differentiable by autograd."""
    logits = hidden_NH.double() @ weight_VH.double().T
    if bias_V is not None:
        logits = logits + bias_V.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits[:, :vocab_size]
    kd_sum = ce_sum = z_sum = logits.new_zeros(())
    kd_count = ce_count = 0
    for n, label in enumerate(labels_N.tolist()):
        if label == -100:
            continue
        log_q = logits[n].log_softmax(0)
        smooth = torch.full_like(log_q, label_smoothing / len(log_q))
        smooth[label] += 1 - label_smoothing
        ce_sum, ce_count = ce_sum - (smooth[smooth > 0] * log_q[smooth > 0]).sum(), ce_count + 1
        z_sum = z_sum + logits[n].logsumexp(0) ** 2
        if targets.offsets[n] == targets.offsets[n + 1]:
            continue
        kd_count += 1
        p, q = buckets(targets, n, logits[n], label, ground_truth_residual)
        if targets.method in SAMPLED:
            kd_sum = kd_sum - (p * q.log()).sum()
            continue
        power = targets.temperature / temperature
        p, q = (r**power / (r**power).sum() for r in (p, q))
        kd_sum = kd_sum + naive_divergence(
            divergence, p, q, beta=beta, alpha=alpha, head_mass=head_mass
        )
    kd_normalizer, ce_normalizer = normalizer or (max(kd_count, 1), max(ce_count, 1))
    loss = kd_weight * temperature**2 * kd_sum / kd_normalizer
    loss = loss + (ce_weight * ce_sum + z_loss * z_sum) / ce_normalizer
    return loss, kd_sum, ce_sum


def buckets(targets, n, logits_V, label, ground_truth_residual=False):
    """(p, q) of position n at the targets' temperature: listed ids, and the tail where there is."""
    first, last = targets.offsets[n].item(), targets.offsets[n + 1].item()
    ids, p = targets.ids[first:last], targets.weights[first:last].double()
    q = (logits_V / targets.temperature).softmax(0)
    if targets.method in SAMPLED:
        return p, q[ids]
    tail = targets.tail[n].double()
    if ground_truth_residual:
        if label not in ids:
            ids, p = torch.cat([ids, torch.tensor([label])]), torch.cat([p, tail.new_zeros(1)])
        p, tail = p + tail * (ids == label), tail * 0
    unlisted = torch.ones_like(q, dtype=torch.bool)
    unlisted[ids] = False
    if not unlisted.any():
        return p, q[ids]
    return torch.cat([p, tail[None]]), torch.cat([q[ids], q[unlisted].sum()[None]])


def naive_divergence(name, p, q, *, beta=0.5, alpha=0.1, head_mass=0.5):
    """Of two distributions that each sum to 1; the last bucket is the tail."""
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skewed_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if name == "skewed_reverse_kl":
        return kl(q, alpha * q + (1 - alpha) * p)
    if name == "tvd":
        return (p - q).abs().sum() / 2
    if name == "hellinger":  # of tests/train/outside.py
        return (p.sqrt() - q.sqrt()).square().sum() / 2
    assert name == "adaptive_kl"
    share = naive_head_share(p, q, head_mass)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def naive_head_share(p, q, head_mass):
    head, mass = set(), 0.0
    for i in sorted(range(len(p) - 1), key=lambda i: -p[i].item()):
        if mass >= head_mass:
            break
        head.add(i)
        mass += p[i].item()
    gaps = [abs(a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    return sum(gap for i, gap in enumerate(gaps) if i in head) / sum(gaps) if sum(gaps) else 0.5


def kl(a, b):
    there = a > 0
    return (a[there] * (a[there] / b[there]).log()).sum()


def naive_calibration_error(logits_NV, labels_N, bins=15):
    """Expected calibration error of the first choice, a position after another into its bin."""
    dealt = [[] for _ in range(bins)]
    for logits_V, label in zip(logits_NV.double(), labels_N.tolist(), strict=True):
        if label != -100:
            prob, best = logits_V.softmax(0).max(0)
            bin_ = next(m for m in range(bins) if prob <= (m + 1) / bins or m == bins - 1)
            dealt[bin_].append((prob.item(), int(best) == label))
    count = sum(len(positions) for positions in dealt)
    error = 0.0
    for positions in filter(None, dealt):
        prob, right = (sum(column) / len(positions) for column in zip(*positions, strict=True))
        error += len(positions) / count * abs(right - prob)
    return error
