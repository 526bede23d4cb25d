"""Training as a whole: real engines on one and two ranks, against a plain torch loop."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.ranks import run_ranks
from tests.train.plain import plain_steps
from tests.train.stores import make_config, make_store

RUN, STOPPED, MESSAGE = (f"tests.train.runs:{n}" for n in ("run", "run_until_told", "message"))


def metrics(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def series(config, *keys):
    return [
        [record[key] for key in keys or ("loss", "kd_loss", "ce_loss", "grad_norm")]
        for record in metrics(config)
    ]


def weights(config):
    return load_file(f"{config.train.out_dir}/model/model.safetensors")


def elsewhere(config, name, **train):
    """The same run in another folder."""
    folder = config.train.out_dir.removesuffix("out") + name
    return config.model_copy(
        update={"train": config.train.model_copy(update={"out_dir": folder, **train})}
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("run"), train={"save_every": 1, "keep": 10})
    assert run_ranks(2, RUN, config=config) == [4, 4]
    return config


def test_two_ranks_do_what_a_plain_torch_loop_does(undisturbed):
    expected, parameters = plain_steps(undisturbed)
    np.testing.assert_allclose(series(undisturbed, "loss", "grad_norm"), expected, rtol=1e-5)
    for name, value in weights(undisturbed).items():
        torch.testing.assert_close(value, parameters[name].detach(), rtol=1e-4, atol=2e-5)


def test_a_coarse_divergence_with_every_other_term_is_what_a_plain_torch_loop_does(tmp_path):
    make_store(tmp_path / "cache", seed=1, method="topk")
    loss = {
        "divergence": "jsd",
        "beta": 0.3,
        "temperature": 2.0,
        "z_loss": 0.01,
        "ce_weight": 0.5,
        "label_smoothing": 0.1,
        "memory_budget": 0,
    }
    config = make_config(tmp_path, loss=loss, targets={"method": "topk"}, train={"steps": 3})
    assert run_ranks(2, RUN, config=config) == [3, 3]
    expected, _ = plain_steps(config)
    np.testing.assert_allclose(series(config, "loss", "grad_norm"), expected, rtol=1e-5)
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "loss: 1 x coarse jsd at temperature 2 (over listed ids and tail, put into" in card


def test_one_rank_does_what_two_ranks_do(undisturbed):
    config = elsewhere(undisturbed, "one", micro_batch=4)
    run_ranks(1, RUN, config=config)
    np.testing.assert_allclose(series(config), series(undisturbed), rtol=1e-5)


def test_a_line_of_metrics_holds_what_the_contract_names(undisturbed):
    lines = metrics(undisturbed)
    assert set(lines[0]) == {
        "step",
        "loss",
        "kd_loss",
        "ce_loss",
        "lr",
        "grad_norm",
        "sequences",
        "tokens",
        "tokens_per_s",
        "data_s",
        "step_s",
        "memory_used",
        "memory_total",
        "flops",
    }
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (lines[-1]["sequences"], lines[-1]["tokens"]) == (32, 512)


def test_told_to_stop_it_saves_and_goes_on_bit_for_bit(undisturbed):
    config = elsewhere(undisturbed, "stopped", save_every=None)
    done = run_ranks(2, STOPPED, config=config, lines=1)
    assert done[0] == done[1]
    assert 1 <= done[0] < 4
    assert run_ranks(2, RUN, config=config) == [4, 4]
    assert series(config) == series(undisturbed)
    for name, value in weights(config).items():
        assert torch.equal(value, weights(undisturbed)[name])


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_killed_after_any_checkpoint_it_goes_on_bit_for_bit(undisturbed, kept):
    config = elsewhere(undisturbed, f"killed{kept}")
    shutil.copytree(undisturbed.train.out_dir, config.train.out_dir)
    shutil.rmtree(f"{config.train.out_dir}/model")
    for step in range(kept + 1, 5):
        shutil.rmtree(f"{config.train.out_dir}/checkpoints/step-{step:06d}")
    with open(f"{config.train.out_dir}/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut short
    assert run_ranks(2, RUN, config=config) == [4, 4]
    assert series(config) == series(undisturbed)
    for name, value in weights(config).items():
        assert torch.equal(value, weights(undisturbed)[name])


def test_a_finished_run_is_left_as_it_is(undisturbed):
    from pathlib import Path

    def state():
        files = Path(undisturbed.train.out_dir).rglob("*")
        return {str(f): f.stat().st_mtime_ns for f in files}

    before = state()
    assert run_ranks(2, RUN, config=undisturbed) == [4, 4]
    assert state() == before


def test_a_number_that_is_not_finite_stops_all_ranks_and_names_the_sequences(undisturbed):
    config = elsewhere(undisturbed, "wild", lr=1e30, steps=6)
    results = run_ranks(2, MESSAGE, config=config)
    assert results[0] == results[1]
    kind, text = results[0]
    assert kind == "TrainError"
    assert "is not finite; among sequences" in text
    assert sum(part.strip(",").isdigit() for part in text.split(":")[1].split()) == 8


def test_a_token_store_trains_on_hard_labels_alone(tmp_path):
    make_store(tmp_path / "cache", method=None)
    config = make_config(tmp_path, loss={"kd_weight": 0.0, "ce_weight": 1.0})
    run_ranks(2, RUN, config=config)
    lines = metrics(config)
    assert all(line["kd_loss"] is None and line["loss"] == line["ce_loss"] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_no_tensor_of_positions_by_vocabulary_exists_in_a_training_step(tmp_path):
    from tests.train.runs import make_wide_model

    make_wide_model(tmp_path / "model")
    make_store(tmp_path / "cache", vocab=997, sequences=64, method="topk")
    # DeepSpeed's own bucket for gradients holds half a billion elements by default.
    small = {"zero_optimization": {"reduce_bucket_size": 20_000}}
    config = make_config(tmp_path, train={"global_batch": 64, "micro_batch": 32}, deepspeed=small)
    for largest, operation in run_ranks(2, "tests.train.runs:largest_allocation", config=config):
        assert largest == 112 * 997, (
            operation
        )  # a chunk: a quarter of the 448 positions with labels


@pytest.mark.parametrize("tied", [False, True])
def test_the_exported_model_gives_the_engines_logits(tmp_path, tied):
    from tests.models.made import tiny_llama, tiny_tokenizer

    tiny_llama(tmp_path / "model", vocab_size=96, tie_word_embeddings=tied)
    tiny_tokenizer(tmp_path / "teacher", vocab_size=300)
    config = make_config(tmp_path, train={"global_batch": 4})
    logits = run_ranks(2, "tests.train.runs:logits_after_training", config=config)[0]
    model = AutoModelForCausalLM.from_pretrained(f"{config.train.out_dir}/model")
    with torch.no_grad():
        ours = model(torch.arange(12).reshape(2, 6)).logits
    torch.testing.assert_close(ours, torch.as_tensor(logits), rtol=1e-5, atol=1e-5)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(f"{config.train.out_dir}/model")("def").input_ids


def test_weights_change_where_the_curriculum_says(undisturbed):
    """Until the jump it is a run on the teacher's targets alone, then one on both."""
    loss = undisturbed.loss.model_copy(update={"ce_weight": 0.0, "label_smoothing": 0.0})
    alone = elsewhere(undisturbed, "alone").model_copy(update={"loss": loss})
    points = ((0.0, 0.0), (0.5, 0.0), (0.5, 2.0))
    loss = loss.model_copy(
        update={"ce_weight": points, "label_smoothing": ((0.5, 0.0), (1.0, 0.4))}
    )
    jump = elsewhere(undisturbed, "jump").model_copy(update={"loss": loss})
    for config in (alone, jump):
        assert run_ranks(1, RUN, config=config) == [4]
    columns = ("loss", "kd_loss", "grad_norm")
    before, after = series(alone, *columns), series(jump, *columns)
    np.testing.assert_array_equal(before[:2], after[:2])
    lines = metrics(jump)
    assert [line["ce_weight"] for line in lines] == [0, 0, 2, 2]
    assert [line["label_smoothing"] for line in lines] == pytest.approx([0, 0, 0, 0.2])
    assert lines[2]["loss"] == pytest.approx(lines[2]["kd_loss"] + 2 * lines[2]["ce_loss"])
    assert before[2][1] == pytest.approx(after[2][1])  # the same student so far
    assert after[2][2] > 1.2 * before[2][2]
    assert lines[3]["kd_loss"] != pytest.approx(before[3][1])
