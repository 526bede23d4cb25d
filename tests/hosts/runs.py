"""Programs over the hosts of a cluster, started as a user starts them."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.hosts.cluster import Cluster, Job
from tests.programs import ROOT

# A text of this machine's own Python, and training that takes seconds. `models` makes the models.
SMALL = [
    "data.name=null",
    "data.config=null",
    "data.streaming=false",
    "data.source=python-stdlib",
    "data.max_samples=3",
    "data.seq_len=64",
    "data.block_size=4",
    "data.workers=1",
    "teacher.model=teacher",
    "teacher.engine=tensor_parallel",
    "teacher.dtype=float32",
    "student.model=student",
    "cache.min_free=0",
]


def models(folder: Path) -> None:
    """Makes a teacher and a student in the folder, tiny and random."""
    from tests.models.made import tiny_model

    for name, seed, hidden in (("teacher", 0, 64), ("student", 1, 32)):
        tiny_model(folder / name, seed=seed, hidden_size=hidden)


def environment() -> dict[str, str]:
    """The variables that a program on a host needs, and its launcher gives to the other hosts."""
    folders = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"]
    passed = {
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return passed


def deepspeed(
    cluster: Cluster,
    *words: str,
    hosts: list[str] | None = None,
    slots: int = 1,
    port: int = 29500,
    env: dict[str, str] | None = None,
) -> Job:
    """`deepspeed --hostfile ... WORDS` from the first host, in the cluster's folder."""
    names = hosts or cluster.names
    passed = environment() | (env or {})
    env_file = cluster.folder / ".deepspeed_env"
    env_file.write_text("".join(f"{key}={value}\n" for key, value in passed.items()))
    hostfile = cluster.hostfile(*names, slots=slots)
    command = [
        Path(sys.executable).parent / "deepspeed",
        *("--hostfile", str(hostfile), "--no_ssh_check"),
        *("--master_addr", cluster.address(names[0]), "--master_port", str(port)),
        *words,
    ]
    own = {"DS_ENV_FILE": str(env_file)}
    return cluster.start(names[0], command, cwd=cluster.folder, env=passed | own)


def blocks(folder: Path) -> dict[str, bytes]:
    """The bytes of a store by file: what promise A covers."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "validation.json"
    }


def clear(folder: Path, *names: str) -> None:
    """Removes stores and runs that an earlier test left."""
    for name in names:
        for path in (folder / name, folder / f"{name}.run"):
            shutil.rmtree(path, ignore_errors=True)
