"""What concerns more than one key."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from megadistill.config import Config, DataConfig, TeacherConfig, default_groups
from megadistill.config.load import validate

BASE = {
    "data": {"source": "python-stdlib", "dir": "w/tokens"},
    "teacher": {"model": "w/teacher"},
    "cache": {"dir": "w/cache"},
    "student": {"model": "w/student"},
    "train": {"steps": 100, "out_dir": "w/train"},
}


def changed(*settings: str) -> dict:
    from megadistill.config.load import _apply

    raw = {name: dict(section) for name, section in BASE.items()}
    for setting in settings:
        _apply(raw, setting)
    return raw


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["data.source=null", "student=null"],
            "data: no corpus: set one of data.source=python-stdlib, data.files",
        ),
        (["teacher.model=null", "student=null"], "teacher.model: missing, expected a folder or"),
        (["teacher.model=null", "teacher.mode=online"], "teacher.model: missing, expected a fold"),
        (["data.source=null", "teacher.mode=online"], "data: no corpus: set one of"),
        (
            ["data.name=x"],
            "data.source and data.name are set, expected one corpus: keep one, for "
            "example with data.name=null",
        ),
        (["data.streaming=true"], "FineWeb holds 15 trillion tokens"),
        (
            ["data.prompt_field=p", "data.source=null", "data.name=x"],
            "data.prompt_field: is set without data.completion_field",
        ),
        (["data.completion_field=p"], "data.completion_field: is set without data.prompt_field"),
        (
            ["train.trackers=[wandb, tensorboard, wandb]"],
            "train.trackers: wandb stands there twice: name each tracker once",
        ),
        (
            ["train.trackers=[tensorbord]"],
            "train.trackers.0: expected one of tensorboard, wandb, "
            "trackio, found 'tensorbord', did you mean tensorboard?",
        ),
        (["train.trackers=wandb"], "train.trackers: expected a list, found 'wandb'"),
        (
            ["data.packing=best_fit", "data.pack=concat"],
            "data.packing: best_fit with data.pack=concat, which joins all documents to one "
            "text: set "
            "data.packing=in_order",
        ),
        (["data.messages_field=m"], "python-stdlib has no columns: remove data.messages_field"),
        (
            [
                "data.messages_field=m",
                "data.prompt_field=p",
                "data.completion_field=c",
                "data.source=null",
                "data.name=x",
            ],
            "a document is a chat, a prompt with its completion, or a text; keep one",
        ),
        (["targets.positions=loss_mask"], "targets.positions: loss_mask needs text that is part"),
        (["cache.dir=w/tokens"], "cache.dir: w/tokens is the same folder as data.dir"),
        (["cache.dir=w/tokens/cache"], "cache.dir: w/tokens/cache is inside data.dir (w/tokens)"),
        (["train.out_dir=w"], "train.out_dir: w is around data.dir (w/tokens)"),
        (["train.out_dir=w/student"], "train.out_dir: w/student holds student.model (w/student)"),
        (["student.model=w/train/model"], "would be written over"),
        (["cache.dir=./w/x/../teacher"], "holds teacher.model (w/teacher)"),
        (["cache.local_dir=w/tokens"], "cache.local_dir: w/tokens is the same folder as data.dir"),
        (["cache.dir=[x, w/train/y]"], "train.out_dir: w/train holds cache.dir.1 (w/train/y)"),
        (
            ["cache.dir=[x, y]", "cache.ensemble=[z]"],
            "cache.ensemble: caches of other teachers beside a list of 2 caches",
        ),
        (
            ["cache.ensemble=[z]", "cache.allow_incomplete=true"],
            "cache.allow_incomplete: true with cache.ensemble, whose caches would grow each by",
        ),
        (
            ["cache.ensemble=[z]", "teacher.mode=online"],
            "cache.ensemble: caches are not read with teacher.mode=online",
        ),
        (
            ["cache.ensemble=[z]", "loss.kd_weight=0", "loss.ce_weight=1"],
            "cache.ensemble: nobody learns from teachers with loss.kd_weight=0",
        ),
        (
            ["cache.ensemble=[z, {dir: w/train/y}]"],
            "train.out_dir: w/train holds cache.ensemble.1.dir (w/train/y)",
        ),
        (
            ["teacher.ensemble=[{model: x}]"],
            "teacher.ensemble: 1 more with teacher.mode=cached, where a cache is one teacher's",
        ),
        (
            [
                "teacher.ensemble=[{model: x}]",
                "teacher.mode=online",
                "targets.positions=entropy",
                "targets.min_entropy=1",
            ],
            "teacher.ensemble: with targets.positions=entropy each teacher would leave out other",
        ),
        (
            [
                "teacher.ensemble=[{model: x}, {model: y, engine: zero3}]",
                "teacher.mode=online",
                "teacher.tp=2",
            ],
            "teacher.ensemble.1.engine: zero3 with teacher.tp=2, expected 1",
        ),
        (
            ["teacher.ensemble=[{model: w/train/x}]", "teacher.mode=online"],
            "train.out_dir: w/train holds teacher.ensemble.0.model (w/train/x)",
        ),
        (
            [
                "teacher.ensemble=[{model: x}]",
                "teacher.mode=online",
                "loss.kd_weight=0",
                "loss.hidden_weight=1",
            ],
            "teacher.ensemble: with loss.kd_weight=0 only the layers of",
        ),
        (["teacher.ensemble=[{weight: 2}]"], "teacher.ensemble.0.model: missing"),
        (["teacher.ensemble=[x]"], "teacher.ensemble.0: expected a section"),
        (["teacher.ensemble=[{model: x, tp: 2}]"], "teacher.ensemble.0.tp: unknown key"),
        (["cache.ensemble=[w/cache]"], "cache.dir: w/cache holds cache.ensemble.0.dir (w/cache)"),
        (
            ["cache.ensemble=[{dir: z, weight: 0}]"],
            "cache.ensemble.0.weight: expected a number above 0, found 0",
        ),
        (["cache.ensemble=[{weight: 2}]"], "cache.ensemble.0.dir: missing, expected the cache"),
        (
            ["cache.ensemble=[{dir: z, wieght: 2}]"],
            "cache.ensemble.0.wieght: unknown key, did you mean cache.ensemble.0.weight?",
        ),
        (["train.keep_best=true"], "train.keep_best: there is no held-out loss to be lowest"),
        (["train.use_ema=true"], "train.use_ema: there is no average to use: set train.ema=true"),
        (
            [
                "train.ema=true",
                "deepspeed.zero_optimization.offload_param={device: nvme, nvme_path: d}",
            ],
            "train.ema: needs the weights in memory, and offload_param.device is nvme",
        ),
        (
            ["deepspeed.zero_optimization.offload_param.device=nvme"],
            "deepspeed.zero_optimization.offload_param: device is nvme without nvme_path",
        ),
        (
            ["deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: d}"],
            "device is nvme, from where DeepSpeed does not bring the optimizer's state back",
        ),
        (["teacher.engine=zero3", "teacher.tp=2"], "teacher.tp: 2 with teacher.engine=zero3"),
        (
            ["teacher.engine=tensor_parallel", "teacher.offload=cpu"],
            "teacher.offload: cpu with teacher.engine=tensor_parallel and teacher.mode=cached",
        ),
        (
            ["targets.method=topk", "targets.k=4096"],
            "data.block_size: a block of 256 sequences of 2048 tokens can take 16",
        ),
        (["targets.method=topp", "targets.k=4096"], "2048 tokens can take 16"),
        (["targets.method=multinomial", "targets.draws=4096"], "2048 tokens can take 16"),
        (
            ["targets.positions=entropy"],
            "targets.min_entropy: targets.positions=entropy leaves out positions below it: set it",
        ),
        (
            ["targets.min_entropy=1"],
            "targets.min_entropy: is read with targets.positions=entropy "
            "only, and positions is not set: remove it, or",
        ),
        (
            [
                "targets.min_entropy=1",
                "data.prompt_field=p",
                "data.completion_field=c",
                "data.source=null",
                "data.name=x",
                "targets.positions=loss_mask",
            ],
            "and positions is loss_mask",
        ),
        (
            [
                "teacher.mode=online",
                "targets.method=multinomial",
                "targets.temperature=2",
                "loss.temperature=1",
            ],
            "set loss.temperature=2.0",
        ),
        (
            ["teacher.mode=online", "targets.temperature=2", "loss.temperature=1"],
            "loss.temperature: 1.0 differs from the targets' temperature",
        ),
        (
            ["teacher.mode=online", "loss.divergence=jsd"],
            "loss.divergence: jsd cannot be computed from varopt targets, which are unbiased for "
            "forward_kl only: set loss.divergence=forward_kl, or generate with targets.method=topk",
        ),
        (
            ["teacher.mode=online", "loss.divergence=tvd", "targets.method=multinomial"],
            "tvd cannot be computed from mult",
        ),
        (
            ["teacher.mode=online", "loss.ground_truth_residual=true"],
            "loss.ground_truth_residual: true with varopt targets, which leave nothing out",
        ),
        (
            [
                "loss.ground_truth_residual=true",
                "targets.method=topk",
                "loss.divergence=reverse_kl",
            ],
            "loss.ground_truth_residual: true with loss.divergence=reverse_kl, expected forward_kl",
        ),
        (
            ["teacher.mode=online", "loss.temperature=2"],
            "the only one varopt targets can serve: set loss.temperature=1.0",
        ),
        (["loss.kd_weight=0"], "loss: kd_weight and ce_weight are both 0"),
        (["train.micro_batch=6"], "set train.micro_batch to a divisor of 64, for example 4"),
        (["order.groups=5"], "order.groups: 5 does not divide train.global_batch (64)"),
        (["train.epochs=2"], "train: steps (100) and epochs (2) are both set"),
        (["train.steps=null"], "how long to train is not said"),
        (["train.warmup_steps=100"], "train.warmup_steps: 100 leaves nothing of train.steps (100)"),
        (["train.decay_steps=5"], "is read with train.schedule=wsd only, and the schedule is cosi"),
        (
            ["train.schedule=wsd", "train.decay_steps=95", "train.warmup_steps=10"],
            "together exceed train.steps (100)",
        ),
        (["deepspeed.train_batch_size=3"], "deepspeed.train_batch_size: is not yours to set here"),
    ],
)
def test_what_contradicts_itself_is_refused_with_what_to_do(settings, said):
    config, found = validate(changed(*settings))
    assert config is None
    assert len(found) == 1, found
    assert said in str(found[0])
    assert "\n" not in str(found[0])


@pytest.mark.parametrize(
    "settings",
    [
        ["student=null", "train.steps=null", "train.micro_batch=6", "loss.kd_weight=0"],
        ["student=null", "targets.temperature=2", "train.steps=null"],
        ["order.shuffle=sequential", "order.groups=5"],
        ["train.steps=null", "train.epochs=0.5"],
        ["targets.method=multinomial", "targets.draws=65535", "data.block_size=1"],
        ["targets.method=topp", "targets.p=1", "targets.k=4096", "data.block_size=32"],
        ["targets.method=topk", "targets.draws=5", "targets.tau=0.5", "targets.p=0.5"],
        ["targets.positions=entropy", "targets.min_entropy=0.5", "targets.entropy=false"],
        ["eval.cache=w/cache"],  # the held-out cache is generated under the training configuration
        ["cache.dir=w/tokens2"],
        ["cache.dir=s3://w/tokens", "train.out_dir=w/other"],
        ["cache.dir=[x, sftp://host/y]"],
        ["cache.ensemble=[x, {dir: 'sftp://host/y', weight: 0.5}, x]"],
        ["cache.ensemble=[x]", "student=null", "loss.kd_weight=0"],
        [
            "teacher.ensemble=[{model: x}, {model: x, weight: 2, dtype: float32, engine: zero3}]",
            "teacher.mode=online",
        ],
        ["loss.kd_weight=0", "loss.ce_weight=1"],
        ["targets.method=topk", "loss.divergence=jsd", "loss.beta=0.1"],
        ["targets.method=topp", "loss.temperature=2", "loss.divergence=skewed_reverse_kl"],
        ["targets.method=topk", "loss.ground_truth_residual=true"],
    ],
)
def test_what_is_sound_is_not_refused(settings):
    config, found = validate(changed(*settings))
    assert found == []
    assert config is not None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("targets.tau=0", "targets.tau: expected a number above 0, found 0"),
        ("targets.tau=1.5", "targets.tau: expected a number of at most 1, found 1.5"),
        ("targets.draws=0", "targets.draws: expected a number above 0, found 0"),
        ("targets.draws=65536", "targets.draws: expected a number of at most 65535, found 65536"),
        ("targets.draws=true", "targets.draws: expected a number"),
        ("targets.k=0", "targets.k: expected a number above 0, found 0"),
        ("targets.p=0", "targets.p: expected a number above 0, found 0"),
        ("targets.p=1.01", "targets.p: expected a number of at most 1, found 1.01"),
        ("targets.min_entropy=0", "targets.min_entropy: expected a number above 0, found 0"),
        ("targets.nll=5", "targets.nll: expected"),
    ],
)
def test_parameters_out_of_bounds_are_refused(setting, said):
    config, found = validate(changed(setting))
    assert config is None
    assert [said in str(problem) for problem in found] == [True], found


@pytest.mark.parametrize(
    ("global_batch", "groups"), [(64, 64), (16, 16), (96, 48), (67, 1), (1, 1)]
)
def test_groups_default_to_the_largest_divisor_of_the_batch_up_to_64(global_batch, groups):
    assert default_groups(global_batch) == groups
    config, _ = validate(changed(f"train.global_batch={global_batch}", "train.micro_batch=1"))
    assert config is not None
    assert config.order.groups == groups


def test_another_teacher_is_as_the_section_says_but_for_what_it_is_given():
    config, _ = validate(
        changed(
            "teacher.mode=online",
            "teacher.revision=old",
            "teacher.trust_remote_code=true",
            "teacher.offload=cpu",
            "teacher.ensemble=[{model: x}, {model: y, dtype: float32}]",
        )
    )
    assert config is not None
    first, second, third = config.of_each_teacher.values()
    assert list(config.of_each_teacher) == ["teacher", *(f"teacher.ensemble.{i}" for i in (0, 1))]
    assert first.teacher == config.teacher.model_copy(update={"ensemble": []})
    assert second.teacher == first.teacher.model_copy(
        update={"model": "x", "revision": None, "trust_remote_code": False}
    )
    assert third.teacher == second.teacher.model_copy(update={"model": "y", "dtype": "float32"})
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_configuration_made_in_python_obeys_the_same_rules():
    data, teacher = DataConfig(source="python-stdlib"), TeacherConfig(model="t", tp=2)
    assert Config(data=data, teacher=teacher).order.groups == 64
    with pytest.raises(ValidationError, match="ZeRO-3 spreads the teacher over all ranks"):
        Config(data=data, teacher=teacher.model_copy(update={"engine": "zero3"}))


def test_two_mistakes_in_an_element_of_a_list_cost_nothing_else():
    _, found = validate(changed("teacher.mode=online", "teacher.ensemble=[{modl: x}]"))
    assert [str(problem) for problem in found] == [
        "teacher.ensemble.0.model: missing, expected a folder or a hub id: set "
        "teacher.ensemble.0.model",
        "teacher.ensemble.0.modl: unknown key, did you mean teacher.ensemble.0.model?",
    ]
