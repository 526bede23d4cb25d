"""Dry runs make the checks that a start makes of its stores, with its lines, and write nothing.

The truth is the start itself: `build_cache` and `train` on ranks, with the same configuration.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from megadistill.config import load_config
from megadistill.errors import MegadistillError
from megadistill.parallel import hosts_from_environment
from megadistill.preflight import check_generate, check_train, dry_run_generate, dry_run_train
from megadistill.storage.lock import StoreLock
from tests.models.made import teacher_and_text, tiny_model
from tests.preflight.starts import PROGRAMS, listing, start
from tests.ranks import run_ranks

YAML = """
data: {files: [text.jsonl], dir: tokens, seq_len: 32, block_size: 8, workers: 1}
teacher: {model: ./teacher, dtype: float32, micro_batch: 4}
targets: {tau: 0.1}
cache: {dir: cache, min_free: 0}
student: {model: ./student}
train: {steps: 2, global_batch: 2, micro_batch: 1, save_every: 1, out_dir: run}
"""
DRY_RUNS: dict[Callable, Callable] = {check_generate: dry_run_generate, check_train: dry_run_train}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A teacher, a student, a text, its cache, and a finished run."""
    folder = teacher_and_text(tmp_path_factory.mktemp("made"), documents=120)
    tiny_model(folder / "student")
    (folder / "c.yaml").write_text(YAML)
    for check in (check_generate, check_train):
        (said,) = run_ranks(1, STARTED, place=folder, program=PROGRAMS[check], overrides=[])
        assert said is None
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return tmp_path


STARTED = "tests.preflight.test_dry_run:started"


def started(mesh, place: Path, program: str, overrides: list[str]) -> tuple[str, str, int] | None:
    """The error that a start ends with: its type, its text and its exit code."""
    from megadistill.cache.build import build_cache
    from megadistill.train.loop import train

    with contextlib.chdir(place):
        config = load_config("c.yaml", overrides)
        try:
            if "generate" in program:
                check_generate(config, world=1)
                build_cache(config, mesh)
            else:
                check_train(config, world=1)
                train(config, mesh)
        except MegadistillError as error:
            return type(error).__name__, str(error), error.exit_code
    return None


def refused_alike(check: Callable, *overrides: str, where: Path, world: int = 1) -> str:
    """Lines of start and dry run. The dry run comes first, and leaves the folder as it is."""
    before = listing()
    ranks = mock.patch.dict(os.environ, WORLD_SIZE=str(world))
    with ranks, pytest.raises(MegadistillError) as caught:
        DRY_RUNS[check](load_config("c.yaml", list(overrides)))
    assert listing() == before
    dry = type(caught.value).__name__, str(caught.value), caught.value.exit_code
    for answer in run_ranks(
        world, STARTED, place=where, program=PROGRAMS[check], overrides=list(overrides)
    ):
        assert answer == dry
    return str(caught.value)


@contextlib.contextmanager
def held(lock: Path) -> Iterator[None]:
    """A lock that this process, a living one, holds."""
    lock.parent.mkdir(exist_ok=True)
    with StoreLock(lock, what="another run", patience_s=60):
        yield


