"""The disk's reserve: all ranks stop before it is full, and a rerun ends in the same bytes."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.cache.disk_guard import DiskGuard, block_bytes
from megadistill.config import CacheConfig, Config
from megadistill.errors import MegadistillError, StoreError
from tests.cache.building import hashes
from tests.cache.caches import fill_cache
from tests.models.made import teacher_and_text
from tests.ranks import run_ranks

ENGINES = {"two copies": {}, "one copy, tensor parallel": {"tp": 2}, "ZeRO-3": {"engine": "zero3"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A teacher with its tokenizer, and a text of 12 blocks."""
    return teacher_and_text(tmp_path_factory.mktemp("corpus"), documents=60)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Callable[[str], Path]:
    """The cache of an undisturbed run under each engine."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def cache_of(engine: str) -> Path:
        if engine not in made:
            made[engine] = folder / engine
            assert set(build(corpus, made[engine], engine)) == {None}
        return made[engine]

    return cache_of


def build(corpus: Path, cache: Path, engine: str, *, room: int | None = None, **keys) -> list:
    """What each of two ranks ended with: an error's text, or None."""
    config = Config.model_validate(
        {
            "data": {
                "files": [str(corpus / "text.jsonl")],
                "dir": str(corpus / "tokens"),
                "seq_len": 32,
                "block_size": 4,
                "workers": 1,
            },
            "teacher": {
                "model": str(corpus / "teacher"),
                "dtype": "float32",
                "micro_batch": 3,
                **ENGINES[engine],
            },
            "targets": {"tau": 0.1},
            "cache": {"dir": str(cache), "min_free": 0, **keys},
        }
    )
    return run_ranks(
        2, "tests.cache.test_disk_guard:rank", tp=config.teacher.tp, config=config, room=room
    )


def rank(mesh, config: Config, room: int | None) -> str | None:
    """Build on a disk that has room for `room` bytes of this cache; None: on the real one."""
    from megadistill.cache.build import build_cache

    def left(path: Path) -> int:
        taken = sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())
        return max(0, room - taken)

    seam = {} if room is None else {"free_bytes": left}
    try:
        build_cache(config, mesh, validate=False, **seam)
    except MegadistillError as error:
        # Told to all, so that one of them says it to the user.
        return str(error) if error.common else f"one rank's own: {error}"
    return None


def size_of(store: BlockReader) -> int:
    return sum(block_bytes(store, b) for b in store.committed())


@pytest.mark.parametrize("engine", ENGINES)
def test_all_ranks_stop_before_the_disk_is_full_and_a_rerun_ends_in_the_same_bytes(
    corpus, whole, tmp_path, engine
):
    undisturbed = open_store(whole(engine))
    blocks, size = undisturbed.num_blocks, size_of(undisturbed)
    assert blocks >= 10
    cache = tmp_path / "cache"
    said = build(corpus, cache, engine, room=round(size * 0.7))
    assert said[0] == said[1]
    assert f"{cache}: stopped, its disk has " in said[0]
    assert " are still to come, expected at least 0.5 of that, cache.reserve: free " in said[0]
    stopped = open_store(cache)
    # 0.7 - x < (1 - x) / 2 from x = 0.4 on; of that x, each of two ranks may have a block in
    # computing and one half written, which takes room and is not committed.
    assert 0.4 * blocks - 4 < len(stopped.committed()) < blocks
    assert verify_store(stopped) == []
    assert {p.name for p in cache.glob("shard.*")} == {
        stopped.layout.shard(b).name for b in stopped.committed()
    }
    assert build(corpus, cache, engine) == [None, None]
    assert hashes(cache) == hashes(whole(engine))


def test_less_than_min_free_stops_a_run_that_has_room_for_the_rest(corpus, whole, tmp_path):
    cache = tmp_path / "cache"
    said = build(corpus, cache, "two copies", room=10**9, min_free=1)
    assert said[0] == said[1]
    assert "expected at least cache.min_free (1.0 GiB): free " in said[0]
    assert said[0].endswith("or set cache.min_free=0")
    assert 0 < len(open_store(cache).committed()) <= 4  # two ranks, two blocks each at most


