"""The online teacher answers what a cache would hold, at every layout."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from megadistill.config import Config
from megadistill.errors import ConfigError
from megadistill.train.reporting.metrics import step_line
from tests.models.made import teacher_and_text, tiny_llama
from tests.ranks import run_ranks

HERE, RUN = "tests.train.online.test_online_teacher", "tests.train.runs:run"
VOCAB, STEPS = 512, 10


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with a teacher, a smaller student of its vocabulary, and a text."""
    folder = teacher_and_text(tmp_path_factory.mktemp("pair"), documents=150)
    tiny_llama(folder / "student", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, seed=1)
    return folder


def settings(pair, out="out", **sections):
    keys = {
        "data": {
            "files": [str(pair / "text.jsonl")],
            "dir": str(pair / "tokens"),
            "seq_len": 24,
            "block_size": 8,
            "workers": 1,
        },
        "teacher": {
            "model": str(pair / "teacher"),
            "dtype": "float32",
            "mode": "online",
            "micro_batch": 3,
        },
        "targets": {"method": "exact"},
        "cache": {"dir": str(pair / "cache"), "min_free": 0},
        "student": {"model": str(pair / "student")},
        "loss": {"ce_weight": 0.5},
        "train": {
            "out_dir": str(pair / out),
            "steps": STEPS,
            "global_batch": 8,
            "micro_batch": 2,
            "lr": 1e-3,
            "warmup_steps": 1,
        },
    }
    for section, values in sections.items():
        keys[section] = {**keys.get(section, {}), **values}
    return Config.model_validate(keys)


def train(config, ranks, tp=1):
    assert run_ranks(ranks, RUN, tp=tp, config=config) == [config.train.steps] * ranks
    return lines(config)


def lines(config):
    with open(f"{config.train.out_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def stand_at(step, config, *, run):
    """Make the folder of `config` a copy of a finished run's that was stopped after `step`."""
    shutil.copytree(run, config.train.out_dir)
    shutil.rmtree(f"{config.train.out_dir}/model")
    for later in range(step + 1, config.train.steps + 1):
        shutil.rmtree(f"{config.train.out_dir}/checkpoints/step-{later:06d}")


def series(records, *keys):
    return np.array([[record[key] for key in keys] for record in records])


@pytest.fixture(scope="module")
def every_id(pair):
    """The run that learns from lists of all ids, held in memory."""
    targets = {"method": "topk", "k": VOCAB}
    return train(settings(pair, "every_id", targets=targets), 2)


@pytest.fixture(scope="module")
def exact(pair):
    config = settings(pair, "exact", train={"save_every": 1, "keep": 99})
    return train(config, 2)


def test_exact_is_training_on_lists_of_every_id(exact, every_id):
    columns = ("loss", "kd_loss", "ce_loss")
    np.testing.assert_allclose(series(exact, *columns), series(every_id, *columns), rtol=1e-6)
    np.testing.assert_allclose(series(exact, "grad_norm"), series(every_id, "grad_norm"), rtol=1e-5)


@pytest.mark.parametrize(
    ("ranks", "tp", "engine", "offload"),
    [
        (1, 1, "tensor_parallel", None),
        (2, 2, "tensor_parallel", "cpu"),
        pytest.param(4, 2, "tensor_parallel", None, marks=pytest.mark.long),
        (2, 1, "zero3", None),
    ],
)
def test_every_layout_of_the_teacher_trains_alike(pair, exact, ranks, tp, engine, offload):
    teacher = {"tp": tp, "engine": engine, "offload": offload}
    config = settings(pair, f"{engine}{ranks}{tp}", teacher=teacher, train={"steps": STEPS})
    found = train(config, ranks, tp)
    for column in ("loss", "kd_loss", "grad_norm"):
        np.testing.assert_allclose(series(found, column), series(exact, column), rtol=1e-5)


def weights_after(mesh, config):
    """The student's weights after the run, as this rank sees them whole."""
    import threading

    from megadistill.train.checkpoint import Position
    from megadistill.train.loop import run_steps
    from megadistill.train.online.online_teacher import tokenise
    from megadistill.train.run import build, prepare
    from tests.train.averages import masters

    tokenise(config, mesh)
    run = prepare(config, mesh)
    mesh.run_on_rank0(lambda: run.folder.path.mkdir(parents=True))
    trainer = build(run, mesh)
    end, _ = run_steps(run, trainer, mesh, Position(0, 0, 0), None, told=threading.Event())
    assert end.step == config.train.steps
    return masters(trainer.student)


@pytest.mark.long
@pytest.mark.parametrize(("tp", "engine"), [(2, "tensor_parallel"), (1, "zero3")])
def test_all_ranks_have_equal_weights_after_twenty_steps_beside_a_teacher(pair, tp, engine):
    teacher = {"tp": tp, "engine": engine, "offload": "cpu" if engine == "zero3" else None}
    config = settings(pair, f"twenty-{engine}", teacher=teacher, train={"steps": 20, "lr": 1e-2})
    found = run_ranks(4, f"{HERE}:weights_after", tp=tp, config=config)
    for other in found[1:]:
        assert all(np.array_equal(other[name], value) for name, value in found[0].items())


def test_it_is_what_a_plain_torch_loop_does(pair, exact):
    from transformers import AutoModelForCausalLM

    from megadistill.blocks import open_store
    from megadistill.models.attention import forward_inputs
    from tests.train.plain import batch_of, clip_and_step, optimizer_and_order

    config = settings(pair)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(pair / name, dtype=torch.float32)
        for name in ("teacher", "student")
    )
    store = open_store(pair / "tokens")
    optimizer, order = optimizer_and_order(config, student, store)
    for step in range(STEPS):
        tokens_BT, documents, labels_N = batch_of(store, order, step)
        inputs = forward_inputs(student, tokens_BT, documents)
        valid = labels_N != -100
        with torch.no_grad():
            p = teacher(**inputs).logits.flatten(0, 1)[valid].double().log_softmax(1)
        q = student(**inputs).logits.flatten(0, 1)[valid].double().log_softmax(1)
        kd = (p.exp() * (p - q)).sum(1).mean()
        loss = kd + 0.5 * torch.nn.functional.nll_loss(q, labels_N[valid])
        norm = clip_and_step(optimizer, student, loss, step, config.train)
        found = exact[step]
        np.testing.assert_allclose(
            [found["loss"], found["kd_loss"], found["grad_norm"]],
            [loss.item(), kd.item(), norm.item()],
            rtol=1e-5,
        )


