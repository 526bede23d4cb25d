"""Reading a configuration: files, overrides, and what is said about mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadistill.config import Config, all_keys, load_config, to_yaml
from megadistill.config.yaml_reader import read_yaml, write_yaml
from megadistill.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
GOOD = """
data:
  source: python-stdlib
teacher:
  model: a/teacher
student:
  model: a/student
train:
  steps: 100
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> Config:
    Path("c.yaml").write_text(text)
    return load_config("c.yaml", list(overrides))


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("file", sorted(p.name for p in (REPOSITORY / "configs").glob("*.yaml")))
def test_every_shipped_configuration_loads_and_reads_back_equal(file, folder):
    config = load_config(file)
    Path("again.yaml").write_text(to_yaml(config))
    assert load_config("again.yaml") == config


def test_without_a_name_zero3_yaml_is_read(folder):
    assert load_config() == load_config("zero3.yaml") == load_config("configs/zero3.yaml")


def test_the_current_folder_comes_before_configs(folder):
    Path("configs").mkdir()
    Path("configs/mine.yaml").write_text(GOOD)
    assert load_config("mine.yaml").train.steps == 100
    assert load_config("mine").train.steps == 100
    Path("mine.yaml").write_text(GOOD.replace("100", "7"))
    assert load_config("mine.yaml").train.steps == 7


def test_a_missing_file_says_where_it_was_looked_for_and_what_there_is(folder):
    with pytest.raises(ConfigError, match=r"zero4.yaml: no such configuration; looked for zero4"):
        load_config("zero4.yaml")
    with pytest.raises(ConfigError, match=r"did you mean zero3.yaml\?"):
        load_config("zero4.yaml")
    with pytest.raises(ConfigError, match=r"there is demo.yaml, .*zero3.yaml"):
        load_config("qwertyuiop.yaml")


def test_numbers_and_words_are_read_as_they_are_meant():
    values = read_yaml(
        "[1e-4, 1_000, .5, 1., -3, 0x10, 1e5, yes, no, on, 1:30, 2024-01-01, 007x, null, ~, true]",
        where="",
    )
    assert values == [
        1e-4,
        1000,
        0.5,
        1.0,
        -3,
        16,
        1e5,
        "yes",
        "no",
        "on",
        "1:30",
        "2024-01-01",
        "007x",
        None,
        None,
        True,
    ]
    assert [type(v) for v in values[:3]] == [float, int, float]


def test_yes_and_off_are_truth_values_where_one_is_wanted_and_text_elsewhere(folder):
    config = load(GOOD, "data.shuffle=yes", "teacher.trust_remote_code=off", "data.split=no")
    assert config.data.shuffle is True
    assert config.teacher.trust_remote_code is False
    assert config.data.split == "no"


def test_a_key_given_twice_is_refused_with_both_lines(folder):
    assert mistakes(GOOD + "  lr: 1\n  steps: 3\n") == [
        "c.yaml:11: steps: given twice, first in line 9: remove one"
    ]
    assert mistakes(GOOD + "data: {}\n") == [
        "c.yaml:10: data: given twice, first in line 2: remove one"
    ]


