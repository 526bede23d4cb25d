"""One run at a time, and a dead run's lock taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megadistill.blocks.lock import StoreLock, _identity
from megadistill.errors import LockedError


def lock(tmp_path: Path, *, patience_s: float = 0.2) -> StoreLock:
    return StoreLock(tmp_path / "lock", what="the store", patience_s=patience_s)


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with lock(tmp_path) as held:
        assert held.held()
        with (
            pytest.raises(LockedError, match=f"the store: .* process {os.getpid()} on "),
            lock(tmp_path),
        ):
            pass
        assert held.held()
    with lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_released_when_its_holder_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    with lock(tmp_path):
        pass


def test_the_lock_of_a_process_that_died_is_taken_over_at_once(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from megadistill.blocks.lock import StoreLock\n"
        "StoreLock(Path(sys.argv[1]), what='x', patience_s=1).__enter__(); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lock")], check=False)
    assert done.returncode == 9
    assert (tmp_path / "lock").exists()
    with lock(tmp_path, patience_s=1000) as taken:
        assert taken.held()
    assert list(tmp_path.iterdir()) == []


def test_a_process_number_used_again_is_not_the_old_holder(tmp_path: Path) -> None:
    holder = _identity() | {"nonce": "old", "started": "1"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock(tmp_path, patience_s=1000) as taken:
        assert taken.held()


def test_a_holder_on_another_host_without_a_heartbeat_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(json.dumps({"host": "far", "pid": 1, "nonce": "old"}))
    with lock(tmp_path) as taken:
        assert taken.held()


def test_a_holder_on_another_host_that_gives_a_sign_of_life_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "far", "pid": 1, "nonce": "old"}))
    beats = "import os, sys\nwhile True: os.utime(sys.argv[1])"
    with subprocess.Popen([sys.executable, "-c", beats, str(path)]) as far:
        with pytest.raises(LockedError, match="process 1 on far"), lock(tmp_path, patience_s=20):
            pass
        far.kill()
    assert json.loads(path.read_text())["nonce"] == "old"


def test_a_holder_that_was_replaced_knows_and_leaves_its_successor_alone(tmp_path: Path) -> None:
    first = lock(tmp_path)
    with first:
        holder = json.loads((tmp_path / "lock").read_text())
        (tmp_path / "lock").write_text(json.dumps(holder | {"nonce": "successor"}))
        assert not first.held()
    assert json.loads((tmp_path / "lock").read_text())["nonce"] == "successor"
