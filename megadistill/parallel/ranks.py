"""The process group: joining it, leaving it, and the place of a rank in it.

world = tp x dp. Consecutive ranks form a tensor-parallel group; rank = dp_rank * tp + tp_rank.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megadistill.errors import ConfigError, MegadistillError
from megadistill.parallel import builds
from megadistill.parallel.watchdog import PATIENCE_S, Stop, Watchdog

log = logging.getLogger(__name__)
_FIRST = itertools.count()  # names one call of Mesh.first or Mesh.on on all ranks
_WATCHDOG: list[Watchdog] = []  # this process's, from `start` to `stop`
_STORE: list[dist.Store] = []  # keeps rank 0's server alive until the others have left


def choose_accelerator() -> None:
    """Tell DeepSpeed to run on the CPU where there is no GPU, before it is first imported."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


choose_accelerator()


@dataclass(frozen=True)
class Mesh:
    """Place of this rank in tp x dp, with collectives. Made once by `start`.

    store: the process group's key-value store, counters and keys that every rank sees. Threads may
    use it until the process ends, also when the process group is gone; where its server, rank 0, is
    gone they get a DistError.
    """

    rank: int
    world: int
    local_rank: int
    hosts: int
    tp: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    store: dist.Store

    @property
    def dp(self) -> int:
        return self.world // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def broadcast(self, value: Any, *, group: dist.ProcessGroup | None = None) -> Any:
        """Returns the `value` of the group's first rank (default: rank 0) on every rank of it."""
        box = [value]
        source = 0 if group is None else dist.get_global_rank(group, 0)
        dist.broadcast_object_list(box, src=source, group=group, device=self.device)
        return box[0]

    def gather(self, value: Any, *, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Returns all values, in rank order, on every rank of the group (default: all ranks)."""
        if dist.get_world_size(group) == 1:
            return [value]
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, value, group=group)
        return everyone

    def run_once_per_tp_group(self, function: Callable[[], Any]) -> Any:
        """Runs function() on the first rank of each tp group; returns or raises its result on all.

        Collective over the group, so function() must not take long.
        """
        if self.tp == 1:
            return function()
        answer: tuple[Any, MegadistillError | None] | None = None
        if self.tp_rank == 0:
            try:
                answer = (function(), None)
            except MegadistillError as error:
                answer = (None, error)
        value, failed = self.broadcast(answer, group=self.tp_group)
        if failed is not None:
            raise failed
        return value

    def run_on_rank0(self, function: Callable[[], Any], *, poll_s: float = 0.2) -> Any:
        """Runs function() on rank 0 alone; returns its result, or raises its error, on every rank.

        The others ask the key-value store, so that rank 0 may take hours: a collective would time
        out. Collective over all ranks.
        """
        key = f"megadistill/first/{next(_FIRST)}"
        return self._answers([0], key, function, shared=True, poll_s=poll_s)[0]

    def on(self, ranks: Sequence[int], function: Callable[[], Any], *, poll_s: float = 0.2) -> Any:
        """Runs function() on these ranks. Returns its result there, None elsewhere.

        A MegadistillError of any of them is raised on every rank. Waits as `run_on_rank0` does.
        Collective over all ranks, which must name the same `ranks`. Returns when all have ended.
        """
        key = f"megadistill/on/{next(_FIRST)}"
        return self._answers(ranks, key, function, shared=False, poll_s=poll_s).get(self.rank)

    def _answers(
        self,
        ranks: Sequence[int],
        key: str,
        function: Callable[[], Any],
        *,
        shared: bool,
        poll_s: float,
    ) -> dict[int, Any]:
        """Returns what function() gave on these ranks: all of them if `shared`, else this rank."""
        own = None
        if self.rank in ranks:
            failed: MegadistillError | None = None
            try:
                own = function()
            except MegadistillError as error:
                error.common = True
                failed = error
            except BaseException as error:
                # The others leave quietly: the traceback is this rank's to print.
                failed = MegadistillError(f"rank {self.rank} failed: {type(error).__name__}")
                failed.secondary = True
                self.store.set(f"{key}/{self.rank}", pickle.dumps((None, failed)))  # type: ignore[arg-type]
                raise
            answer = pickle.dumps((own if shared else None, failed))
            self.store.set(f"{key}/{self.rank}", answer)  # type: ignore[arg-type]
        answers = {}
        for rank in ranks:
            if rank == self.rank:
                answers[rank] = own
                if failed is not None:
                    raise failed
                continue
            while not self.store.check([f"{key}/{rank}"]):
                time.sleep(poll_s)
            value, other = pickle.loads(self.store.get(f"{key}/{rank}"))  # noqa: S301 - a rank's
            if other is not None:
                raise other
            answers[rank] = value
        return answers

    def first_of_hosts(self, *, among: Iterable[int]) -> list[int]:
        """Returns the lowest rank of `among` on each host, in rank order. Collective."""
        hosts = self.gather(socket.gethostname())
        lowest: dict[str, int] = {}
        for rank in sorted(among):
            lowest.setdefault(hosts[rank], rank)
        return sorted(lowest.values())

    def sum(self, tensor: torch.Tensor, *, group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Returns the sum over all ranks, or those of a group, on the device of `tensor`."""
        moved = tensor.to(self.device, copy=True)
        dist.all_reduce(moved, group=group)
        return moved.to(tensor.device)


@dataclass(frozen=True)
class Unjoined:
    """Rank 0 of `world` ranks that have not joined: for checks, which ask for rank 0's answer."""

    world: int
    rank: int = 0

    def run_on_rank0(self, function: Callable[[], Any]) -> Any:
        """As Mesh.run_on_rank0."""
        return function()


def rank_from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank) as the launcher set them; (0, 1, 0) for plain python."""
    env = os.environ
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1)), int(env.get("LOCAL_RANK", 0))


def check_layout(*, tp: int, world: int) -> None:
    """ConfigError when `tp` does not divide the ranks. Needs no process group."""
    if world % tp:
        raise ConfigError(
            f"teacher.tp: {tp} does not divide the {world} ranks of this run: start a multiple of "
            f"{tp} ranks, or set teacher.tp to one of "
            f"{', '.join(str(t) for t in range(1, world + 1) if world % t == 0)}"
        )


def check_hosts(expect_hosts: int | None, names: Sequence[str]) -> None:
    """ConfigError where the run has another number of hosts than it should. names: theirs."""
    if expect_hosts is not None and len(names) != expect_hosts:
        raise ConfigError(
            f"parallel.expect_hosts: expected {expect_hosts} hosts, found {len(names)} "
            f"({', '.join(names)}): check the hostfile's path, which DeepSpeed only "
            "warns about when it is missing"
        )


def hosts_from_environment() -> list[str]:
    """Names of the run's hosts before they meet: this one's, and numbers for the others."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    # torchrun names the ranks of this host, DeepSpeed's launcher the number of hosts.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    hosts = int(os.environ.get("CROSS_SIZE", -(-world // here)))
    return [socket.gethostname(), *(f"host {number}" for number in range(1, hosts))]


