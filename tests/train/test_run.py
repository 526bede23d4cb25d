"""Bad input: every mistake is one line, before a model is loaded and with nothing written."""

import re
import shutil
from pathlib import Path

from megadistill.preflight.folder_checks import check_run_folder
from megadistill.train.export import check_tokenizer, student_tokenizer
from tests.models.architectures import save_architecture
from tests.models.made import tiny_llama, tiny_tokenizer
from tests.ranks import run_ranks
from tests.train.stores import make_config, make_store

MESSAGE = "tests.train.runs:message"


def refused(config, kind, pattern, *, world=1):
    results = run_ranks(world, MESSAGE, config=config)
    for found, text in results:
        assert (found, "\n" in text) == (kind, False), text
        assert re.search(pattern, text), text
    assert not Path(config.train.out_dir, "run.json").exists()


def test_a_student_with_fewer_ids_than_the_cache_is_refused(tmp_path):
    tiny_llama(tmp_path / "model", vocab_size=95)
    refused(make_config(tmp_path), "ConfigError", r"student\.model: has 95 token ids, .* 96")


def test_a_student_of_another_tokenizer_is_refused(tmp_path):
    config = make_config(tmp_path)
    tiny_tokenizer(tmp_path / "model", vocab_size=300)
    refused(config, "ConfigError", r"student\.model: .* has the tokenizer [0-9a-f]{16}, .* 0{16}")


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    """transformers 5 makes an empty one for a Qwen2, which was compared, refused, and exported."""
    save_architecture(tmp_path / "model", "qwen2", vocab_size=96)
    config = make_config(tmp_path)
    check_tokenizer(config, {"content": "0" * 64, "vocab_size": 9}, store="cache")
    assert student_tokenizer(config) is None
    tiny_tokenizer(tmp_path / "teacher", vocab_size=300)
    assert len(student_tokenizer(config)) == 300


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path):
    config = make_config(tmp_path, train={"global_batch": 6, "micro_batch": 2})
    refused(
        config, "ConfigError", r"train\.global_batch: 6 is not .* 2 rank\(s\) x .* = 8", world=2
    )


def test_targets_that_the_divergence_cannot_use_are_refused(tmp_path):
    make_store(tmp_path / "cache", temperature=2.0)
    config = make_config(tmp_path, loss={"temperature": 1.0})
    refused(config, "ConfigError", r"loss\.temperature: 1\.0 differs .* 2\.0")


def test_an_incomplete_cache_is_refused(tmp_path):
    make_store(tmp_path / "cache", blocks=2)
    refused(
        make_config(tmp_path),
        "StoreError",
        r"cache\.dir: .* is incomplete, 16 of 24 sequences: .*; or .* cache\.allow_incomplete=true",
    )


def test_a_cache_without_one_of_its_shards_is_refused_with_the_command_that_repairs_it(tmp_path):
    cache = make_store(tmp_path / "cache")
    (tmp_path / "cache/shard.000001.mds").unlink()
    refused(
        make_config(tmp_path),
        "StoreError",
        rf"cache\.dir: .*shard\.000001\.mds is missing .*merge_and_inspect\.py --repair {cache}`",
    )


def test_an_empty_cache_is_refused(tmp_path):
    make_store(tmp_path / "cache", blocks=0)
    refused(make_config(tmp_path), "StoreError", r"cache\.dir: .* holds no sequence yet")


def test_a_cache_that_is_not_there_is_refused(tmp_path):
    config = make_config(tmp_path, cache={"dir": str(tmp_path / "nowhere")})
    refused(config, "StoreError", r"nowhere: no such folder")


def test_a_token_store_has_nothing_to_distil(tmp_path):
    make_store(tmp_path / "cache", method=None)
    refused(
        make_config(tmp_path), "ConfigError", r"cache\.dir: .* token store, without .*kd_weight=0"
    )


def test_held_out_targets_that_were_sampled_are_refused(tmp_path):
    make_store(tmp_path / "heldout", method="varopt")
    config = make_config(tmp_path, eval={"cache": str(tmp_path / "heldout")})
    refused(config, "ConfigError", r"eval\.cache: .* holds varopt targets, expected topk")


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    refused(config, "TrainError", r"train\.out_dir: .*out holds files, but no run of megadistill")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_student_that_is_not_there_is_refused(tmp_path):
    config = make_config(tmp_path, student={"model": str(tmp_path / "nothing")})
    refused(config, "ConfigError", r"student\.model: .*nothing cannot be read")


def test_another_stage_of_zero_is_refused(tmp_path):
    config = make_config(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    refused(config, "ConfigError", r"deepspeed\.zero_optimization\.stage: 2, expected 3")


def test_a_damaged_journal_is_refused_before_a_model_is_loaded(tmp_path):
    config = make_config(tmp_path)
    run_ranks(1, "tests.train.runs:claimed", config=config)
    journal = tmp_path / "out" / "metrics.jsonl"
    journal.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    (tmp_path / "model" / "model.safetensors").write_text("whoever loads this fails otherwise")
    for found, text in run_ranks(2, MESSAGE, config=config):
        assert found == "TrainError"
        assert "metrics.jsonl: line 2 is no record of a step: found '{\"st', expected" in text
    assert journal.read_text().count("\n") == 3


def test_a_run_that_died_before_its_first_step_goes_on(tmp_path):
    """All it left is what it claims the folder with; the check before a run looks at it, too."""
    config = make_config(tmp_path, train={"steps": 1, "warmup_steps": 0})
    for name in (".run.json", "run.json"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        if name == "run.json":
            run_ranks(1, "tests.train.runs:claimed", config=config)
        else:
            (tmp_path / "out" / name).write_bytes(b'{"half')
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
        check_run_folder(config.train.out_dir)
        assert run_ranks(1, "tests.train.runs:run", config=config) == [1]