@pytest.mark.parametrize("check", [check_generate, check_train])
def test_a_dry_run_of_what_is_sound_writes_nothing_and_prints_the_plan(check, place):
    arguments = ["--config", "c.yaml", "--dry_run"]
    for overrides in (
        [],  # complete, and finished
        ["train.out_dir=new", "data.dir=new-tokens", "cache.dir=new-cache"]
        if check is check_generate
        else ["train.out_dir=new"],
        ["train.steps=3", "train.schedule=constant"] if check is check_generate else [],
    ):
        before = listing()
        code, errors, out = start(PROGRAMS[check], *arguments, *overrides)
        assert (code, errors) == (0, [])
        assert out.startswith("# The plan, on 1 rank(s):\n#   sequences ")
        assert listing() == before


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["targets.tau=0.2"], "cache/cache.json: targets.tau is 0.1, this run's is 0.2: "),
        (["teacher.micro_batch=2"], "cache/cache.json: teacher.micro_batch is 4, this run's is 2"),
        (["teacher.model=./other"], "cache/cache.json: teacher.model is "),
        (["data.seq_len=16"], "tokens/tokens.json: data.seq_len is 32, this run's is 16: "),
        (["data.pack=concat"], "tokens/tokens.json: data.pack is 'isolate', this run's is 'conca"),
        (["data.packing=in_order"], "tokens: was packed by data.packing best_fit, found in_order"),
        (["data.max_samples=20"], "tokens: holds the tokens of 120 documents, data.max_samples is"),
    ],
)
def test_a_store_of_another_recipe(overrides, said, place):
    shutil.copytree("teacher", "other")
    with Path("other/model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x00\x40")  # the last weight is 2
    assert refused_alike(check_generate, *overrides, where=place).startswith(said)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.text_field=body"], "data.text_field: text.jsonl has no column 'body'; its columns"),
        (["data.files=[other.jsonl]"], "other.jsonl: found no column messages, conversations,"),
        (["data.files=[chats.jsonl]"], "the corpus holds chats, and the tokenizer has no chat"),
        (["data.files=[short.jsonl]", "data.pack=concat"], "short.jsonl: 1 documents with "),
        (["data.files=[blank.jsonl]"], "blank.jsonl: the corpus is empty: 2 documents without"),
        (["targets.positions=loss_mask"], "targets.positions: loss_mask needs text that is part"),
    ],
)
def test_a_corpus_that_cannot_be_tokenised(overrides, said, place):
    Path("other.jsonl").write_text('{"body": "some text"}\n')
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    Path("chats.jsonl").write_text(json.dumps(chat) + "\n")
    Path("short.jsonl").write_text('{"text": "some text"}\n')
    Path("blank.jsonl").write_text('{"text": ""}\n' * 2)
    new = ["data.dir=new-tokens", "cache.dir=new-cache"]
    assert said in refused_alike(check_generate, *overrides, *new, where=place)


def test_a_mask_that_leaves_nothing_to_learn(place):
    lines = [{"prompt": f"question {i} of many", "completion": ""} for i in range(9)]
    Path("asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    new = ["data.files=[asked.jsonl]", "data.dir=new-tokens", "cache.dir=new-cache"]
    assert "asked.jsonl: the corpus is empty" in refused_alike(check_generate, *new, where=place)


def test_held_out_text_is_refused_in_the_keys_of_eval(place):
    Path("other.jsonl").write_text('{"body": "some text"}\n')
    said = refused_alike(check_generate, "eval.files=[other.jsonl]", where=place)
    assert said.startswith("eval.files: other.jsonl: found no column")


def test_stores_that_another_run_is_writing(place):
    for store, key in (("cache", "cache.dir"), ("tokens", "data.dir")):
        Path(store, "blocks.bin").unlink()  # not complete
        with held(Path(f"{store}.run/lock")):
            said = refused_alike(check_generate, where=place)
        assert said.startswith(f"{store}: is being written by process {os.getpid()} on "), key


def test_a_cache_that_lost_a_shard(place):
    Path("cache/shard.000001.mds").unlink()
    said = refused_alike(check_generate, where=place)
    assert said.startswith("cache: cache/shard.000001.mds is missing or of another size (1 such")
    said = refused_alike(check_train, "train.out_dir=new", where=place)
    assert said.startswith("cache.dir: cache is damaged, cache/shard.000001.mds is missing")


def test_a_cache_that_is_not_complete(place):
    last = max(Path("cache/blocks").iterdir())
    last.unlink()
    said = refused_alike(check_train, "train.out_dir=new", where=place)
    assert said.startswith("cache.dir: cache is incomplete, ")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.lr=1e-3"], "run/run.json: train.lr is 0.0001, this run's is 0.001: "),
        (["train.global_batch=4"], "run/run.json: train.global_batch is 2, this run's is 4: "),
        (["loss.ce_weight=0.5"], "run/run.json: loss.ce_weight is 0.0, this run's is 0.5: "),
        (["train.steps=3"], "run/run.json: train.steps is 2, this run's is 3: "),
    ],
)
def test_a_finished_run_of_another_configuration(overrides, said, place):
    assert refused_alike(check_train, *overrides, where=place).startswith(said)


