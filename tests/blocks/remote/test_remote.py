"""Stores at URLs: what is read is what a marker confirms, through a bounded folder of copies."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.blocks.remote.object_store import Remote, shown
from megadistill.blocks.remote.shard_cache import LocalCopies
from megadistill.blocks.remote.upload import copy_store
from megadistill.errors import CorruptBlockError, StoreError
from tests.blocks.remote.remotes import SAMPLES, require_same, shards
from tests.blocks.stores import BLOCK_SIZE, commit, create, fill, make_samples, same_sample, tree


class Counted:
    """Calls of a file system's method, counted by the object's name; `fail` may raise first."""

    def __init__(self, monkeypatch, fs, method, fail=lambda name, count: None):
        self.names, original = [], getattr(type(fs), method)

        def call(this, path, *args, **kwargs):
            name = str(args[0] if method.startswith("put") else path).rpartition("/")[2]
            self.names.append(name)
            fail(name, self.names.count(name))
            return original(this, path, *args, **kwargs)

        monkeypatch.setattr(type(fs), method, call)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_store_at_a_url_is_the_store_that_was_copied_there(
    protocol, memory, source, local, tmp_path
):
    url = f"{protocol}://{tmp_path}/there"
    assert copy_store(source.path, url).sent == 10
    store = open_store(url, local=local)
    require_same(store)
    assert store.name == url
    assert store.complete()
    assert store.content_hash() == source.content_hash()
    assert verify_store(store) == []
    if protocol == "file":
        assert tree(tmp_path / "there") == tree(source.path)


def test_a_remote_store_is_copied_back_byte_for_byte(url, source, tmp_path, local):
    copied = copy_store(url, tmp_path / "back", local=local)
    assert (copied.sent, copied.there) == (10, 0)
    assert tree(tmp_path / "back") == tree(source.path)
    again = copy_store(url, tmp_path / "back", local=local)
    assert (again.sent, again.there) == (0, 10)


def test_opening_takes_few_requests_and_a_shard_is_downloaded_once(url, local, memory, monkeypatch):
    small = Counted(monkeypatch, memory, "cat_file")
    large = Counted(monkeypatch, memory, "get_file")
    store = open_store(url, local=local)
    require_same(store)
    require_same(open_store(url, local=local))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: open_store(url, local=local)[3], range(8)))
    assert sorted(large.names) == [f"shard.{b:06d}.mds" for b in range(10)]
    # No marker: blocks.bin knows them all.
    assert set(small.names) == {"tokens.json", "cache.json", "plan.json", "blocks.bin"}


@pytest.mark.parametrize("lag", ["absent", "short", "damaged"])
def test_where_blocks_bin_lags_the_markers_are_listed(lag, memory, tmp_path, local):
    source = create(tmp_path / "source")
    source.plan(len(SAMPLES))
    for block in range(4):
        commit(source, block, SAMPLES)
    source.finish()
    early = (source.path / "blocks.bin").read_bytes()
    commit(source, 7, SAMPLES)
    copy_store(source.path, "memory://unfinished")
    if lag == "absent":
        memory.rm_file("/unfinished/blocks.bin")
    else:
        memory.pipe_file("/unfinished/blocks.bin", early if lag == "short" else early[:-1])
    store = open_store("memory://unfinished", local=local)
    assert store.committed() == [0, 1, 2, 3, 7]
    assert same_sample(store[7 * BLOCK_SIZE], SAMPLES[7 * BLOCK_SIZE])
    assert not store.complete()
    with pytest.raises(StoreError, match="block 5 is missing"):
        store.marker(5)


def test_no_more_shards_are_kept_than_the_limit_allows(url, source, tmp_path):
    size = max(p.stat().st_size for p in source.path.glob("shard.*"))
    local = LocalCopies(tmp_path / "local", limit=2 * size + 10)
    store = open_store(url, local=local)
    for i in range(len(SAMPLES)):
        assert same_sample(store[i], SAMPLES[i])
        assert len(shards(local)) <= 2
    assert shards(local) == ["shard.000008.mds", "shard.000009.mds"]
    assert verify_store(store, workers=1) == []
    assert len(shards(local)) <= 2
    # What several threads read at a time is in use; the next download makes room for itself.
    assert verify_store(store, workers=4) == []
    store.block(5)
    store.block(6)
    assert len(shards(local)) <= 2
    # Another store shares the limit. (This one has a shard open.)
    del store
    copy_store(source.path, "memory://other")
    require_same(open_store("memory://other", local=local))
    assert len(shards(local)) <= 2


def read_all(url, folder, limit, rank):
    """A rank of a host: reads the whole store, each from another place on.

    Ranks wait for files: a lock among them would be lost with the one that is killed.
    """
    store = open_store(url, local=LocalCopies(folder / "local", limit=limit))
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.001)
    order = [(i + 7 * rank) % len(SAMPLES) for i in range(len(SAMPLES))]
    if not all(same_sample(store[i], SAMPLES[i]) for i in order):
        os._exit(1)


@pytest.mark.parametrize("room", [2, 100])
def test_processes_share_the_local_copies_and_one_that_is_killed_harms_nobody(
    room, source, tmp_path
):
    copy_store(source.path, f"file://{tmp_path}/far")
    size = max(p.stat().st_size for p in source.path.glob("shard.*"))
    spawn = multiprocessing.get_context("spawn")
    ranks = [
        spawn.Process(target=read_all, args=(f"file://{tmp_path}/far", tmp_path, room * size, rank))
        for rank in range(4)
    ]
    for rank in ranks:
        rank.start()
    while len(list(tmp_path.glob("ready-*"))) < 4:
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    while ranks[0].is_alive() and not list((tmp_path / "local").glob("*/shard.*")):
        pass
    ranks[0].kill()
    for rank in ranks[1:]:
        rank.join()
    assert [rank.exitcode for rank in ranks[1:]] == [0, 0, 0]
    local = LocalCopies(tmp_path / "local", limit=room * size)
    require_same(open_store(f"file://{tmp_path}/far", local=local))
    assert len(shards(local)) <= min(room, 10)
    assert not list(local.path.glob("*.run/*.part"))


def test_a_shard_in_use_is_not_removed_and_those_used_last_stay(url, source, tmp_path):
    size = max(p.stat().st_size for p in source.path.glob("shard.*"))
    local = LocalCopies(tmp_path / "local", limit=3 * size + 10)
    reader, other = (open_store(url, local=local) for _ in range(2))
    with reader.shard_file(0) as path:
        for block in (1, 2, 1, 3):
            other.block(block)
        assert path.exists()
        assert shards(local) == [f"shard.{b:06d}.mds" for b in (0, 1, 3)]
    for block in (4, 5):
        other.block(block)
    assert not path.exists()


def test_a_damaged_object_is_downloaded_once_more_and_then_refused(url, local, memory, monkeypatch):
    good = memory.cat_file("/bucket/store/shard.000002.mds")
    memory.pipe_file("/bucket/store/shard.000002.mds", good[:-1] + bytes([good[-1] ^ 1]))
    counted = Counted(monkeypatch, memory, "get_file")
    store = open_store(url, local=local)
    with pytest.raises(
        CorruptBlockError, match=r"memory://bucket/store/shard.000002.mds: expected"
    ):
        store[2 * BLOCK_SIZE]
    assert counted.names == ["shard.000002.mds"] * 2
    assert shards(local) == []
    assert same_sample(store[0], SAMPLES[0])


def test_damage_on_the_way_is_mended_by_the_second_download(url, local, memory, monkeypatch):
    original = type(memory).get_file

    def damaged(this, path, target, **options):
        original(this, path, target, **options)
        if not store._damaged_once:
            store._damaged_once = True
            Path(target).write_bytes(b"x" * Path(target).stat().st_size)

    monkeypatch.setattr(type(memory), "get_file", damaged)
    store = open_store(url, local=local)
    store._damaged_once = False
    assert same_sample(store[5], SAMPLES[5])


@pytest.mark.parametrize("what", ["truncated", "longer", "gone", "huge"])
def test_objects_of_another_size_are_refused_without_downloading_them(
    what, url, local, memory, monkeypatch
):
    good = memory.cat_file("/bucket/store/shard.000001.mds")
    if what == "gone":
        memory.rm_file("/bucket/store/shard.000001.mds")
    elif what == "huge":
        monkeypatch.setattr(Remote, "size", lambda *_: 1 << 50)
    else:
        memory.pipe_file(
            "/bucket/store/shard.000001.mds", good[:-1] if what[0] == "t" else good * 2
        )
    counted = Counted(monkeypatch, memory, "get_file")
    with pytest.raises(
        CorruptBlockError, match=r"shard.000001.mds: expected .* found (no file|\d)"
    ):
        open_store(url, local=local)[BLOCK_SIZE]
    assert counted.names == []


def test_a_local_copy_that_was_damaged_is_fetched_anew(url, local):
    open_store(url, local=local)[0]
    (copy,) = local.path.glob("*/shard.000000.mds")
    data = bytearray(copy.read_bytes())
    data[-3] ^= 4
    copy.write_bytes(data)
    assert same_sample(open_store(url, local=local)[0], SAMPLES[0])
    copy.write_bytes(data[:-5])
    assert same_sample(open_store(url, local=local)[0], SAMPLES[0])


def test_another_store_at_the_same_url_is_not_mixed_with_the_copies(url, local, memory, tmp_path):
    open_store(url, local=local)[0]
    others = make_samples(2 * BLOCK_SIZE, seed=9)
    other = fill(tmp_path / "other", others, header={"recipe": {"seq_len": 8, "tokenizer": "x"}})
    memory.rm("/bucket/store", recursive=True)
    copy_store(other.path, url)
    require_same(open_store(url, local=local), others)


def test_the_same_recipe_with_other_bytes_is_fetched_anew(url, local, memory, tmp_path):
    require_same(open_store(url, local=local))
    open_store(url, local=local).marker(0)
    others = make_samples(len(SAMPLES), seed=9)
    other = fill(tmp_path / "other", others)
    memory.rm("/bucket/store", recursive=True)
    copy_store(other.path, url)
    store = open_store(url, local=local)
    require_same(store, others)
    assert store.marker(0) == other.marker(0)


def test_a_network_fault_is_tried_again_and_then_told_with_the_url(url, local, memory, monkeypatch):
    def once(name, count):
        if count == 1:
            raise ConnectionResetError("the other side went away")

    Counted(monkeypatch, memory, "get_file", once)
    store = open_store(url, local=local)
    assert same_sample(store[0], SAMPLES[0])

    def always(name, count):
        raise TimeoutError("no answer from https://u:pw@host/x?X-Signature=abc")

    counted = Counted(monkeypatch, memory, "get_file", always)
    with pytest.raises(StoreError) as caught:
        store[2 * BLOCK_SIZE]
    assert str(caught.value) == (
        "memory://bucket/store/shard.000002.mds: cannot download: TimeoutError: no answer from "
        "https://host/x?..."
    )
    assert len(counted.names) == 3


def test_what_is_not_allowed_is_not_tried_again(url, local, memory, monkeypatch):
    def forbidden(name, count):
        raise PermissionError("no")

    counted = Counted(monkeypatch, memory, "get_file", forbidden)
    with pytest.raises(StoreError, match="cannot download: PermissionError: no"):
        open_store(url, local=local)[0]
    assert len(counted.names) == 1


def test_credentials_are_in_no_message_nor_in_a_store_s_name(monkeypatch):
    def refuse(*_, **__):
        raise OSError("cannot log in as alice:pa55word to host with alice and pa55word")

    monkeypatch.setattr("fsspec.core.url_to_fs", refuse)
    with pytest.raises(StoreError) as caught:
        open_store("sftp://alice:pa55word@host/data/cache?token=abcdef")
    said = str(caught.value)
    assert said.startswith("sftp://host/data/cache: cannot reach: OSError: cannot log in as ...")
    assert "pa55word" not in said
    assert caught.value.__cause__ is None
    assert shown("hf://datasets/me/cache@main/x") == "hf://datasets/me/cache@main/x"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nosuch://x/y", "nosuch://x/y: nosuch:// is not known, expected file, sftp, s3"),
        ("memory://empty", "memory://empty: holds no tokens.json or cache.json"),
        ("gs://bucket/x", "gs:// needs a package that is not installed: run `pip install gcsfs`"),
    ],
)
def test_urls_that_cannot_be_opened(url, said, memory, monkeypatch):
    import fsspec as library

    real = library.get_filesystem_class

    def missing(protocol):
        if protocol == "gs":
            raise ImportError("Please install gcsfs to access Google Storage")
        return real(protocol)

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert said in str(caught.value)


def test_a_remote_store_cannot_be_written_in_place(url, local):
    assert not isinstance(open_store(url, local=local), BlockWriter)
    for write in (lambda: create(url), lambda: BlockWriter.open(url)):
        with pytest.raises(StoreError, match=r"memory://bucket/store: .* tools/copy_cache.py"):
            write()
    require_same(open_store(url, local=local))