def start(
    *,
    tp: int = 1,
    expect_hosts: int | None = None,
    timeout_s: int = 1800,
    heartbeat_s: int = 60,
    cpu_threads: int = 1,
) -> Mesh:
    """Joins the process group and lays out the mesh. Collective over all ranks.

    heartbeat_s: seconds without an answer from another host until its ranks count as gone.
    cpu_threads: torch's threads a rank. Set here, since sums, and so a cache's bytes, depend on it.
    """
    torch.set_num_threads(cpu_threads)
    # DeepSpeed calls collectives by names that torch 2.13 has replaced.
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed builds its operators with ninja, which pip puts beside the interpreter; a rank that
    # was started over ssh does not have that folder on its PATH.
    folder = os.path.dirname(sys.executable)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    rank, world, local_rank = rank_from_environment()
    check_layout(tp=tp, world=world)
    if not _WATCHDOG:
        _WATCHDOG.append(Watchdog(rank=rank, world=world))
        _WATCHDOG[0].start()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(_free_port()),
        )
    builds.install()
    import deepspeed

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # DeepSpeed's shared-memory all-reduce for CPUs ignores the process group it is given and sums
    # over the world: with tp < world the teacher's logits come out wrong, silently. Without it gloo
    # serves, and nobody waits a minute for it to be compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        try:
            # A connection of the watchdog's own, before the process group: that one takes its time,
            # and waits for ranks that are no more.
            _STORE[:] = [next(dist.rendezvous("env://", timeout=timeout))[0]]
            _WATCHDOG[0].join(_STORE[0], master=os.environ["MASTER_ADDR"], heartbeat_s=heartbeat_s)
            deepspeed.init_distributed(
                dist_backend="nccl" if cuda else "gloo",
                timeout=timeout,
                auto_mpi_discovery=False,
                verbose=False,
            )
        except dist.DistNetworkError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise MegadistillError(
                f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}): rank 0 "
                "has ended, or another run on that host has the port: give the launcher "
                "--master_port"
            ) from error
    tp_groups = [dist.new_group(range(r, r + tp)) for r in range(0, world, tp)]
    dp_groups = [dist.new_group(range(t, world, tp)) for t in range(tp)]
    names: list[Any] = [None] * world
    dist.all_gather_object(names, socket.gethostname())
    hosts = len(set(names))
    check_hosts(expect_hosts, sorted(set(names)))
    if rank == 0:
        log.info(
            "%d host(s) x %d rank(s), tp %d x dp %d, on %s",
            hosts,
            world // hosts,
            tp,
            world // tp,
            device.type,
        )
    return Mesh(
        rank=rank,
        world=world,
        local_rank=local_rank,
        hosts=hosts,
        tp=tp,
        device=device,
        tp_group=tp_groups[rank // tp],
        dp_group=dp_groups[rank % tp],
        store=dist.distributed_c10d._get_default_store(),
    )


@contextlib.contextmanager
def joined(**settings: Any) -> Iterator[Mesh]:
    """Yields the mesh of `start`. Leaves it at the end; an error here stops the other ranks.

    An error that follows from another rank's end becomes SystemExit, since that rank has reported
    the cause.
    """
    error: BaseException | None = None
    try:
        yield start(**settings)
    # RuntimeError is also what collectives and the store raise when a rank is gone.
    except (RuntimeError, MegadistillError) as raised:
        error = raised
        if isinstance(raised, MegadistillError) and not raised.secondary:
            raise
        cause = _WATCHDOG[0].settled(PATIENCE_S) if _WATCHDOG else None
        if cause is None:
            raise
        _WATCHDOG[0].speak()
        time.sleep(PATIENCE_S)  # a launcher ends all when the first leaves: let the cause be that
        sys.exit(cause.code)
    except BaseException as raised:
        error = raised
        raise
    finally:
        stop(error)


def stop(error: BaseException | None = None) -> None:
    """Leaves the process group. Without this a rank may crash at exit."""
    if _WATCHDOG and error is not None:
        _WATCHDOG[0].conclude()
        _WATCHDOG[0].failed(error)
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        if _WATCHDOG:
            _WATCHDOG[0].leave()
    finally:
        _WATCHDOG.clear()
        _STORE.clear()


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Yields the `Stop` that is set when all ranks must stop; the body then has 15 s to end."""
    if _WATCHDOG:
        with _WATCHDOG[0].graceful_stop() as stop:
            yield stop
    else:
        yield Stop()


@contextlib.contextmanager
def accounted(account: Callable[[], str]) -> Iterator[None]:
    """Logs account(), a line that says what is saved, if a stop ends the body.

    Logs once, on one rank: when SystemExit or an error leaves the body, or when the process is
    ended inside it. account() runs in any thread and must not wait for anything.
    """
    if not _WATCHDOG:
        yield
        return
    watchdog = _WATCHDOG[0]
    watchdog.account = account
    yield
    watchdog.account = None  # an error that leaves the body is accounted for in `stop`


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
