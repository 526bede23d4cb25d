"""Held-out evaluation against a dense reference, at one and two ranks."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.cache.reader import open_cache
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import labels
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.student.loss.reference import dense_terms, naive_calibration_error
from tests.train.stores import VOCAB, make_config, make_store


def plain_figures(config, count):
    model = AutoModelForCausalLM.from_pretrained(config.student.model)
    cache, sums, agreed, positions = open_cache(config.eval.cache), np.zeros(2), 0, 0
    logits, truth = [], []
    for i in range(count):
        sample = cache[i]
        inputs = forward_inputs(model, sample["tokens"][None], [sample["documents"]])
        with torch.no_grad():
            hidden = model.model(**inputs).last_hidden_state[0]
        targets = sample["targets"].torch()
        labels_N = labels(sample["tokens"], sample["documents"])
        _, kd, ce = dense_terms(hidden, model.lm_head.weight, targets, torch.as_tensor(labels_N))
        sums += [kd.item(), ce.item()]
        logits.append(hidden @ model.lm_head.weight.T)
        truth.append(torch.as_tensor(labels_N))
        best = logits[-1].argmax(1)
        for n in np.flatnonzero(labels_N != -100):
            positions += 1
            agreed += int(best[n] == targets.ids[targets.offsets[n]])
    return {
        "loss": sums[1] / positions,
        "perplexity": math.exp(sums[1] / positions),
        "kl": sums[0] / positions,
        "top1_agreement": agreed / positions,
        "calibration_error": naive_calibration_error(torch.cat(logits), torch.cat(truth)),
        "positions": positions,
        "sequences": count,
        "teacher_loss": 2.5,
        "teacher_entropy": 1.5,
    }


@pytest.mark.parametrize(("world", "limit"), [(1, None), (2, None), (2, 3)])
def test_figures_are_those_of_a_dense_model_whatever_the_last_batch_holds(tmp_path, world, limit):
    make_store(tmp_path / "heldout", method="topk", sequences=9, seed=5)
    # Sure enough of itself that its first choices lie in several bins.
    sizes = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.6}
    tiny_llama(tmp_path / "model", vocab_size=VOCAB, **sizes)
    config = make_config(
        tmp_path, eval={"cache": str(tmp_path / "heldout"), "max_sequences": limit}
    )
    expected = plain_figures(config, limit or 9)
    for figures in run_ranks(world, "tests.train.runs:held_out", config=config):
        assert figures == pytest.approx(expected, rel=2e-2)  # the notes are a byte each
        for name in (
            "loss",
            "perplexity",
            "kl",
            "top1_agreement",
            "calibration_error",
            "positions",
        ):
            assert figures[name] == pytest.approx(expected[name], rel=1e-5), name


def test_training_evaluates_when_it_is_due_and_at_the_end(tmp_path):
    import json

    make_store(tmp_path / "heldout", method="topk", sequences=9, seed=5)
    config = make_config(
        tmp_path, eval={"cache": str(tmp_path / "heldout")}, train={"eval_every": 3}
    )
    run_ranks(2, "tests.train.runs:run", config=config)
    lines = (tmp_path / "out" / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 4]
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    held_out = json.loads(lines[-1])
    assert f"held out: loss {held_out['loss']:.4g}, perplexity" in card
    assert f"calibration_error {held_out['calibration_error']:.4g}" in card
