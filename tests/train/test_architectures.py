"""Every architecture people distil learns under ZeRO-3 what it learns in a plain torch loop.

The reference takes the model's own logits, and the model's own loss of its routers: nothing of
ours but the order of the sequences.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megadistill.cache.reader import open_cache
from megadistill.config import Config
from megadistill.models.attention import forward_inputs
from megadistill.models.packed_sequences import labels
from megadistill.targets import concatenate
from megadistill.train.schedule import learning_rate
from tests.models.architectures import ARCHITECTURES, VOCAB, save_architecture
from tests.models.made import tiny_tokenizer
from tests.ranks import run_ranks
from tests.train.plain import optimizer_and_order
from tests.train.stores import make_config, make_store

STEPS, COMPARED = 10, 4


def architecture_config(folder, name, **model):
    architecture = ARCHITECTURES[name]
    (folder / name).mkdir()
    save_architecture(folder / name / "model", name, **model)
    return make_config(
        folder / name,
        cache={"dir": str(folder / "cache")},
        data={"pack": architecture.pack},
        student={"attention": architecture.attention},
        train={"steps": STEPS, "lr": 3e-3},
        # By default parameters of up to 100,000 elements, all of these, are left whole.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )


def train_all(mesh, configs):
    """Trains each; what went wrong, by name."""
    from megadistill.errors import MegadistillError
    from megadistill.train.loop import train

    wrong = {}
    for name, config in configs.items():
        try:
            train(config, mesh)
        except MegadistillError as error:
            wrong[name] = str(error)
    return wrong


def plain_losses(config, model=None):
    """[loss, routers' loss, gradient norm] of the first steps, in torch and transformers alone.

    model: to be trained in the place of the student's own folder.
    """
    settings, cache = config.train, open_cache(config.cache.dir)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(
            config.student.model, dtype=torch.float32, attn_implementation=config.student.attention
        ).eval()  # no dropout
    optimizer, order = optimizer_and_order(config, model, cache)
    results = []
    for step in range(COMPARED):
        samples = [cache[i] for _, i in order.batch(step)]
        micro_batches = [
            samples[i : i + settings.micro_batch]
            for i in range(0, len(samples), settings.micro_batch)
        ]
        counts = [sum(_counts(s)[i] for s in samples) for i in (0, 1)]
        optimizer.zero_grad()
        losses, routers = [], []
        for batch in micro_batches:
            loss, router = _plain_loss(model, batch, config, counts)
            share = router / len(micro_batches)
            loss = loss + getattr(model, "router_aux_loss_coef", 0.0) * share
            loss.backward()
            losses.append(loss.item())
            routers.append(share.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings)
        optimizer.step()
        results.append([sum(losses), sum(routers), norm.item()])
    return results


def _counts(sample):
    valid = labels(sample["tokens"], sample["documents"]) != -100
    return int((valid & (sample["targets"].counts > 0)).sum()), int(valid.sum())


def _plain_loss(model, batch, config, counts):
    inputs = forward_inputs(
        model,
        np.stack([s["tokens"] for s in batch]),
        [s["documents"] for s in batch],
        pack=config.data.pack,
    )
    output = model(**inputs)
    log_probs_NV = torch.log_softmax(output.logits.flatten(0, 1).float(), 1)
    labels_N = torch.as_tensor(np.concatenate([labels(s["tokens"], s["documents"]) for s in batch]))
    ce = torch.nn.functional.nll_loss(log_probs_NV, labels_N, ignore_index=-100, reduction="sum")
    targets = concatenate([s["targets"] for s in batch]).torch()
    rows = torch.repeat_interleave(torch.arange(len(targets)), targets.counts)
    valid = labels_N[rows] != -100
    kd = -(targets.weights * log_probs_NV[rows, targets.ids.long()])[valid].sum()
    aux = getattr(output, "aux_loss", None)
    loss = config.loss.kd_weight * kd / counts[0] + config.loss.ce_weight * ce / counts[1]
    return loss, torch.zeros(()) if aux is None else aux


def metrics(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    make_store(folder / "cache", seed=1, vocab=VOCAB)
    return folder


TRAIN = "tests.train.test_architectures:train_all"


def generate_and_train_all(mesh, configs):
    """A cache from each as the teacher, ten steps of the same as the student; sequences, steps."""
    from megadistill.cache.build import build_cache
    from megadistill.train.loop import train

    done = {}
    for name, config in configs.items():
        built = build_cache(config, mesh)
        done[name] = (built.sequences, train(config, mesh).done)
    return done


def whole_path_config(folder, name):
    """A text, a tokenizer and the architecture as teacher (zero3) and as student."""
    architecture, place = ARCHITECTURES[name], folder / name
    save_architecture(place / "teacher", name, vocab_size=512)
    # Apart: in a folder with a model, transformers 5 adds the special tokens of the architecture.
    tiny_tokenizer(place / "tokenizer")
    line = '{"text": "the quick brown fox jumps over lazy dogs number %d while it rains"}\n'
    (place / "text.jsonl").write_text("".join(line % i for i in range(40)))
    return Config(
        data={
            "files": [str(place / "text.jsonl")],
            "dir": str(place / "tokens"),
            "seq_len": 16,
            "tokenizer": str(place / "tokenizer"),
            "block_size": 8,
            "pack": architecture.pack,
        },
        teacher={
            "model": str(place / "teacher"),
            "dtype": "float32",
            "engine": "zero3",
            "micro_batch": 4,
            "attention": architecture.attention,
        },
        cache={"dir": str(place / "cache")},
        loss={"ce_weight": 1.0},
        student={
            "model": str(place / "teacher"),
            "init": "random",
            "attention": architecture.attention,
        },
        train={
            "out_dir": str(place / "out"),
            "steps": STEPS,
            "global_batch": 8,
            "micro_batch": 4,
            "lr": 1e-2,
            "warmup_steps": 1,
        },
    )


@pytest.mark.long
def test_every_architecture_generates_a_cache_and_learns_from_it(tmp_path):
    configs = {name: whole_path_config(tmp_path, name) for name in ARCHITECTURES}
    results = run_ranks(2, "tests.train.test_architectures:generate_and_train_all", configs=configs)
    for done in results:
        assert set(done) == set(ARCHITECTURES)
        for name, (sequences, steps) in done.items():
            assert sequences > 8, name
            assert steps == STEPS, name
    for name, config in configs.items():
        losses = [line["ce_loss"] for line in metrics(config)]  # the text is easily learned
        assert losses[-1] < 0.9 * losses[0], name


QUICK = ["gpt2", "phi", "cohere", "qwen3_moe"]
REST = [name for name in ARCHITECTURES if name not in QUICK]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(REST, marks=pytest.mark.long)], ids=["quick", "rest"]
)
def test_an_architecture_learns_what_a_plain_loop_learns_and_its_export_generates(folder, names):
    configs = {name: architecture_config(folder, name) for name in names}
    assert run_ranks(2, TRAIN, configs=configs) == [{}, {}]
    for name, config in configs.items():
        lines = metrics(config)
        assert len(lines) == STEPS, name
        found = [[line["loss"], 0.0, line["grad_norm"]] for line in lines[:COMPARED]]
        np.testing.assert_allclose(found, plain_losses(config), rtol=2e-4, err_msg=name)
        assert lines[-1]["loss"] < lines[0]["loss"], name
        model = AutoModelForCausalLM.from_pretrained(f"{config.train.out_dir}/model")
        generated = model.generate(torch.arange(1, 9)[None], max_new_tokens=4, do_sample=False)
        assert generated.shape[1] > 8, name


@pytest.mark.parametrize(
    ("names", "world"),
    [
        (["mixtral"], 2),
        pytest.param(["qwen2_moe", "qwen3_moe", "gpt_oss"], 2, marks=pytest.mark.long),
        pytest.param(["mixtral", "qwen2_moe"], 1, marks=pytest.mark.long),
    ],
)
def test_the_routers_loss_is_what_the_model_itself_would_add(folder, tmp_path, names, world):
    (tmp_path / "cache").symlink_to(folder / "cache")
    configs = {
        name: architecture_config(
            tmp_path, name, output_router_logits=True, router_aux_loss_coef=0.5
        )
        for name in names
    }
    assert run_ranks(world, TRAIN, configs=configs) == [{}] * world
    for name, config in configs.items():
        expected = plain_losses(config)
        found = [[line["loss"], line["router_loss"], line["grad_norm"]] for line in metrics(config)]
        np.testing.assert_allclose(found[:COMPARED], expected, rtol=2e-4, err_msg=name)
        assert all(router > 0.5 for _, router, _ in expected)
