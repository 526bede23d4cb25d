"""The teacher's head: chunks give what the whole would give, and the whole never exists."""

import numpy as np
import pytest
import torch

from megadistill.targets.distributions import VocabularySlice
from megadistill.teacher.chunked_head import TeacherHead, logit_scale, soft_cap
from megadistill.teacher.select import select_targets
from tests.allocation import AllocationWatch
from tests.cache.targets import METHODS
from tests.ranks import run_ranks

N, H, V = 500, 32, 1500


def parts(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::7] = -100
    keys = torch.stack([torch.zeros(N, dtype=torch.int64), torch.arange(N)], 1)
    return hidden, weight, labels, keys


def head(weight, **settings) -> TeacherHead:
    return TeacherHead(weight, VocabularySlice(0, V), chunk_bytes=4 * V * 30, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("settings", "logits_of"),
    [
        ({}, lambda x: x),
        ({"scale": 0.25}, lambda x: 0.25 * x),
        ({"softcap": 5.0}, lambda x: 5 * torch.tanh(x / 5)),
        ({"bias_V": torch.linspace(-1, 1, V)}, lambda x: x + torch.linspace(-1, 1, V)),
    ],
    ids=["plain", "scale", "softcap", "bias"],
)
def test_log_probs_are_the_softmax_of_the_models_logits(dtype, settings, logits_of):
    hidden, weight, _, _ = parts(dtype)
    found = head(weight, **settings).log_probs(hidden[:30], temperature=1.5)
    logits = logits_of(hidden[:30].double() @ weight.double().T)
    assert (found - torch.log_softmax(logits / 1.5, 1)).abs().max() < 1e-5


def test_scale_and_soft_cap_are_those_of_the_text_model():
    from transformers import CohereConfig, Gemma3Config, GraniteConfig

    assert logit_scale(CohereConfig(logit_scale=0.25)) == 0.25
    assert logit_scale(GraniteConfig(logits_scaling=8.0)) == 0.125
    assert soft_cap(Gemma3Config(text_config={"final_logit_softcapping": 30.0})) == 30.0


def test_chunks_give_the_targets_of_the_whole():
    hidden, weight, labels, keys = parts()
    chunked = head(weight).targets(hidden, labels, keys, method="varopt", tau=0.05).numpy()
    whole = select_targets(
        torch.log_softmax(hidden @ weight.T, 1),
        method="varopt",
        tau=0.05,
        keys_N=keys,
        labels_N=labels,
    ).numpy()
    assert chunked.counts[::7].sum() == 0
    same = chunked.counts == whole.counts
    assert same.mean() > 0.995  # another order of summation may move an id across tau
    np.testing.assert_allclose(chunked.entropy, whole.entropy, atol=1e-4)
    np.testing.assert_allclose(chunked.nll, whole.nll, atol=1e-4)


def chunk_of(mesh) -> int:
    vocab, limit = 2049, 4 * 1024 * 8  # 8 rows fit beside 1024 ids, not beside 1025
    first, last = vocab * mesh.tp_rank // mesh.tp, vocab * (mesh.tp_rank + 1) // mesh.tp
    piece = VocabularySlice(first, last - first, mesh.tp_group)
    return TeacherHead(torch.zeros(last - first, 2), piece, chunk_bytes=limit).chunk


def test_ranks_whose_slices_differ_by_an_id_take_chunks_of_one_size():
    """Else they would come to the collectives a different number of times, and hang."""
    assert run_ranks(2, "tests.teacher.test_chunked_head:chunk_of", tp=2) == [7, 7]


@pytest.mark.parametrize("method", METHODS)
def test_positions_times_vocabulary_is_never_allocated(method):
    hidden, weight, labels, keys = parts()
    watched = head(weight)
    with AllocationWatch() as watch:
        watched.targets(hidden, labels, keys, method=method, tau=0.05, k=20)
    assert 0 < watch.largest <= 2 * watched.chunk * V, (watch.operation, watch.shape)
    assert watch.largest < N * V / 4


def test_the_allocation_watch_sees_what_it_is_there_to_see():
    hidden, weight, _, _ = parts()
    with AllocationWatch() as watch:
        torch.log_softmax(hidden @ weight.T, 1)
    assert watch.largest >= N * V


def test_no_position_with_a_label_is_no_work_and_empty_rows():
    hidden, weight, labels, keys = parts()
    targets = head(weight).targets(hidden, labels * 0 - 100, keys, method="varopt", tau=0.05)
    assert len(targets) == N
    assert int(targets.offsets[-1]) == 0


def sent(mesh, vocab, method, **parameters):
    """Bytes that one rank hands to each other one of its group, of N positions."""
    from megadistill.targets import distributions

    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(vocab, H, generator=generator)
    first, last = vocab * mesh.tp_rank // mesh.tp, vocab * (mesh.tp_rank + 1) // mesh.tp
    slice_ = VocabularySlice(first, last - first, mesh.tp_group if mesh.tp > 1 else None)
    ours = TeacherHead(weight_VH[first:last], slice_, chunk_bytes=4 * slice_.size * 100)
    hidden, _, _, keys = parts()
    labels, bytes_sent = torch.randint(0, vocab, (N,), generator=generator), []
    gather = distributions.dist.all_gather

    def counting(parts, tensor, group):
        bytes_sent.append(tensor.nbytes)
        return gather(parts, tensor, group=group)

    distributions.dist.all_gather = counting
    try:
        ours.targets(hidden, labels, keys, method=method, **parameters)
    finally:
        distributions.dist.all_gather = gather
    return sum(bytes_sent)


@pytest.mark.parametrize("tp", [2, 4])
def test_what_a_position_sends_grows_with_the_entries_and_not_with_the_vocabulary(tp):
    """A rank sends its candidates, 16 bytes each, and a few sums: K * tp in all."""
    ask = "tests.teacher.test_chunked_head:sent"

    def bytes_of(vocab, k):
        found = run_ranks(tp, ask, tp=tp, vocab=vocab, method="topk", k=k)
        assert len(set(found)) == 1
        return found[0] / N

    few, many = bytes_of(1500, 8), bytes_of(1500, 24)
    assert many - few == 16 * 16
    assert bytes_of(6000, 8) == few
    assert few <= 16 * 8 + 64
    small, large = (
        run_ranks(tp, ask, tp=tp, vocab=v, method="varopt", tau=0.1) for v in (1500, 6000)
    )
    assert (
        max(large) / N <= max(small) / N + 8 * 11
    )  # as many more points as are drawn of a flatter one