def test_anchors_and_merges_work(folder):
    config = load(
        GOOD.replace("  model: a/teacher", "  <<: {micro_batch: 3, model: x}\n  model: a/t")
    )
    assert (config.teacher.model, config.teacher.micro_batch) == ("a/t", 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "c.yaml:1: "),
        ("a: b: c", "c.yaml:1: mapping values are not allowed here"),
        ("- 1", "c.yaml: holds a list, expected the sections data, teacher"),
        ("", "c.yaml: holds nothing, expected the sections data, teacher"),
        ("a: !!python/object:os.system x", "c.yaml:1: could not determine a constructor"),
    ],
)
def test_what_is_no_configuration_is_one_line(text, said, folder):
    lines = mistakes(text)
    assert len(lines) == 1
    assert lines[0].startswith(said)


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("train.lrr", "train.lr"),
        ("train.learning_rate", "train.lr"),
        ("train.tau", "targets.tau"),
        ("tau", "targets.tau"),
        ("trian.lr", "train.lr"),
        ("max_steps", "train.steps"),
        ("report_to", "train.trackers"),
        ("train.report_to", "train.trackers"),
        ("bf16", "deepspeed.bf16.enabled"),
        ("train.fp16", "deepspeed.fp16.enabled"),
        ("train.save_total_limit", "train.keep"),
        ("train.num_train_epochs", "train.epochs"),
        ("train.per_device_train_batch_size", "train.micro_batch"),
        ("train.gradient_accumulation_steps", "train.global_batch"),
        ("train.lr_scheduler_type", "train.schedule"),
        ("train.warmup_ratio", "train.warmup_steps"),
        ("output_dir", "train.out_dir"),
        ("train.save_steps", "train.save_every"),
        ("eval.eval_steps", "train.eval_every"),
        ("seed", "train.seed"),
        ("data.max_length", "data.seq_len"),
        ("train.temperature", "loss.temperature"),
        ("beta", "loss.beta"),
        ("train.train_micro_batch_size_per_gpu", "train.micro_batch"),
        ("train.max_grad_norm", "train.grad_clip"),
        ("model_name_or_path", "student.model"),
        ("zero_optimization", "deepspeed.zero_optimization"),
        ("targets.top_k", "targets.k"),
        ("deepspeed.zero_optimisation.stage", "deepspeed.zero_optimization"),
        ("deepspeed.zero_optimization.stag", "deepspeed.zero_optimization.stage"),
        (
            "deepspeed.zero_optimization.offload_optimizer.devise",
            "deepspeed.zero_optimization.offload_optimizer.device",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion_in_the_file_and_on_the_command_line(
    key, suggestion, folder
):
    (line,) = mistakes(GOOD, f"{key}=3")
    assert line.startswith("command line: ")
    assert line.endswith(f": unknown key, did you mean {suggestion}?")
    tree = read_yaml(GOOD, where="")
    at = tree
    for part in key.split(".")[:-1]:
        at = at.setdefault(part, {})
    at[key.split(".")[-1]] = 3
    if not key.startswith("trian"):
        (line,) = mistakes(write_yaml(tree))
        assert line.startswith("c.yaml: ")
        assert line.endswith(f": unknown key, did you mean {suggestion}?")


def test_all_mistakes_are_reported_at_once_a_line_each(folder):
    lines = mistakes(
        """
data:
  source: python-stdlib
  streaming: true
  seq_len: 0
teacher:
  dtype: bf16
  revision: 123
train:
  lrr: 1e-4
  betas: [0.9, 1.5]
  steps: 10
  warmup_steps: 10
student:
  model: s
loss: 5
deepspeed:
  optimizer: {type: Adam}
""",
        "targets.method=varop",
    )
    assert lines == [
        "c.yaml: data.seq_len: expected a number above 0, found 0",
        "c.yaml: teacher.revision: expected text, found the number 123: put it in quotes",
        "c.yaml: teacher.dtype: expected one of float32, bfloat16, float16, found 'bf16', "
        "did you mean bfloat16?",
        "command line: targets.method: expected one of varopt, multinomial, topk, topp, union, "
        "exact, projected, found 'varop', "
        "did you mean varopt?",
        "c.yaml: loss: expected a section, that is, keys with values, found 5",
        "c.yaml: train.betas.1: expected a number below 1, found 1.5",
        "c.yaml: train.lrr: unknown key, did you mean train.lr?",
        "c.yaml: data.streaming: a streamed dataset has no known end (FineWeb holds 15 trillion "
        "tokens, years of tokenising): set data.max_samples to the number of documents to read, "
        "for example data.max_samples=1000000, or data.streaming=false to download a small one "
        "whole",
        "c.yaml: train.warmup_steps: 10 leaves nothing of train.steps (10): set "
        "train.warmup_steps to less, a tenth of the steps for example",
        "c.yaml: deepspeed.optimizer: is not yours to set here: set train.lr, train.betas and "
        "train.weight_decay",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "'train.lr' is not an override, expected key=value"),
        ("demo.yaml", "a configuration file is given as --config demo.yaml"),
        ("train..lr=3", "is not an override"),
        ("train.lr.x=3", "train.lr: expected a number, found {'x': 3}"),
        ("data=3", "data: expected a section, that is, keys with values, found 3"),
        ("data.source.x=3", "data.source is 'python-stdlib', expected a section with keys"),
        ("train.lr=[", "command line: train.lr=["),
        ("train.lr=true", "train.lr: expected a number, found True"),
        ("train.lr=.inf", "train.lr: expected a finite number, found inf"),
        ("train.lr=fast", "train.lr: expected a number, found 'fast'"),
        ("train.steps=1.5", "train.steps: expected a whole number, found 1.5"),
        ("data.dir=''", "data.dir: expected text that is not empty, found ''"),
        ("data.files=a.txt", "data.files: expected a list, found 'a.txt'"),
        ("data.shuffle=perhaps", "data.shuffle: expected true or false, found 'perhaps'"),
        ("train.seed=-1", "train.seed: expected a number of at least 0, found -1"),
        (
            "cache.dir=[{dir: x, wieght: 2}]",
            "cache.dir.0.wieght: unknown key, did you mean cache.dir.0.weight?",
        ),
        (
            "cache.part=3/3",
            "cache.part: expected I/N with I from 0 to N-1, such as 0/3, found '3/3'",
        ),
        ("cache.part=1", "cache.part: expected text, found the number 1"),
        ("cache.part=-1/3", "cache.part: expected I/N"),
        ("cache.part=0/0", "cache.part: expected I/N"),
        ("cache.part=0/3/5", "cache.part: expected I/N"),
    ],
)
def test_a_wrong_override_is_one_line(override, said, folder):
    (line,) = mistakes(GOOD, override)
    assert line.startswith("command line: ")
    assert said in line


