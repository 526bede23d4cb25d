"""What a cache knows holds in training; what the configuration sets against it is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.blocks import open_store
from megadistill.cache.cache_recipe import model_identity
from megadistill.cache.recorded_settings import other_targets, with_known
from megadistill.config import Config, load_config
from megadistill.errors import ConfigError
from megadistill.preflight import check_train
from megadistill.preflight.cache_checks import check_caches
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.train.stores import SEQ_LEN, VOCAB, make_config, make_store

MESSAGE = "tests.train.runs:message"
ROOT = Path(__file__).resolve().parents[2]


def smallest(folder: Path, **sections) -> Config:
    """Nothing but a cache, a student and a run: no corpus, no teacher, no targets."""
    config = make_config(folder)
    student = {"student": {"model": config.student.model}, "cache": {"dir": config.cache.dir}}
    train = config.train.model_dump(include=config.train.model_fields_set)
    raw = {**student, "train": {**train, "steps": 2}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return Config(**raw)


def test_a_cache_and_a_student_are_all_that_training_needs(tmp_path):
    config = smallest(tmp_path)
    check_train(config, world=1)
    assert run_ranks(1, "tests.train.runs:run", config=config) == [2]
    card = (tmp_path / "out/model/README.md").read_text()
    assert f"of 8 sequences of {SEQ_LEN} tokens" in card


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd"])
def test_the_method_of_the_cache_holds_whatever_targets_say(tmp_path, divergence):
    make_store(tmp_path / "cache", method="topk", k=5)
    config = smallest(
        tmp_path, targets={"method": "varopt", "tau": 0.06}, loss={"divergence": divergence}
    )
    assert run_ranks(1, "tests.train.runs:run", config=config) == [2]


def test_other_targets_are_reported_in_one_line_with_what_holds(tmp_path, caplog):
    store = open_store(make_store(tmp_path / "cache", method="topk", k=5))
    config = smallest(tmp_path, targets={"method": "varopt", "tau": 0.1, "temperature": 2.0})
    line = other_targets(config, store)
    assert "\n" not in line
    assert "was made with method topk, k 5, temperature 1.0, which holds here" in line
    assert line.endswith("targets.temperature=2.0 is for generating")
    assert "targets.method=varopt" in line
    assert other_targets(smallest(tmp_path, targets={"method": "topk", "k": 5}), store) is None
    assert other_targets(smallest(tmp_path), store) is None
    known = with_known(config, store)
    assert (known.targets.method, known.targets.k, known.targets.temperature) == ("topk", 5, 1.0)


def test_the_temperature_of_the_targets_is_that_of_the_loss_unless_one_is_set(tmp_path):
    store = open_store(make_store(tmp_path / "cache", temperature=2.0))
    assert with_known(smallest(tmp_path), store).loss.temperature == 2.0
    given = smallest(tmp_path, loss={"temperature": 1.0})
    assert with_known(given, store).loss.temperature == 1.0
    with pytest.raises(ConfigError, match=r"loss\.temperature: 1\.0 differs from the targets'"):
        check_caches(given)


def test_the_packing_of_the_cache_holds_unless_one_is_set(tmp_path):
    store = open_store(make_store(tmp_path / "cache", tokens={"pack": "concat"}))
    assert with_known(smallest(tmp_path), store).data.pack == "concat"
    assert with_known(smallest(tmp_path, data={"pack": "isolate"}), store).data.pack == "isolate"


def test_another_packing_than_the_caches_teacher_read_is_refused_where_it_is_set(tmp_path):
    make_store(tmp_path / "cache", tokens={"pack": "concat"})
    (line,) = said(smallest(tmp_path, data={"pack": "isolate"}))
    assert line.startswith("data.pack: isolate, and the teacher of ")
    assert "read its sequences with concat: set data.pack=concat, or leave it out" in line
    check_caches(smallest(tmp_path, data={"pack": "concat"}))
    text = {"kd_weight": 0.0, "ce_weight": 1.0}
    check_caches(smallest(tmp_path, data={"pack": "isolate"}, loss=text))


def test_caches_of_other_packing_are_not_mixed(tmp_path):
    make_store(tmp_path / "cache", tokens={"pack": "isolate"})
    make_store(tmp_path / "other", tokens={"pack": "concat"}, seed=3)
    caches = [str(tmp_path / "cache"), str(tmp_path / "other")]
    ((kind, text),) = run_ranks(1, MESSAGE, config=smallest(tmp_path, cache={"dir": caches}))
    assert (kind, "cache.dir: data.pack is isolate in " in text) == ("ConfigError", True)
    make_store(tmp_path / "silent", seed=3)  # made before recipes said it
    caches = [str(tmp_path / "cache"), str(tmp_path / "silent")]
    silent = smallest(tmp_path, cache={"dir": caches})
    assert run_ranks(1, MESSAGE, config=silent) == [("", "no error")]


def held_out_beside(folder: Path, **store) -> Config:
    make_store(folder / "held", method="topk", k=5, seed=9, **store)
    make_store(folder / "cache", tokens={"pack": "isolate"})
    return smallest(folder, eval={"cache": str(folder / "held")})


def test_a_held_out_cache_of_another_packing_is_refused(tmp_path):
    config = held_out_beside(tmp_path, tokens={"pack": "concat"})
    ((kind, text),) = run_ranks(1, MESSAGE, config=config)
    assert kind == "ConfigError"
    assert text.startswith("eval.cache: the teacher of ")
    assert "with data.pack=concat, and the student reads them with isolate" in text


def test_a_held_out_cache_without_a_label_is_refused(tmp_path):
    ((kind, text),) = run_ranks(1, MESSAGE, config=held_out_beside(tmp_path, nothing=True))
    assert kind == "DataError"
    assert "eval.cache: " in text
    assert "there is nothing to evaluate, no label of its first 24 sequence(s) has a" in text
    assert not (tmp_path / "out").exists()


def test_held_out_blocks_that_are_trained_on_are_said(tmp_path, caplog):
    from megadistill.train.evaluate import Evaluation
    from megadistill.train.run_checks import _check_evaluation
    from megadistill.train.training_source import open_sources

    make_store(tmp_path / "held", method="topk", k=5, seed=9)
    config = smallest(tmp_path)
    with caplog.at_level(logging.WARNING, "megadistill"):
        make_store(tmp_path / "cache")
        held = Evaluation(str(tmp_path / "held"), max_sequences=None)
        _check_evaluation(config, held, open_sources(config))
        assert caplog.messages == []
        held = Evaluation(make_store(tmp_path / "same", method="topk", k=5), max_sequences=None)
        shutil.rmtree(tmp_path / "cache")
        shutil.copytree(tmp_path / "same", tmp_path / "cache")
        _check_evaluation(config, held, open_sources(config))
    (line,) = caplog.messages
    count = held.sequences.store.num_blocks
    assert line.startswith(f"eval.cache: {count} of {count} blocks of ")
    assert line.endswith("the figures are not those of held-out text")


def said(config: Config) -> list[str]:
    """The lines of a preflight that refuses."""
    with pytest.raises(ConfigError) as caught:
        check_train(config, world=1)
    return str(caught.value).splitlines()


def test_another_sequence_length_is_refused_where_it_is_set(tmp_path):
    config = smallest(tmp_path, data={"seq_len": 64})
    (line,) = said(config)
    assert line.startswith("data.seq_len: 64, and ")
    assert f"has sequences of {SEQ_LEN}: set data.seq_len={SEQ_LEN}, or leave it out" in line
    ((kind, text),) = run_ranks(1, MESSAGE, config=config)
    assert (kind, text) == ("ConfigError", line)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused_where_it_is_set(tmp_path):
    from tests.models.made import tiny_tokenizer

    tiny_tokenizer(tmp_path / "other", vocab_size=90)
    (line,) = said(smallest(tmp_path, data={"tokenizer": str(tmp_path / "other")}))
    assert line.startswith("data.tokenizer: other (")
    assert "0000000000000000" in line


def made_by(folder: Path, teacher: str, name: str = "chief") -> str:
    """A cache of a teacher in a folder, called `name`."""
    from megadistill.cache.cache_recipe import model_identity

    path = make_store(folder / "cache")
    rewrite(Path(path), model_identity(Path(teacher)), name)
    return path


def rewrite(cache: Path, teacher: dict, name: str) -> None:
    """The cache with a teacher in its recipe, as if it had been made so."""
    from megadistill.storage.records import encode_json

    header = open_store(cache).header
    header["recipe"]["teacher"] = teacher
    header["names"] = {"teacher.model": name, "data.files": "a.jsonl"}
    (cache / "cache.json").write_bytes(encode_json(header))


def test_another_teacher_is_refused_by_its_content_and_named(tmp_path):
    teacher = tiny_llama(tmp_path / "teacher", vocab_size=VOCAB)
    same = tiny_llama(tmp_path / "a-copy", vocab_size=VOCAB)
    weights = tiny_llama(tmp_path / "other", vocab_size=VOCAB, seed=1)
    shape = tiny_llama(tmp_path / "wider", vocab_size=VOCAB, hidden_size=48)
    made_by(tmp_path, teacher)
    for model in (teacher, same):
        config = smallest(tmp_path, teacher={"model": model})
        check_train(config, world=1)
        assert run_ranks(1, MESSAGE, config=config)[0] == ("", "no error")
    ((kind, text),) = run_ranks(1, MESSAGE, config=smallest(tmp_path, teacher={"model": weights}))
    assert kind == "ConfigError"
    assert "teacher.model: other is not the teacher of" in text
    assert "(other weights), which was made by chief (LlamaForCausalLM, weights " in text
    (line,) = said(smallest(tmp_path, teacher={"model": shape}))
    assert "wider is not the teacher of" in line
    assert "another config.json" in line
    assert "teacher.model=null to take the cache as it is" in line


def test_a_teacher_that_is_not_here_is_compared_by_its_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    teacher = tiny_llama(tmp_path / "teacher", vocab_size=VOCAB)
    path = made_by(tmp_path, teacher, name="some/teacher")
    check_caches(smallest(tmp_path, teacher={"model": "some/teacher"}))
    check_caches(smallest(tmp_path, teacher={"model": str(tmp_path / "gone/teacher-1")}))
    with pytest.raises(ConfigError, match=r"teacher\.model: another/teacher is not the teacher of"):
        check_caches(smallest(tmp_path, teacher={"model": "another/teacher"}))
    rewrite(Path(path), model_identity(Path(teacher)), "teacher")  # a folder's name is no identity
    check_caches(smallest(tmp_path, teacher={"model": "another/teacher"}))


def test_every_contradiction_is_said_at_once_in_the_users_keys(tmp_path):
    teacher = tiny_llama(tmp_path / "teacher", vocab_size=VOCAB)
    other = tiny_llama(tmp_path / "other", vocab_size=VOCAB, hidden_size=48)
    made_by(tmp_path, teacher)
    config = smallest(
        tmp_path, data={"seq_len": 64}, teacher={"model": other}, loss={"divergence": "tvd"}
    )
    assert [line.split(":")[0] for line in said(config)] == [
        "data.seq_len",
        "teacher.model",
        "loss.divergence",
    ]


def test_a_dry_run_refuses_what_the_start_would_and_shows_what_the_cache_knows(tmp_path):
    config = smallest(tmp_path)
    file = tmp_path / "c.yaml"
    from megadistill.config import write_yaml

    file.write_text(write_yaml(config.model_dump(mode="json", exclude_unset=True)))
    assert load_config(str(file)).data.seq_len == 2048

    def dry_run(*overrides: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, ROOT / "launch/train.py", "--dry_run", "--config", file, *overrides],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            check=False,
        )

    fine = dry_run()
    assert fine.returncode == 0, fine.stderr
    assert f"seq_len: {SEQ_LEN}" in fine.stdout
    wrong = dry_run("loss.divergence=tvd", "data.seq_len=64")
    assert wrong.returncode == 2
    lines = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert [line.split(":")[1].strip() for line in lines] == ["data.seq_len", "loss.divergence"]
    assert "Traceback" not in wrong.stderr


def test_a_store_without_a_label_is_refused_before_a_model_is_loaded(tmp_path):
    for name, store in (
        ("kd", make_store(tmp_path / "kd", nothing=True)),
        ("text", make_store(tmp_path / "text", method=None, nothing=True)),
    ):
        loss = {} if name == "kd" else {"kd_weight": 0.0, "ce_weight": 1.0}
        config = smallest(tmp_path / f"run-{name}", cache={"dir": store}, loss=loss)
        ((kind, text),) = run_ranks(1, MESSAGE, config=config)
        assert (kind, "\n" in text) == ("DataError", False)
        assert "nothing to learn" in text
        assert not (tmp_path / f"run-{name}" / "out").exists()


def test_less_than_a_hundredth_of_labels_is_said(tmp_path, caplog):
    from megadistill.train.training_source import open_sources, require_targets

    make_store(tmp_path / "cache", positions="loss_mask", few=True)
    config = smallest(tmp_path)
    with caplog.at_level(logging.WARNING, "megadistill"):
        require_targets(config, open_sources(config))
    (record,) = caplog.records
    assert "of 384 tokens are learned from (0.26 %)" in record.getMessage()


def test_a_cache_of_an_earlier_version_without_names_is_trained_on(tmp_path):
    path = Path(make_store(tmp_path / "cache"))
    assert "names" not in json.loads((path / "cache.json").read_bytes())
    assert run_ranks(1, "tests.train.runs:run", config=smallest(tmp_path)) == [2]