def test_reserve_0_does_not_watch(corpus, whole, tmp_path):
    cache = tmp_path / "cache"
    assert build(corpus, cache, "two copies", room=0, reserve=0) == [None, None]
    assert hashes(cache) == hashes(whole("two copies"))


def test_the_last_blocks_need_no_reserve(corpus, whole, tmp_path):
    size = size_of(open_store(whole("two copies")))
    cache = tmp_path / "cache"
    assert build(corpus, cache, "two copies", room=round(size * 1.2)) == [None, None]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if _mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)):
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> int:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_disk_that_is_full_stops_all_ranks_with_nothing_half_visible(corpus, whole, disk, engine):
    cache = disk / "cache"
    said = build(corpus, cache, engine, reserve=0)
    assert said[0] == said[1]
    assert "No space left on device" in said[0]
    assert "free some space and run again" in said[0]
    assert "\n" not in said[0]
    stopped = open_store(cache)
    assert len(stopped.committed()) < stopped.num_blocks
    # A shard whose marker did not fit is not visible, and the rerun removes it.
    assert all("a shard without a marker" in line for line in verify_store(stopped))
    assert not _mount("-o", "remount,size=64m", str(disk))
    assert build(corpus, cache, engine) == [None, None]
    assert hashes(cache) == hashes(whole(engine))


def test_counting_a_block_takes_one_message(corpus, whole):
    """However many blocks and ranks there are: it stands between a block and the next."""
    said = run_ranks(1, "tests.cache.test_disk_guard:said_at_a_commit", cache=whole("two copies"))[
        0
    ]
    assert said == ["add"]


def said_at_a_commit(mesh, cache: Path) -> list[str]:
    """What is asked of the group's store."""
    said = []

    class Told:
        def __getattr__(self, name):
            said.append(name)
            return getattr(mesh.store, name)

    told = SimpleNamespace(store=Told(), rank=mesh.rank)
    store, settings = open_store(cache), CacheConfig(min_free=0)
    reserve = DiskGuard(told, store, settings, run=time.time_ns(), missing=1000)
    said.clear()
    reserve.committed(0)
    return said


def test_the_bytes_are_those_of_the_blocks_that_are_counted_whenever_they_are_read(
    corpus, whole, monkeypatch
):
    size = 16 * 1000
    monkeypatch.setattr("megadistill.cache.disk_guard.block_bytes", lambda store, block: size)
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    asked: list[int] = []

    def ranks(count: int) -> list[DiskGuard]:
        clients = [dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(count)]
        store, settings = open_store(whole("two copies")), CacheConfig(min_free=0)
        return [
            DiskGuard(SimpleNamespace(store=c), store, settings, run=0, missing=4001)
            for c in clients
        ]

    def note(reserve: DiskGuard) -> None:
        monkeypatch.setattr(reserve, "_too_little", lambda to_come: asked.append(to_come))
        for block in range(1000):
            reserve.committed(block)

    *writing, reading = ranks(5)
    threads = [threading.Thread(target=note, args=(reserve,)) for reserve in writing]
    for thread in threads:
        thread.start()
    read = []
    while any(thread.is_alive() for thread in threads):
        read.append(reading.durable())
    for thread in threads:
        thread.join()
    assert reading.durable() == (4000, 4000 * size)
    assert len(read) > 10
    assert all(total == blocks * size for blocks, total in read)
    # What is still to come is worked out from the same two numbers.
    assert sorted(asked) == [left * size for left in range(1, 4001)]


def test_a_writer_that_fails_after_rank_zero_has_gone_says_nothing_more(tmp_path, caplog):
    """The store of the process group went with rank 0: it is the watchdog that stops this rank."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    mesh = SimpleNamespace(store=client)
    reserve = DiskGuard(mesh, fill_cache(tmp_path / "cache"), CacheConfig(), run=0, missing=1)
    del server
    reserve.ask_to_stop(StoreError("the lock is lost"))
    with pytest.raises(dist.DistError) as gone:
        reserve.committed(0)
    reserve.ask_to_stop(gone.value)
    assert caplog.records == []