def test_overrides_reach_deep_and_take_yaml_values(folder):
    config = load(
        GOOD,
        "data.source=null",
        "data.files=[a.txt, 'b c.txt']",
        "train.lr=1e-5",
        "train.betas=[0.8, 0.9]",
        "deepspeed.zero_optimization.stage=3",
        "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
        "deepspeed.bf16.enabled=true",
        "deepspeed.bf16=null",
        "eval.cache=a=b",
        "train.steps=",
        "train.epochs=1.5",
    )
    assert config.data.files == ["a.txt", "b c.txt"]
    assert config.train.lr == 1e-5
    assert config.train.betas == (0.8, 0.9)
    assert config.deepspeed == {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    }
    assert config.eval.cache == "a=b"
    assert (config.train.steps, config.train.epochs) == (None, 1.5)


def test_a_part_of_the_cache_is_a_share_of_its_blocks(folder):
    assert load(GOOD, "cache.part=1/3").cache.part_index == (1, 3)
    assert load(GOOD).cache.part_index == (0, 1)


def test_the_student_can_be_left_out_and_taken_out(folder):
    assert load(GOOD, "student=null", "train.steps=null").student is None


def test_an_empty_section_is_its_defaults(folder):
    assert load(GOOD + "loss:\n").loss == load(GOOD).loss


@given(
    value=st.one_of(
        st.text(max_size=20),
        st.floats(allow_nan=False),
        st.integers(),
        st.booleans(),
        st.none(),
        st.dictionaries(st.text(max_size=5), st.lists(st.floats(allow_nan=False), max_size=3)),
    )
)
def test_what_is_written_as_yaml_reads_back_equal_and_of_the_same_type(value):
    again = read_yaml(write_yaml(value), where="")
    assert again == value
    assert type(again) is type(value)


@given(
    steps=st.integers(1, 10**9),
    lr=st.floats(1e-30, 1e30),
    split=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
)
def test_an_override_carries_any_value(steps, lr, split):
    quoted = "'" + split.replace("'", "''") + "'"
    config = load_config(
        str(REPOSITORY / "configs" / "demo.yaml"),
        [
            f"train.steps={steps}",
            "train.warmup_steps=0",
            f"train.lr={lr!r}",
            f"data.split={quoted}",
        ],
    )
    assert (config.train.steps, config.train.lr, config.data.split) == (steps, lr, split)


def test_the_configuration_is_frozen(folder):
    config = load(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 3


def test_every_key_has_a_description():
    for key in all_keys():
        section, name = key.split(".")
        model = Config.model_fields[section].annotation
        fields = getattr(model, "model_fields", None) or model.__args__[0].model_fields
        assert fields[name].description, key


def test_reading_a_configuration_imports_neither_torch_nor_transformers_nor_deepspeed():
    code = (
        "import sys; from megadistill.config import load_config; load_config('demo.yaml');"
        "print([m for m in ('torch','transformers','deepspeed','streaming') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert run.stdout.strip() == "[]"


def test_a_list_of_caches_with_and_without_weights(folder):
    config = load(GOOD, "cache.dir=[a, {dir: s3://bucket/b, weight: 2}]")
    assert [(s.dir, s.weight) for s in config.cache.sources] == [("a", 1), ("s3://bucket/b", 2)]
    Path("again.yaml").write_text(to_yaml(config))
    assert load_config("again.yaml") == config
    (single,) = load(GOOD, "cache.dir=d").cache.sources
    assert (single.dir, single.weight) == ("d", 1)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5", "cache.dir: expected text, found the number 5"),
        ("[]", "cache.dir: expected at least one element"),
        ("['']", "cache.dir.0.dir: expected text that is not empty"),
        ("[a, {dir: b, weight: 0}]", "cache.dir.1.weight: expected a number above 0"),
        ("[a, {path: b}]", "cache.dir.1.dir: missing"),
        ("{dir: a}", "cache.dir: expected text"),
        ("[[a]]", "cache.dir.0: expected a section"),
    ],
)
def test_lists_of_caches_that_are_none(value, said, folder):
    lines = mistakes(GOOD, f"cache.dir={value}")
    assert any(line.startswith(f"command line: {said}") for line in lines), lines