def test_through_a_cache_it_is_the_same_within_what_the_codec_rounds(pair, every_id):
    targets = {"method": "topk", "k": VOCAB}
    config = settings(pair, "cached", teacher={"mode": "cached"}, targets=targets)
    run_ranks(2, "tests.cache.building:build", config=config)
    cached = train(config, 2)
    # 4.5e-5 to 4.9e-5 nats of KL are what the codec's rounding costs a list of 64.
    np.testing.assert_allclose(series(cached, "kd_loss"), series(every_id, "kd_loss"), atol=2e-3)
    np.testing.assert_allclose(series(cached, "ce_loss"), series(every_id, "ce_loss"), rtol=1e-4)


def answered(mesh, config):
    """This rank's rows of the first two steps: (sequence, its targets), as the teacher answers."""
    from megadistill.train.online.online_teacher import tokenise
    from megadistill.train.run import build, prepare

    tokenise(config, mesh)
    run = prepare(config, mesh)
    teacher = build(run, mesh).teacher
    found = []
    with run.batches(mesh) as batches:
        for share in itertools.islice(batches, 2):
            for batch in teacher.answer(share):
                targets, T = batch.targets.numpy(), batch.tokens_BT.shape[1]
                assert batch.kd_count == (targets.counts > 0).sum() == batch.ce_count
                sampled = config.targets.method != "topp"  # only then is a KL to be told from kd
                assert (batch.targets.entropy is not None) == sampled
                found += [
                    (i, targets.rows(row * T, (row + 1) * T))
                    for row, (_, i) in enumerate(batch.names)
                ]
    return found


