"""Benchmarks of whole steps: both sides are timed in pairs, and nothing is left."""

from __future__ import annotations

from megadistill.config import Config
from tests.bench.small import config
from tests.models.made import tiny_llama
from tests.ranks import run_ranks


def test_step_times_whole_steps_of_both_sides_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    rows = run_ranks(2, "tests.bench.test_step:stepped", folder=str(tmp_path))
    for row, losses in rows:
        assert row["pairs"] == 2
        assert row["least"] <= row["ratio"] <= row["most"]
        # A pair to warm up, then two; sides change places. Labels alone have no distillation term.
        kinds = ["cache" if kd else "labels" for kd in losses]
        assert kinds == ["cache", "labels", "labels", "cache", "cache", "labels"]
    assert not list(tmp_path.glob("megadistill-*"))


def stepped(mesh, folder: str):
    """The row, and of each micro-batch's loss whether it has a distillation term."""
    import tempfile

    from megadistill.bench import step
    from megadistill.train.student_engine import Trainer

    seen, backward = [], Trainer.backward

    def watched(self, *args, **kwargs):
        terms = backward(self, *args, **kwargs)
        seen.append(terms.kd_count > 0)
        return terms

    Trainer.backward, tempfile.tempdir = watched, folder  # the rank is older than TMPDIR
    try:
        sizes = step.StepSizes(
            vocab=300, hidden=32, layers=1, seq_len=32, global_batch=4, micro_batch=2
        )
        return step.step_cost(sizes, mesh, pairs=2), seen
    finally:
        Trainer.backward, tempfile.tempdir = backward, None


def online_rows(mesh, config):
    from megadistill.bench.online_step import online_cost

    return list(online_cost(config, mesh, rounds=2))


def test_a_step_with_the_teacher_beside_it_is_timed_against_one_from_the_cache(corpus, tmp_path):
    tiny_llama(tmp_path / "student", vocab_size=512, hidden_size=32, intermediate_size=48)
    asked = config(corpus).model_dump(mode="json")
    asked["teacher"]["dtype"] = "float32"
    asked["cache"]["dir"] = str(tmp_path / "cache")
    asked["student"], asked["order"] = {"model": str(tmp_path / "student")}, {}
    asked["train"] |= {
        "out_dir": str(tmp_path / "out"),
        "steps": 9,
        "global_batch": 4,
        "micro_batch": 2,
    }
    asked = Config.model_validate(asked)
    run_ranks(2, "tests.cache.building:build", config=asked)
    rows, others = run_ranks(2, "tests.bench.test_step:online_rows", config=asked)
    assert (
        [row["method"] for row in rows]
        == ["varopt", "topk", "union", "exact"]
        == [row["method"] for row in others]
    )
    for row in rows:
        assert row["least"] <= row["ratio"] <= row["most"]
        assert 0 < row["teacher"] < 1
    assert not (tmp_path / "out").exists()
