"""The commands as users type them, through the real launchers, on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megadistill.blocks import open_store
from tests.models.made import tiny_model
from tests.ssh import SshServer, available

pytestmark = pytest.mark.launcher
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder like a clone's top level, with tiny models and a hostfile of this machine."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("megadistill", "launch", "configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    for name, seed, hidden in (("teacher", 0, 64), ("student", 1, 32)):
        tiny_model(folder / name, seed=seed, hidden_size=hidden)
    (folder / "hosts").write_text("localhost slots=2\n")
    return folder


# What size and a missing network demand of configs/zero3.yaml; everything else is as shipped.
SMALL = [
    "data.name=null",
    "data.config=null",
    "data.streaming=false",
    "data.source=python-stdlib",
    "data.max_samples=3",
    "data.seq_len=64",
    "data.block_size=16",
    "data.workers=1",
    "teacher.model=teacher",
    "teacher.dtype=float32",
    "student.model=student",
    "cache.min_free=0",
]
SMALL_TRAINING = [
    "train.epochs=null",
    "train.steps=3",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.warmup_steps=1",
]


def run(place: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess:
    folders = [str(path)] if path else []
    folders += [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        command,
        cwd=place,
        env={**environment, "PATH": os.pathsep.join(folders)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def succeed(place: Path, *command: str, path: Path | None = None) -> str:
    done = run(place, *command, path=path)
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.skipif(not available(), reason="needs root, openssh-server and pdsh")
def test_the_three_commands_as_typed_from_a_hostfile_to_a_model(place, tmp_path):
    server = SshServer(tmp_path / "ssh")
    try:
        said = succeed(
            place,
            "deepspeed",
            "--hostfile",
            "hosts",
            "launch/generate.py",
            *SMALL,
            path=server.path,
        )
    finally:
        server.close()
    assert "1 host(s) x 2 rank(s)" in said
    assert "validated" in said

    said = succeed(
        place,
        "deepspeed",
        "--num_gpus",
        "2",
        "launch/train.py",
        "--config",
        "zero3.yaml",
        *SMALL,
        *SMALL_TRAINING,
    )
    lines = (place / "runs/zero3/train/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert (place / "runs/zero3/train/model/model.safetensors").exists()

    whole = json.loads(succeed(place, "python", "tools/inspect_cache.py", "--json"))
    assert whole["complete"]
    assert whole["method"] == "varopt"


@pytest.mark.skipif(not available(), reason="needs root, openssh-server and pdsh")
def test_the_package_runs_as_a_module_from_a_hostfile(place, tmp_path):
    server = SshServer(tmp_path / "ssh")
    command = ["deepspeed", "--hostfile", "hosts", "--module", "megadistill", "generate"]
    settings = [*SMALL, "data.dir=runs/module_tokens", "cache.dir=runs/module"]
    try:
        said = succeed(place, *command, *settings, "--no_validate", path=server.path)
    finally:
        server.close()
    assert "1 host(s) x 2 rank(s)" in said
    assert open_store(place / "runs/module").complete()


@pytest.mark.long
def test_torchrun_and_plain_python_work_and_write_the_same_cache(place):
    caches = []
    for name, command in (
        ("torchrun", ["torchrun", "--standalone", "--nproc-per-node", "2"]),
        ("python", ["python"]),
    ):
        settings = [
            *SMALL,
            f"cache.dir=runs/{name}",
            "data.dir=runs/tokens",
            "teacher.engine=tensor_parallel",
        ]
        succeed(place, *command, "launch/generate.py", *settings)
        caches.append(open_store(place / f"runs/{name}"))
    assert caches[0].complete()
    assert caches[0].content_hash() == caches[1].content_hash()
    succeed(
        place,
        "python",
        "launch/train.py",
        *SMALL,
        *SMALL_TRAINING,
        "cache.dir=runs/python",
        "data.dir=runs/tokens",
        "teacher.engine=tensor_parallel",
        "train.out_dir=runs/one",
    )
    assert (place / "runs/one/model/config.json").exists()


def test_a_mistyped_key_ends_every_rank_with_one_line_and_code_2(place):
    done = run(place, "deepspeed", "--num_gpus", "2", "launch/generate.py", "targets.taau=0.1")
    assert done.returncode == 2
    assert "Traceback" not in done.stdout, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stdout
    assert "targets.taau" in lines[0]
    assert "targets.tau" in lines[0]
    alone = run(place, "python", "launch/generate.py", "targets.taau=0.1")
    assert alone.returncode == 2


def test_dry_run_prints_the_configuration_and_the_plan_and_writes_nothing(place):
    said = succeed(
        place,
        "python",
        "launch/generate.py",
        "--dry_run",
        *SMALL,
        "cache.dir=runs/never",
        "data.dir=runs/never_tokens",
    )
    assert said.startswith("# The plan, on 1 rank(s):\n")
    assert "# Keys that differ from their defaults:\n" in said
    assert not (place / "runs/never").exists()
    assert not (place / "runs/never_tokens").exists()


def test_no_rank_outlives_a_launcher_that_was_terminated(tmp_path):
    script = str(Path(__file__).parent / "waiting.py")
    launcher = subprocess.Popen(
        [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", script, str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2, seconds=90)
    below = psutil.Process(launcher.pid).children(recursive=True)
    assert len(below) >= 3  # DeepSpeed's own launcher of this host, and two ranks
    launcher.terminate()
    launcher.wait()
    assert psutil.wait_procs(below, timeout=30)[1] == []


def wait_for(happened, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.1)
