"""Building a cache: the same bytes at every rank count, each block once, nothing on a rerun."""

import numpy as np
import pytest

from megadistill.blocks import BlockReader, open_store
from megadistill.cache.reader import open_cache
from megadistill.config import Config
from tests.cache.building import BLOCK, SEQ_LEN, build, hashes, settings
from tests.ranks import run_ranks


def test_the_cache_is_complete_and_sound(single, corpus):
    cache, tokens = open_cache(single), open_store(corpus / "tokens")
    assert cache.complete()
    assert cache.verify() == []
    assert len(cache) == len(tokens) > 2 * BLOCK
    for i in range(len(cache)):
        np.testing.assert_array_equal(cache[i]["tokens"], tokens[i]["tokens"])
        _, weights = cache[i]["targets"].padded()
        sums = weights.sum(1)[cache[i]["targets"].counts > 0]
        np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_positions_without_a_next_token_in_their_document_have_no_target(single):
    for sample in open_cache(single):
        end = SEQ_LEN - sample["padding"]
        starts = sample["documents"][sample["documents"] < end].astype(int)
        ends = np.append(starts[1:], end) - 1
        counts = sample["targets"].counts
        assert (counts[ends] == 0).all()
        assert (np.delete(counts[:end], ends) > 0).all()
        assert (counts[end:] == 0).all()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_ranks_writes_the_same_bytes(single, corpus, tmp_path, ranks):
    cache = tmp_path / "cache"
    run_ranks(ranks, "tests.cache.building:build", config=settings(corpus, cache))
    assert hashes(cache) == hashes(single)


def test_zero3_writes_the_same_targets_at_one_and_two_ranks(corpus, tmp_path):
    found = []
    for ranks in (1, 2):
        cache = tmp_path / str(ranks)
        config = settings(corpus, cache, teacher={"engine": "zero3"})
        run_ranks(ranks, "tests.cache.building:build", config=config)
        found.append(hashes(cache))
    assert found[0] == found[1]


def test_two_tensor_parallel_ranks_write_one_cache(corpus, tmp_path):
    config = settings(corpus, tmp_path / "cache", teacher={"tp": 2})
    run_ranks(2, "tests.cache.building:build", tp=2, config=config)
    assert open_cache(tmp_path / "cache").complete()


def test_the_ranks_of_a_group_read_each_block_of_tokens_once(corpus, tmp_path):
    config = settings(corpus, tmp_path / "cache", teacher={"tp": 2})
    blocks = open_store(corpus / "tokens").num_blocks
    read = run_ranks(2, "tests.cache.test_build:blocks_read", tp=2, config=config)
    assert read == [2 * blocks, 0]  # and once to rank the ids


def blocks_read(mesh, config: Config) -> int:
    from unittest import mock

    with mock.patch.object(
        BlockReader, "block", autospec=True, side_effect=BlockReader.block
    ) as read:
        build(mesh, config)
    return sum(call.args[0].kind == "tokens" for call in read.call_args_list)


def test_what_the_first_rank_of_a_group_cannot_read_stops_all_of_the_group():
    said = run_ranks(2, "tests.cache.test_build:cannot_read", tp=2)
    assert said == ["a: expected b, found c"] * 2


def cannot_read(mesh) -> str:
    from megadistill.errors import CorruptBlockError

    def read():
        raise CorruptBlockError("a", "b", "c")

    assert mesh.run_once_per_tp_group(lambda: mesh.rank) == 0
    try:
        mesh.run_once_per_tp_group(read)
    except CorruptBlockError as error:
        return str(error).partition(":")[0] + str(error)[1 : len("a: expected b, found c")]
    return "no error"


@pytest.mark.parametrize("method", ["multinomial", "topk", "topp"])
def test_every_method_fills_a_cache_with_its_own_parameters_alone_in_the_recipe(
    corpus, tmp_path, method
):
    targets = {"method": method, "draws": 20, "k": 6, "p": 0.5, "nll": False}
    config = settings(corpus, tmp_path / "cache", targets=targets)
    run_ranks(2, "tests.cache.building:build", config=config)
    cache = open_cache(tmp_path / "cache")
    assert cache.complete()
    assert cache.verify() == []
    assert {n for n in ("tau", "draws", "k", "p", "min_entropy") if n in cache.recipe} == {
        "multinomial": {"draws"},
        "topk": {"k"},
        "topp": {"k", "p"},
    }[method]
    found = cache[0]["targets"]
    assert found.method == method
    assert 0 < found.counts.max() <= {"multinomial": 20, "topk": 7, "topp": 7}[method]
    assert found.entropy is not None
    assert found.nll is None


