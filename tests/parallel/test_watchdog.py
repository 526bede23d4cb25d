"""All ranks stop together: within 20 s of a signal, of a rank's death, and never for nothing."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megadistill import parallel
from megadistill.parallel.liveness import KEY, call_hub
from megadistill.parallel.ranks import _STORE
from megadistill.parallel.watchdog import FORWARDED_S, GRACE_S
from tests.forked import Ranks

HERE = "tests.parallel.test_watchdog"
STOP_S = 20


@pytest.fixture
def ranks(tmp_path):
    """Starts three ranks on a function, and waits until all of them say that they are there."""
    started = []

    def start(function: str, *arguments, world: int = 3) -> Ranks:
        folder = tmp_path / str(len(started))
        begun = Ranks(world, f"{HERE}:{function}", folder, *arguments, folder=folder)
        started.append(begun)
        until(lambda: len(list(folder.glob("there-*"))) == world, begun)
        return begun

    yield start
    for each in started:
        each.__exit__()


def until(happened, begun: Ranks, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, begun.said()
        assert not any(begun.codes), begun.said()
        time.sleep(0.02)


def there(folder: Path, mesh) -> None:
    (folder / f"there-{mesh.rank}").touch()


def wait_for_each_other(folder: Path) -> None:
    """All ranks stand in collectives that never end and that no signal handler interrupts."""
    with parallel.joined(heartbeat_s=5) as mesh:
        there(folder, mesh)
        if mesh.rank < mesh.world - 1:
            mesh.sum(torch.zeros(1))
        else:
            dist.recv(torch.zeros(1), src=0)


def stop_softly(folder: Path) -> int:
    with parallel.joined() as mesh, parallel.graceful_stop() as stop:
        there(folder, mesh)
        stop.wait(60)
        mesh.barrier()  # the others were asked, too
        (folder / f"saved-{mesh.rank}").touch()
    return 0


def stand_still_softly(folder: Path) -> None:
    """As a save, or a step, that takes longer than the ranks are given."""
    with (
        parallel.joined() as mesh,
        parallel.accounted(lambda: "step 30 is saved"),
        parallel.graceful_stop(),
    ):
        there(folder, mesh)
        time.sleep(300)


def stand_still(folder: Path) -> None:
    with parallel.joined() as mesh, parallel.accounted(lambda: "step 30 is saved"):
        there(folder, mesh)
        time.sleep(300)


def stand_still_and_be_hit_again(folder: Path) -> None:
    def account() -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "step 30 is saved"

    with parallel.joined() as mesh, parallel.accounted(account):
        there(folder, mesh)
        time.sleep(300)


def ignore_the_terminal(folder: Path) -> int:
    """As under nohup, in the background of a script."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with parallel.joined() as mesh:
        there(folder, mesh)
        until_exists(folder / "go")
        mesh.barrier()
    return 0


def fail_on_rank_one(folder: Path) -> None:
    with parallel.joined() as mesh:
        there(folder, mesh)
        if mesh.rank == 1:
            raise ValueError("planted")
        mesh.sum(torch.zeros(1))
        time.sleep(300)


def be_busy(folder: Path, seconds: int) -> int:
    """Rank 1 keeps the interpreter to itself for longer than the others' patience."""
    with parallel.joined(heartbeat_s=1) as mesh:
        there(folder, mesh)
        if mesh.rank == 1:
            ctypes.PyDLL(None).sleep(seconds)
        mesh.barrier()
    return 0


def leave_late(folder: Path) -> int:
    with parallel.joined() as mesh:
        there(folder, mesh)
        if mesh.rank == 1:
            # What rank 0 holds, the process group's store, is there as long as anybody needs it.
            until_exists(folder / "go")
            mesh.store.set("late", "1")
    return 0


def count_after_leaving(folder: Path) -> int:
    """As a thread that still writes a block, or a checkpoint, when its rank leaves."""
    with parallel.joined() as mesh:
        there(folder, mesh)
    until_exists(folder / "go")
    with contextlib.suppress(dist.DistError):  # rank 0 may be gone
        mesh.store.add("late", 1)
    return 0


def end_a_child(folder: Path) -> int:
    """A forked child, as data loaders have them, is terminated: that concerns nobody else."""
    with parallel.joined() as mesh:
        there(folder, mesh)
        if mesh.rank == 1:
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
        mesh.barrier()
    return 0


def let_strangers_call(folder: Path) -> int:
    with parallel.joined(heartbeat_s=5) as mesh:
        there(folder, mesh)
        if mesh.rank == 1:
            port = json.loads(_STORE[0].get(KEY))["port"]
            for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 0, "token": "x"}\n{"stop": {}}\n'):
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(said)
        mesh.barrier()
    return 0


