"""The teacher under DeepSpeed says what plain transformers says."""

import numpy as np
import pytest
import torch

from megadistill.config import Config
from tests.models.made import tiny_llama
from tests.ranks import run_ranks

VOCAB = 515  # no multiple of any tp


def settings(model: str, *, pack: str = "isolate", **teacher) -> Config:
    return Config.model_validate(
        {
            "data": {"source": "python-stdlib", "seq_len": 24, "pack": pack},
            "teacher": {"model": model, "dtype": "float32", "micro_batch": 3, **teacher},
        }
    )


def batch() -> tuple[np.ndarray, list[np.ndarray]]:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (3, 24))
    return tokens, [np.array([0, 5, 17]), np.array([0]), np.array([0, 23])]


def plain_log_probs(
    model: str,
    *,
    vocab_size: int | None = None,
    inputs=None,
    pack: str = "isolate",
    attention: str = "sdpa",
) -> torch.Tensor:
    """Every document on its own through transformers: nothing to isolate, nothing of ours.

    Of the first `vocab_size` ids, as if there were no others. pack="concat": every sequence is one
    document.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tokens, documents = inputs or batch()
    rows = []
    for row, starts in zip(tokens, documents, strict=True):
        starts = starts if pack == "isolate" else [0]
        for first, last in zip(starts, [*starts[1:], 24], strict=True):
            with torch.no_grad():
                rows.append(reference(torch.as_tensor(row[None, first:last])).logits[0])
    return torch.log_softmax(torch.cat(rows).float()[:, :vocab_size], 1)


def engine_log_probs(mesh, model: str, engine: str, vocab_size: int = VOCAB, **options):
    from megadistill.teacher.engine import load_teacher

    config = settings(model, tp=mesh.tp, engine=engine, **options)
    teacher = load_teacher(config, mesh, vocab_size=vocab_size)
    shard = sum(p.numel() for p in teacher.engine.module.parameters())
    return teacher.head.log_probs(teacher.hidden(*batch())).clone(), shard


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory):
    return tiny_llama(
        tmp_path_factory.mktemp("teacher"),
        vocab_size=VOCAB,
        num_key_value_heads=4,
        tie_word_embeddings=request.param,
    )


@pytest.mark.parametrize(
    ("ranks", "tp"),
    [(1, 1), (2, 1), (2, 2), (4, 2), (4, 1), (4, 4)],
    ids=["1x1", "2x1", "1x2", "2x2", "4x1", "1x4 (dp x tp)"],
)
def test_tensor_parallel_log_probs_are_those_of_plain_transformers(model, ranks, tp):
    results = run_ranks(
        ranks,
        "tests.teacher.test_engine:engine_log_probs",
        tp=tp,
        model=model,
        engine="tensor_parallel",
    )
    expected = plain_log_probs(model)
    for first in range(0, ranks, tp):
        found = torch.cat([slice_ for slice_, _ in results[first : first + tp]], 1)
        assert (found - expected).abs().max() < 1e-5
    whole = run_ranks(
        1, "tests.teacher.test_engine:engine_log_probs", model=model, engine="tensor_parallel"
    )[0][1]
    if tp > 1:
        # Really sharded: what is left whole is the embedding and the norms.
        assert results[0][1] < 0.75 * whole


@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=["", "offloaded"])
def test_zero3_log_probs_are_those_of_plain_transformers(model, options):
    results = run_ranks(
        2, "tests.teacher.test_engine:engine_log_probs", model=model, engine="zero3", **options
    )
    expected = plain_log_probs(model)
    for found, _ in results:
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("tp", "engine"), [(1, "tensor_parallel"), (2, "tensor_parallel"), (1, "zero3")]
)
def test_rows_above_the_tokenizers_ids_are_no_part_of_the_distribution(model, tp, engine):
    results = run_ranks(
        2,
        "tests.teacher.test_engine:engine_log_probs",
        tp=tp,
        model=model,
        engine=engine,
        vocab_size=450,
    )
    found = torch.cat([slice_ for slice_, _ in results[:tp]], 1)
    assert found.shape[1] == 450
    assert (found - plain_log_probs(model, vocab_size=450)).abs().max() < 1e-5