def test_positions_below_the_entropy_threshold_have_no_target(single, corpus, tmp_path):
    entropies = np.concatenate([s["targets"].entropy for s in open_cache(single)])
    threshold = float(np.nanmedian(entropies))
    targets = {"tau": 0.1, "positions": "entropy", "min_entropy": threshold, "entropy": False}
    config = settings(corpus, tmp_path / "cache", targets=targets)
    run_ranks(1, "tests.cache.building:build", config=config)
    kept = total = 0
    for all_of_them, some in zip(open_cache(single), open_cache(tmp_path / "cache"), strict=True):
        full, part = all_of_them["targets"], some["targets"]
        assert part.entropy is None
        total += int((full.counts > 0).sum())
        for n in np.nonzero(part.counts)[0]:
            a, b = full.rows(n, n + 1), part.rows(n, n + 1)
            assert float(full.entropy[n]) > threshold - 0.1  # a byte keeps it, to a few hundredths
            np.testing.assert_array_equal(a.ids, b.ids)
            kept += 1
    assert 0.3 * total < kept < 0.7 * total


def test_validation_knows_that_coding_drops_what_weighs_next_to_nothing(corpus, tmp_path):
    config = settings(corpus, tmp_path / "cache", targets={"tau": 0.1, "temperature": 0.02})
    run_ranks(1, "tests.cache.building:build", config=config)
    cache = open_cache(tmp_path / "cache")
    assert cache.complete()
    counts = np.concatenate([s["targets"].counts for s in cache])
    assert (counts == 1).sum() > 100


def test_a_built_cache_is_retruncated_with_its_ranking_of_ids(single, tmp_path):
    from megadistill.cache.retruncate import retruncate_cache

    retruncate_cache(single, tmp_path / "out", tau=0.3)
    cache, source = open_cache(tmp_path / "out"), open_cache(single)
    assert cache.verify() == []
    assert (tmp_path / "out/ids.bin").read_bytes() == (single / "ids.bin").read_bytes()
    assert cache.statistics()["entries"] < 0.6 * source.statistics()["entries"]
    assert cache.statistics()["positions"] == source.statistics()["positions"]
    assert cache.statistics()["entropy_codes"] == source.statistics()["entropy_codes"]


def test_an_interrupted_run_is_finished_by_another_number_of_ranks(single, corpus, tmp_path):
    cache = tmp_path / "cache"
    config = settings(corpus, cache)
    run_ranks(1, "tests.cache.building:build", config=config, stop_after=2)
    assert open_store(cache).committed() == [0, 1]
    built = run_ranks(2, "tests.cache.building:build", config=config)[0]
    assert built.computed_blocks == built.blocks - 2
    assert hashes(cache) == hashes(single)


def test_a_rerun_on_a_complete_cache_loads_no_teacher_and_changes_no_file(
    single, corpus, tmp_path, monkeypatch
):
    before = {path: path.stat().st_mtime_ns for path in single.rglob("*")}
    config = settings(corpus, single)
    built = run_ranks(1, "tests.cache.building:rerun", config=config)[0]
    assert built.computed_blocks == 0
    assert {path: path.stat().st_mtime_ns for path in single.rglob("*")} == before


def test_three_parts_merged_are_the_single_run(single, corpus, tmp_path):
    from megadistill.blocks.maintenance.merge import merge_stores
    from megadistill.inspect.inspection import block_check, inspect_store, require_sum

    for i in range(3):
        config = settings(corpus, tmp_path / str(i), cache={"part": f"{i}/3"})
        run_ranks(1 + i % 2, "tests.cache.building:build", config=config)
        part = open_store(tmp_path / str(i))
        assert part.committed() == [b for b in range(part.num_blocks) if b % 3 == i]
        assert not part.complete()
        before = {path: path.stat().st_mtime_ns for path in part.path.rglob("*")}
        assert run_ranks(1, "tests.cache.building:rerun", config=config)[0].computed_blocks == 0
        assert {path: path.stat().st_mtime_ns for path in part.path.rglob("*")} == before
    parts = [open_store(tmp_path / str(i)) for i in range(3)]
    merged = merge_stores(tmp_path / "merged", parts, check_of=block_check)
    require_sum(merged.store, merged.taken)
    assert hashes(tmp_path / "merged") == hashes(single)
    facts = inspect_store(tmp_path / "merged", verify=True)
    assert facts["complete"]
    assert facts["content_hash"] == inspect_store(single)["content_hash"]


def test_a_part_says_how_it_becomes_a_whole(single, corpus, tmp_path):
    config = settings(corpus, tmp_path / "0", cache={"part": "0/3"})
    said = run_ranks(1, "tests.cache.test_build:said_by_building", config=config)[0]
    assert "part 0/3 is complete; when the others are, merge them" in said
    config = settings(corpus, tmp_path / "all", cache={"part": "0/1"})
    assert run_ranks(1, "tests.cache.test_build:said_by_building", config=config)[0] == ""
    assert hashes(tmp_path / "all") == hashes(single)


def said_by_building(mesh, config: Config) -> str:
    import io
    import logging

    from megadistill.cache import build as module

    handler = logging.StreamHandler(io.StringIO())
    module.log.addHandler(handler)
    module.log.setLevel(logging.INFO)
    try:
        module.build_cache(config, mesh, validate=False)
    finally:
        module.log.removeHandler(handler)
    return handler.stream.getvalue()