@pytest.mark.parametrize("method", ["varopt", "multinomial", "topp"])
@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [(1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3")],
)
def test_it_draws_what_a_cache_holds(pair, method, ranks, tp, engine):
    from megadistill.cache.build import _equal_rows
    from megadistill.cache.codec import decode_targets, encode_targets
    from megadistill.cache.reader import open_cache

    folder = pair / f"cache-{method}"
    made = settings(
        pair,
        teacher={"mode": "cached"},
        targets={"method": method},
        cache={"dir": str(folder), "min_free": 0},
    )
    run_ranks(1, "tests.cache.building:build", config=made)
    cache = open_cache(folder)
    config = settings(pair, teacher={"tp": tp, "engine": engine}, targets={"method": method})
    rows = [
        row for rank in run_ranks(ranks, f"{HERE}:answered", tp=tp, config=config) for row in rank
    ]
    assert len({i for i, _ in rows}) == len(rows) == 16
    for i, targets in rows:
        shape = {"vocab_size": cache.vocab_size, "ranking": cache.ranking}
        again = decode_targets(encode_targets(targets, **shape), **shape)
        count = int((targets.counts > 0).sum())
        kept = cache[i]["targets"].numpy()
        assert _equal_rows(kept, again) == count
        if again.entropy is not None:
            taught = again.counts > 0
            np.testing.assert_allclose(again.entropy[taught], kept.entropy[taught], rtol=0.05)


@pytest.mark.parametrize("loss", [{"divergence": "jsd"}, {"temperature": 2.0}])
def test_a_union_of_both_sides_trains(pair, loss):
    targets = {"method": "union", "k": 8}
    name = next(iter(loss))
    config = settings(
        pair, f"union-{name}", targets=targets, loss={**loss, "ce_weight": 0.0}, train={"lr": 1e-2}
    )
    found = train(config, 2)
    kd = series(found, "kd_loss")[:, 0]
    assert (kd >= 0).all()
    assert kd[-3:].mean() < 0.9 * kd[:3].mean()
    assert 0 < found[0]["teacher_s"] < found[0]["step_s"]
    assert "  teacher 0." in step_line(found[0], STEPS)
    card = (pair / f"union-{name}" / "model" / "README.md").read_text()
    assert "- learned from: `teacher` (union), on the text of text.jsonl\n" in card
    assert str(pair) not in card
    said = "jsd" if name == "divergence" else "forward_kl at temperature 2"
    assert f"- loss: 1 x {said} + 0 x cross-entropy" in card


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_resumed_at_any_number_of_ranks_it_goes_on_with_the_next_sample(pair, exact, ranks):
    config = settings(pair, f"resumed{ranks}")
    stand_at(4, config, run=pair / "exact")
    found = train(config, ranks)
    assert series(found, "sequences")[:, 0].tolist() == [8 * (n + 1) for n in range(STEPS)]
    if ranks == 2:
        columns = ("loss", "kd_loss", "grad_norm")
        np.testing.assert_array_equal(series(found, *columns), series(exact, *columns))
    np.testing.assert_allclose(series(found, "loss"), series(exact, "loss"), rtol=1e-5)


def test_of_a_stream_as_much_is_read_as_the_steps_need(pair, tmp_path):
    """The same training as over the whole text in order; resumed at another number of ranks."""
    from megadistill.blocks import open_store

    order = {"shuffle": "sequential"}
    whole = train(settings(pair, "in_order", order=order), 2)
    tokens = tmp_path / "tokens"
    streamed = settings(
        pair,
        "streamed",
        order=order,
        train={"save_every": 3, "keep": 9},
        data={"streaming": True, "dir": str(tokens)},
    )
    found = train(streamed, 2)
    columns = ("loss", "kd_loss", "grad_norm")
    np.testing.assert_allclose(series(found, *columns), series(whole, *columns), rtol=1e-6)
    store = open_store(tokens)
    assert store.committed() == list(range(STEPS))  # a step takes a block
    assert not store.complete()
    shutil.rmtree(f"{streamed.train.out_dir}/model")
    for step in (9, STEPS):
        shutil.rmtree(f"{streamed.train.out_dir}/checkpoints/step-{step:06d}")
    shutil.rmtree(tokens)  # it comes again
    again = train(streamed, 1)
    np.testing.assert_allclose(series(again, *columns), series(whole, *columns), rtol=1e-5)
    assert open_store(tokens).committed() == store.committed()


def test_a_stream_that_ends_before_the_steps_do_begins_anew(pair, tmp_path):
    from megadistill.blocks import open_store

    (tmp_path / "text.jsonl").write_text(
        "".join((pair / "text.jsonl").read_text().splitlines(keepends=True)[:9])
    )
    config = settings(
        pair,
        "short",
        train={"steps": 4},
        data={
            "streaming": True,
            "dir": str(tmp_path / "tokens"),
            "files": [str(tmp_path / "text.jsonl")],
        },
    )
    found = train(config, 2)
    store = open_store(tmp_path / "tokens")
    assert store.complete()
    assert len(store) < found[-1]["sequences"] == 32


def test_a_run_is_its_teacher(pair, exact):
    """Another teacher, or another list of it, is another run; the layout is not."""
    other = settings(pair, "exact", targets={"method": "union"})
    kind, text = run_ranks(1, "tests.train.runs:message", config=other)[0]
    assert kind == "RecipeError"
    assert "method" in text
    shutil.copytree(pair / "teacher", pair / "teacher-2")
    tiny_llama(pair / "teacher-2", vocab_size=VOCAB, seed=9)
    other = settings(pair, "exact", teacher={"model": str(pair / "teacher-2")})
    kind, text = run_ranks(1, "tests.train.runs:message", config=other)[0]
    assert kind == "RecipeError"
    assert "teacher" in text
    same = settings(pair, "exact", teacher={"engine": "zero3", "micro_batch": 7})
    assert run_ranks(1, RUN, config=same) == [STEPS]


def largest_allocation(mesh, config):
    from megadistill.train.online.online_teacher import tokenise
    from megadistill.train.run import build, prepare
    from megadistill.train.training_source import micro_batch
    from tests.allocation import AllocationWatch

    tokenise(config, mesh)
    run = prepare(config, mesh)
    trainer = build(run, mesh)
    head = trainer.teacher.teacher.head
    head.chunk, head.buffer_CV = 100, head.buffer_CV[:100].clone()
    batch = micro_batch(run.stores, [(0, i) for i in range(32)], with_targets=False)
    with AllocationWatch() as watch:
        [batch] = trainer.teacher.answer([batch])
        moved = batch.on(trainer.student.model, mesh.device, pack="isolate")
        trainer.backward(moved, config.loss, (1.0, 1.0), last=True)
    return watch.largest, watch.operation, batch.ce_count


@pytest.mark.parametrize("method", ["exact", "union"])
def test_no_tensor_of_positions_by_vocabulary_exists(pair, method):
    small = {"zero_optimization": {"reduce_bucket_size": 20_000}}
    config = settings(
        pair,
        targets={"method": method, "k": 8},
        deepspeed=small,
        train={"global_batch": 32, "micro_batch": 32},
    )
    [(largest, operation, count)] = run_ranks(1, f"{HERE}:largest_allocation", config=config)
    # A chunk: a quarter of the positions with labels; one column more for the tail.
    assert largest <= -(-count // 4) * (VOCAB + 1), operation


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"teacher": {"mode": "cached"}, "student": None},
            "targets.method: exact compares whole distributions, which no cache keeps",
        ),
        ({"student": None}, "teacher.mode: online runs the teacher together with a student"),
        (
            {"loss": {"kd_weight": 0.0, "ce_weight": 1.0}},
            "teacher.mode: online with loss.kd_weight=0",
        ),
        (
            {"targets": {"method": "exact", "temperature": 2.0}},
            "targets.temperature: 2 with targets.method=exact",
        ),
        (
            {"targets": {"method": "union", "positions": "entropy", "min_entropy": 0.5}},
            "targets.positions: entropy with targets.method=union",
        ),
        (
            {"targets": {"method": "varopt"}, "loss": {"divergence": "jsd"}},
            "jsd cannot be computed from varopt targets",
        ),
        (
            {"loss": {"ground_truth_residual": True}},
            "loss.ground_truth_residual: true with exact targets",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(pair, sections, expected):
    config = settings(pair)
    keys = config.model_dump(mode="json")
    for name, values in sections.items():
        keys[name] = None if values is None else {**keys[name], **values}
    with pytest.raises(ValueError, match=expected):
        Config.model_validate(keys)


def test_generating_and_training_say_which_of_them_is_meant(pair):
    from megadistill.preflight import check_generate, check_train

    with pytest.raises(ConfigError, match=r"teacher.mode: online keeps no cache"):
        check_generate(settings(pair), world=2)
    check_train(settings(pair, "new"), world=2)
    wrong = settings(pair, "new", teacher={"tp": 3, "model": str(pair / "none")})
    with pytest.raises(ConfigError) as raised:
        check_train(wrong, world=2)
    text = str(raised.value)
    assert "teacher.tp: 3 does not divide the 2 ranks" in text
    assert "teacher.model" in text


def test_the_plan_says_that_nothing_is_kept(pair):
    from megadistill.preflight.plan import make_plan

    asked = settings(pair, data={"streaming": True, "dir": str(pair / "none")})
    said = dict(make_plan(asked, world=2).lines)
    assert said["sequences"] == "80 of 24 tokens, as many as train.steps need"
    plan = make_plan(settings(pair), world=2)
    said = dict(plan.lines)
    assert said["targets"] == "exact, from the online teacher; nothing is kept"
    assert "cache" not in said
    assert plan.cache_bytes is None
    assert dataclasses.is_dataclass(plan)
