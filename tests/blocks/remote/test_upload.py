"""Copies of stores at URLs: whole or never believed, and gone on with where they stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import fsspec
import pytest

from megadistill.blocks import open_store
from megadistill.blocks.remote.upload import copy_store
from megadistill.errors import CorruptBlockError, StoreError
from tests import ssh
from tests.blocks.remote.remotes import SAMPLES, require_same
from tests.blocks.stores import BLOCK_SIZE, commit, fill, tree


@pytest.mark.parametrize("sent", [1, 4, 9, 15, 21])
def test_an_upload_killed_anywhere_is_never_believed_and_goes_on(
    sent, source, memory, local, monkeypatch
):
    """The object being written when the kill comes is left half written, as sftp would."""
    left, whole = [sent], {"put_file": type(memory).put_file, "pipe_file": type(memory).pipe_file}

    def counted(method):
        def call(this, *args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            if left[0] == 0:
                path = args[1] if method == "put_file" else args[0]
                data = Path(args[0]).read_bytes() if method == "put_file" else args[1]
                whole["pipe_file"](this, path, data[: len(data) // 2])
                raise KeyboardInterrupt
            return whole[method](this, *args, **options)

        return call

    with monkeypatch.context() as patch:
        for method in whole:
            patch.setattr(type(memory), method, counted(method))
        with pytest.raises(KeyboardInterrupt):
            copy_store(source.path, "memory://up", workers=1)
    if sent > 2:  # header and plan are there
        begun = open_store("memory://up", local=local)
        assert not begun.complete()
        for block in begun.committed()[:-1]:
            assert len(begun.block(block)) == BLOCK_SIZE
    copied = copy_store(source.path, "memory://up", workers=1)
    assert copied.there == max(0, (sent - 3) // 2)
    require_same(open_store("memory://up", local=local))
    assert copy_store(source.path, "memory://up").sent == 0
    for name, data in tree(source.path).items():
        assert memory.cat_file(f"/up/{name}") == data


def test_a_shard_that_was_damaged_there_is_sent_again_by_verify(url, source, memory):
    good = memory.cat_file("/bucket/store/shard.000003.mds")
    memory.pipe_file("/bucket/store/shard.000003.mds", b"x" * len(good))
    assert copy_store(source.path, url).sent == 0
    assert copy_store(source.path, url, verify=True).sent == 1
    assert memory.cat_file("/bucket/store/shard.000003.mds") == good
    memory.pipe_file("/bucket/store/shard.000003.mds", good[:-1])
    assert copy_store(source.path, url).sent == 1


def test_a_shard_that_is_damaged_on_its_way_is_found_by_verify_and_not_committed(
    source, memory, monkeypatch
):
    put_file = type(memory).put_file

    def damaged(this, source_path, path, **options):
        put_file(this, source_path, path, **options)
        if path.endswith("shard.000003.mds"):
            data = this.cat_file(path)
            this.pipe_file(path, data[:-1] + bytes([data[-1] ^ 1]))

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "put_file", damaged)
        with pytest.raises(StoreError, match=r"shard\.000003\.mds: sent \d+ bytes, found other"):
            copy_store(source.path, "memory://up", verify=True, workers=1)
    assert not memory.exists("/up/blocks/000003.json")
    assert copy_store(source.path, "memory://up", verify=True).sent > 0
    assert (
        memory.cat_file("/up/shard.000003.mds") == (source.path / "shard.000003.mds").read_bytes()
    )


def test_copying_over_another_store_changes_nothing(url, memory, tmp_path, local):
    before = {path: memory.cat_file(path) for path in memory.find("/bucket/store")}
    other = fill(tmp_path / "other", SAMPLES, header={"recipe": {"seq_len": 8, "tokenizer": "x"}})
    with pytest.raises(StoreError, match=r"store/tokens.json: is another store's"):
        copy_store(other.path, url)
    part = fill(tmp_path / "part", SAMPLES[: 2 * BLOCK_SIZE])
    with pytest.raises(StoreError, match=r"holds 8 blocks that .*part has not"):
        copy_store(part.path, url)
    memory.pipe_file("/taken/thesis.tex", b"years of work")
    with pytest.raises(StoreError, match=r"memory://taken: holds thesis.tex but no tokens.json"):
        copy_store(other.path, "memory://taken")
    plan = memory.cat_file("/bucket/store/plan.json")
    assert {p: memory.cat_file(p) for p in memory.find("/bucket/store")} == before | {
        "/bucket/store/plan.json": plan
    }


def test_a_damaged_source_is_not_sent(source, memory):
    shard = source.layout.shard(2)
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(CorruptBlockError, match=r"shard.000002.mds: expected xxh3"):
        copy_store(source.path, "memory://up")
    assert not memory.exists("/up/blocks/000002.json")
    assert not memory.exists("/up/blocks.bin")


def test_a_store_that_grew_is_brought_up_to_date(tmp_path, memory, local):
    short = SAMPLES[: BLOCK_SIZE + 2]
    source = fill(tmp_path / "source", short)
    copy_store(source.path, "memory://grown")
    require_same(open_store("memory://grown", local=local), short)
    source.plan(len(SAMPLES))
    for block in source.missing():
        commit(source, block, SAMPLES)
    source.finish()
    copied = copy_store(source.path, "memory://grown")
    assert (copied.sent, copied.there) == (9, 1)
    require_same(open_store("memory://grown", local=local))


@pytest.mark.skipif(not ssh._sshd() or os.geteuid() != 0, reason="needs openssh-server, as root")
def test_a_store_on_an_sftp_server(source, tmp_path, local, monkeypatch):
    server = ssh.SshServer(tmp_path / "ssh")
    try:
        monkeypatch.setenv("FSSPEC_SFTP_KEY_FILENAME", str(tmp_path / "ssh" / "user_key"))
        fsspec.config.set_conf_env(fsspec.config.conf)
        url = f"sftp://root@127.0.0.1:{server.port}{tmp_path}/there"
        assert copy_store(source.path, url, verify=True).sent == 10
        assert tree(tmp_path / "there") == tree(source.path)
        store = open_store(url, local=local)
        require_same(store)
        assert store.complete()
        assert copy_store(source.path, url).there == 10
        shutil.rmtree(tmp_path / "there" / "blocks")
        (tmp_path / "there" / "blocks.bin").unlink()
        (tmp_path / "there" / "shard.000004.mds").unlink()
        store = open_store(url, local=local)
        assert store.committed() == []
    finally:
        fsspec.config.conf.pop("sftp", None)
        server.close()