def test_a_run_folder_that_is_held_or_damaged(place):
    shutil.rmtree("run/model")  # not finished
    with held(Path("run/run.lock")):
        said = refused_alike(check_train, where=place)
    assert said.startswith(f"train.out_dir: run: is being written by process {os.getpid()} on ")
    for file in Path("run/checkpoints").rglob("*.pt"):
        file.write_bytes(b"damaged")
    said = refused_alike(check_train, where=place)
    assert said.startswith("run/checkpoints: none of its ")
    Path("run/run.json").write_text("{")
    assert refused_alike(check_train, where=place).startswith("run/run.json: is damaged")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["deepspeed.fp16.enabled=true"], "deepspeed.fp16.enabled: true, and there is no GPU here"),
        (["eval.cache=cache"], "eval.cache: cache holds varopt targets, expected topk"),
        (["cache.dir=[cache, other]"], "cache.dir: data.pack is isolate in cache and concat in o"),
    ],
)
def test_settings_that_a_run_of_this_cache_cannot_have(overrides, said, place):
    if "other" in overrides[0]:
        small = ["data.pack=concat", "data.dir=other-tokens", "cache.dir=other"]
        run_ranks(1, STARTED, place=place, program=PROGRAMS[check_generate], overrides=small)
    new = "train.out_dir=new"
    assert refused_alike(check_train, new, *overrides, where=place).startswith(said)


def test_a_batch_that_the_ranks_do_not_divide(place):
    overrides = ["train.out_dir=new", "train.global_batch=3"]
    said = refused_alike(check_train, *overrides, where=place, world=2)
    assert said.startswith("train.global_batch: 3 is not a multiple of 2 rank(s) x ")


def test_an_online_teacher_whose_text_cannot_be_read(place):
    online = ["teacher.mode=online", "train.out_dir=new", "data.dir=new-tokens"]
    said = refused_alike(check_train, *online, "data.text_field=body", where=place)
    assert said.startswith("data.text_field: text.jsonl has no column 'body'")
    before = listing()
    dry_run_train(load_config("c.yaml", online))  # nothing is tokenised yet
    dry_run_train(load_config("c.yaml", [*online[:2]]))
    assert listing() == before
    Path("new").mkdir()
    with held(Path("new/run.lock")):
        assert "is being written by" in refused_alike(check_train, *online, where=place)


def test_a_remote_cache_is_looked_at_and_leaves_nothing(place):
    url = f"file://{place}/cache"
    overrides = [f"cache.dir={url}", "train.out_dir=new", f"cache.local_dir={place}/local"]
    before = listing()
    dry_run_train(load_config("c.yaml", overrides))
    assert listing() == before
    max(Path("cache/blocks").iterdir()).unlink()
    Path("cache/blocks.bin").unlink()
    assert url in refused_alike(check_train, *overrides, where=place)


def test_the_number_of_hosts_is_checked_and_the_other_ranks_print_nothing(place, monkeypatch):
    arguments = ["--config", "c.yaml", "--dry_run", "parallel.expect_hosts=2"]
    code, (line,), _ = start("launch/train.py", *arguments)
    assert code == 2
    assert line.startswith("parallel.expect_hosts: expected 2 hosts, found 1 (")
    monkeypatch.setenv("CROSS_SIZE", "2")  # as DeepSpeed's launcher sets it
    assert hosts_from_environment()[1:] == ["host 1"]
    assert start("launch/train.py", *arguments)[0] == 0
    monkeypatch.setenv("RANK", "1")
    with contextlib.redirect_stdout(None):  # which would fail to be written to
        dry_run_train(load_config("c.yaml", []))