def until_exists(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


@pytest.mark.parametrize("told", [0, 1])
def test_a_sigterm_to_any_rank_ends_all_though_they_stand_in_a_collective(ranks, told):
    begun = ranks("wait_for_each_other")
    os.kill(begun.processes[told].pid, signal.SIGTERM)
    assert begun.wait(STOP_S) == [143] * 3, begun.said()
    assert begun.said().count(f"rank {told} on {socket.gethostname()} got SIGTERM") == 1
    assert "Traceback" not in begun.said()


def to_all(begun: Ranks, number: int) -> None:
    """As a terminal sends it."""
    for process in begun.processes:
        os.kill(process.pid, number)


@pytest.mark.parametrize(
    ("number", "code", "named"),
    [(signal.SIGINT, 130, "got SIGINT (Ctrl-C)"), (signal.SIGHUP, 129, "got SIGHUP (its term")],
)
def test_ctrl_c_and_a_closed_terminal_end_all_ranks_and_one_line_says_what_is_saved(
    ranks, number, code, named
):
    begun = ranks("stand_still")
    to_all(begun, number)
    assert begun.wait(STOP_S) == [code] * 3, begun.said()
    # All ranks get it; which one is named depends on whose word is heard first.
    assert begun.said().count(f" on {socket.gethostname()} {named}") == 1, begun.said()
    assert begun.said().count("step 30 is saved") == 1, begun.said()
    assert "Traceback" not in begun.said()


def test_a_signal_on_the_way_out_does_not_cut_short_what_is_said(ranks):
    begun = ranks("stand_still_and_be_hit_again")
    to_all(begun, signal.SIGINT)
    assert begun.wait(STOP_S) == [130] * 3, begun.said()
    assert begun.said().count("step 30 is saved") == 1, begun.said()


def test_a_second_ctrl_c_ends_all_ranks_at_once_and_says_what_is_saved(ranks):
    begun = ranks("stand_still_softly")
    to_all(begun, signal.SIGINT)
    until(lambda: "Ctrl-C again ends them at once" in begun.said(), begun)
    to_all(begun, signal.SIGTERM)  # a launcher's: it changes nothing
    to_all(begun, signal.SIGINT)  # of a launcher that forwards it
    assert begun.wait(FORWARDED_S) == [None] * 3, begun.said()
    os.kill(begun.processes[1].pid, signal.SIGINT)
    assert begun.wait(GRACE_S) == [130] * 3, begun.said()
    assert begun.said().count("step 30 is saved") == 1, begun.said()


def test_what_a_process_was_started_to_ignore_stops_nobody(ranks):
    begun = ranks("ignore_the_terminal")
    to_all(begun, signal.SIGINT)
    to_all(begun, signal.SIGHUP)
    (begun.logs[0].parent / "go").touch()
    assert begun.wait(STOP_S) == [0] * 3, begun.said()
    assert "stop" not in begun.said()


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_a_rank_that_is_killed_takes_the_others_along(ranks, killed):
    begun = ranks("wait_for_each_other")
    begun.processes[killed].kill()
    codes = begun.wait(STOP_S)
    assert codes == [-9 if rank == killed else 1 for rank in range(3)], begun.said()
    # Rank 0 says it; where it is rank 0 that died, the others do.
    said = begun.said().count(f"rank {killed} on {socket.gethostname()} died: all ranks stop")
    assert said == (2 if killed == 0 else 1), begun.said()
    assert "Traceback" not in begun.said()


def test_a_rank_that_fails_takes_the_others_along_and_is_the_only_one_to_say_why(ranks):
    begun = ranks("fail_on_rank_one")
    assert begun.wait(STOP_S) == [1, 1, 1]
    assert begun.said().count("ValueError: planted") == 1
    assert begun.said().count("Traceback") == 1
    assert "died" not in begun.said()


def test_who_asked_to_be_told_may_save_first(ranks):
    begun = ranks("stop_softly")
    os.kill(begun.processes[2].pid, signal.SIGTERM)
    assert begun.wait(STOP_S) == [0, 0, 0], begun.said()
    assert all((log.parent / f"saved-{r}").exists() for r, log in enumerate(begun.logs))


def test_a_rank_that_is_busy_in_c_or_stopped_is_not_taken_for_dead(ranks):
    begun = ranks("be_busy", 6)
    begun.processes[2].join(0.1)
    os.kill(begun.processes[2].pid, signal.SIGSTOP)
    begun.processes[1].join(4)
    os.kill(begun.processes[2].pid, signal.SIGCONT)
    assert begun.wait(STOP_S) == [0, 0, 0], begun.said()


@pytest.mark.parametrize("function", ["leave_late", "end_a_child", "let_strangers_call"])
def test_nothing_is_taken_for_a_death_that_is_none(ranks, function):
    begun = ranks(function)
    begun.processes[0].join(0.5)
    (begun.logs[0].parent / "go").touch()
    assert begun.wait(STOP_S) == [0, 0, 0], begun.said()
    assert "stop" not in begun.said()


def test_a_thread_may_count_what_it_wrote_when_its_rank_has_left_the_others(ranks):
    begun = ranks("count_after_leaving")
    (begun.logs[0].parent / "go").touch()
    assert begun.wait(STOP_S) == [0, 0, 0], begun.said()


def test_a_sigterm_to_plain_python_ends_it_in_order(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from megadistill import parallel\n"
        "try:\n"
        "    with parallel.joined():\n"
        "        pathlib.Path(sys.argv[1], 'there').touch()\n"
        "        time.sleep(300)\n"
        "finally:\n"
        "    pathlib.Path(sys.argv[1], 'cleaned').touch()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until_exists(tmp_path / "there")
        process.terminate()
        assert process.wait(STOP_S) == 143
        assert "rank 0 on" in process.stderr.read()
    assert (tmp_path / "cleaned").exists()


def test_a_hub_that_does_not_announce_itself_is_waited_for_no_longer_than_the_store_waits():
    store = dist.TCPStore(
        "127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=1), wait_for_workers=False
    )
    with pytest.raises(RuntimeError, match="wait timeout"):
        call_hub(store, master="127.0.0.1", rank=1, heartbeat_s=5)
