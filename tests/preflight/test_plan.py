"""The plan: what is known, what is estimated, and what cannot be known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megadistill.blocks import BlockWriter, open_store
from megadistill.config import load_config
from megadistill.models.model_files import find_model
from megadistill.preflight.plan import corpus_size, log_plan, make_plan, show_plan
from megadistill.preflight.plan.assumptions import position
from megadistill.preflight.plan.estimate import token_store_bytes
from megadistill.targets import sparse_method
from tests.models.made import tiny_llama, tiny_tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    tiny_llama("teacher")
    return tmp_path


def plan(*overrides: str, world: int = 2):
    settings = ["data.max_samples=null", "data.block_size=256", "train.steps=250", *overrides]
    return make_plan(load_config("demo.yaml", settings), world=world)


def line(made, name: str) -> str:
    return dict(made.lines)[name]


def test_the_parameters_of_a_model_are_counted_in_its_weights_or_worked_out(place):
    import torch
    from safetensors.torch import load_file

    expected = sum(t.numel() for t in load_file("teacher/model.safetensors").values())
    model = find_model("./teacher", key="teacher.model")
    assert model.parameters() == (expected, True)
    Path("teacher/model.safetensors").unlink()
    assert model.parameters() == (expected, False)
    assert torch.get_default_dtype() == torch.float32


def test_the_demos_sequences_are_estimated_within_a_third(place):
    made = plan("teacher.model=./teacher")
    # 3.25 million tokens of 128, measured with a vocabulary of 4,096
    assert made.sequences == pytest.approx(3.25e6 / 128, rel=0.33)
    assert made.blocks == -(-made.sequences // 256)
    assert "estimated from" in line(made, "sequences")
    assert made.steps == 250
    assert "512,000 tokens" in line(made, "steps")
    assert "counted" in line(made, "teacher")
    assert "are not on this machine" in line(made, "student")


def planned_tokens(sequences: int) -> BlockWriter:
    """A token store in "tokens" that knows how many sequences of 8 tokens it will hold."""
    store = BlockWriter.create(
        "tokens",
        kind="tokens",
        header={"recipe": {"seq_len": 8}},
        block_size=4,
        columns={"tokens": "ndarray:uint32:8", "documents": "ndarray:uint32"},
    )
    store.plan(sequences)
    return store


def test_a_planned_store_is_known_not_estimated(place):
    store = planned_tokens(10)
    store.commit(
        0,
        [{"tokens": np.zeros(8, np.uint32), "documents": np.zeros(1, np.uint32)}] * 4,
        statistics={},
    )
    made = plan("data.dir=tokens", "data.block_size=4", "data.seq_len=8")
    assert (made.sequences, made.blocks) == (10, 3)
    assert line(made, "sequences") == "10 of 8 tokens, known: tokens is planned"
    assert "are there, in tokens" in line(made, "token store")
    there = sum(p.stat().st_size for p in Path("tokens").rglob("*") if p.is_file())
    assert made.token_bytes_to_come == 2 * there  # one block of three is there


def test_what_cannot_be_known_is_said_to_be_unknown(place):
    settings = ["data.source=null", "data.name=a/b", "train.steps=null", "train.epochs=1"]
    made = plan(*settings, "train.warmup_steps=0")
    assert (made.sequences, made.cache_bytes, made.steps) == (None, None, None)
    assert "unknown: the number of documents is not known" in line(made, "sequences")
    assert "size unknown" in line(made, "cache")
    assert "unknown" in line(made, "steps")
    made = plan(*settings, "data.max_samples=1280")
    assert made.sequences == 10_000
    assert "estimated from at most 1,280 documents, 1000 tokens each" in line(made, "sequences")
    assert made.steps == 625
    made = plan("data.source=null", "data.files=[none.txt]")
    assert "unknown: data.files: no file matches" in line(made, "sequences")


def test_local_files_are_estimated_by_their_size(place):
    Path("a.txt").write_text("x" * 4_200_000)
    made = plan("data.source=null", "data.files=[a.txt]")
    assert made.sequences == pytest.approx(1e6 / 128, rel=0.01)
    assert plan("data.source=null", "data.files=[a.txt]", "data.max_samples=128").sequences == 1000


@pytest.mark.parametrize(
    ("row", "masked"),
    [
        ('{"text": "x"}', False),
        ('{"messages": [{"role": "user", "content": "x"}]}', True),
        ('{"prompt": "x", "completion": "y"}', True),
    ],
)
def test_the_loss_mask_of_columns_that_are_found_counts(place, row, masked):
    Path("a.jsonl").write_text(row + "\n")
    settings = ["data.source=null", "data.files=[a.jsonl]", "data.seq_len=128"]
    found = token_store_bytes(load_config("demo.yaml", settings))
    assert found - 4 * 128 == pytest.approx(128 if masked else 0, abs=64)


def test_smaller_tau_and_larger_k_need_a_larger_cache(place):
    sizes = [
        plan(*settings).cache_bytes
        for settings in (
            ["targets.tau=0.2"],
            ["targets.tau=0.06"],
            ["targets.tau=0.02"],
            ["targets.method=topk", "targets.k=128"],
        )
    ]
    assert sizes == sorted(sizes)


def test_a_part_needs_the_disk_for_its_own_blocks_alone(place):
    whole = plan()
    parts = [plan(f"cache.part={i}/3") for i in range(3)]
    assert {made.cache_bytes for made in parts} == {whole.cache_bytes}
    to_come = [made.cache_bytes_to_come for made in parts]
    assert sum(to_come) == pytest.approx(whole.cache_bytes_to_come, abs=3)
    assert max(to_come) < 0.4 * whole.cache_bytes_to_come
    assert "cache, part 1/3" in dict(parts[1].lines)


def test_memory_falls_with_the_ranks_that_share_a_model(place):
    student = ["student.model=./teacher", "cache.dir=c"]
    made = {world: plan(*student, "teacher.model=./teacher", world=world) for world in (1, 8)}
    assert made[8].student_memory < made[1].student_memory
    assert made[8].teacher_memory == made[1].teacher_memory
    assert made[1].run_bytes_to_come > 0


def test_memory_falls_by_what_is_offloaded_or_computed_again(place):
    student = ["student.model=./teacher", "cache.dir=c", "teacher.model=./teacher"]
    zero = "deepspeed.zero_optimization"
    plain, optimizer, weights, activations = (
        plan(*student, *more).student_memory
        for more in (
            [],
            [f"{zero}.offload_optimizer.device=cpu"],
            [f"{zero}.offload_param.device=cpu"],
            ["train.activation_checkpointing=true"],
        )
    )
    assert max(optimizer, weights, activations) < plain


def test_the_plan_is_printed_first_and_then_the_keys_that_differ_from_the_defaults(place, capsys):
    config = load_config("demo.yaml", ["teacher.model=./teacher", "train.lr=3e-5"])
    show_plan(config)
    printed = capsys.readouterr().out
    Path("again.yaml").write_text(printed)
    assert load_config("again.yaml") == config
    plan, changed = printed.split("\n\n")
    assert plan.startswith("# The plan, on 1 rank(s):\n#   sequences ")
    assert all(line.startswith("#") for line in plan.splitlines())
    assert changed.startswith("# Keys that differ from their defaults:\n")
    sections = yaml.safe_load(changed)
    assert float(sections["train"]["lr"]) == 3e-5
    for name, section in sections.items():
        if name == "deepspeed":  # DeepSpeed's own keys
            continue
        fields = type(getattr(config, name)).model_fields
        assert [key for key, value in section.items() if value == fields[key].default] == []


def test_other_ranks_print_no_plan(place, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    show_plan(load_config("demo.yaml"))
    assert capsys.readouterr().out == ""


def tokenised(documents: int) -> None:
    from megadistill.data.tokens import build_tokens

    build_tokens(load_config("demo.yaml", text(documents)), progress=False)


def text(documents: int) -> list[str]:
    return [
        "data.source=null",
        "data.files=[a.jsonl]",
        f"data.max_samples={documents}",
        "data.dir=t",
        "data.shuffle=false",
        "data.seq_len=16",
        "data.block_size=4",
        "data.workers=1",
        "data.packing=best_fit",
        "teacher.model=./teacher",
        "data.tokenizer=null",
        "cache.dir=c",
    ]


def test_raised_max_samples_is_estimated_from_the_documents_that_are_there(place):
    tiny_tokenizer("teacher")
    line = '{"text": "the quick brown fox jumps over lazy dogs number %d while it rains"}\n'
    Path("a.jsonl").write_text("".join(line % i for i in range(64)))
    tokenised(16)
    few = plan(*text(16))
    assert "known: t is planned" in dict(few.lines)["sequences"]
    assert few.token_bytes_to_come == 0
    store = open_store("t")
    assert all("padding" in sample for sample in store)
    padding = sum(int(sample["padding"]) for sample in store)
    held = corpus_size.tokens(load_config("demo.yaml", text(16)).data, len(store))
    assert held == 16 * len(store) - padding < 16 * len(store)
    many = plan(*text(64))
    assert "of 64 documents gave, in t" in dict(many.lines)["sequences"]
    there = sum(p.stat().st_size for p in Path("t").rglob("*") if p.is_file())
    assert many.token_bytes_to_come == pytest.approx(3 * there, rel=0.1)
    tokenised(64)
    assert plan(*text(64)).sequences == pytest.approx(many.sequences, rel=0.1)


def test_a_position_takes_what_was_measured_of_teachers_of_1_to_5_nats():
    from megadistill.config import TargetsConfig

    # Entries of varopt at tau = 0.06; the estimate is for 2 nats.
    for measured in (5.3, 6.1, 6.6, 7.9, 10.6, 12.9, 14.0):
        estimate = position(TargetsConfig(tau=0.06), vocab_size=32_000)
        assert 0.55 < measured / estimate.entries < 1.8
        assert measured <= estimate.most_entries == 18
    for tau in (1, 0.9, 0.5, 0.3, 0.01, 1e-4):
        estimate = position(TargetsConfig(tau=tau), vocab_size=512)
        assert 1 <= estimate.entries <= estimate.most_entries <= 512
        assert estimate.bytes < estimate.most_bytes


def test_no_position_of_varopt_has_more_entries_than_the_bound():
    import math

    import torch

    from megadistill import select_targets

    generator = torch.Generator().manual_seed(0)
    keys = torch.stack([torch.zeros(400, dtype=torch.int64), torch.arange(400)], 1)
    spread = torch.rand(400, 1, generator=generator) * 6
    log_probs = torch.log_softmax(torch.randn(400, 300, generator=generator) * spread, 1)
    for tau in (0.9, 0.5, 0.34, 0.2, 0.06, 0.03):
        counts = select_targets(log_probs, method="varopt", tau=tau, keys_N=keys).counts
        assert int(counts.max()) <= math.ceil(1 / tau) + 1


def test_generating_prints_the_plan_without_the_student(place, caplog):
    made = make_plan(load_config("demo.yaml", ["teacher.model=./teacher"]), world=2, training=False)
    caplog.set_level("INFO", logger="megadistill")
    log_plan(made)
    assert [r.getMessage().split()[1] for r in caplog.records] == [
        "sequences",
        "blocks",
        "token",
        "targets",
        "cache",
        "teacher",
    ]
    assert "bytes per token estimated" in caplog.text


def test_a_part_of_a_cache_needs_room_for_its_own_blocks(place):
    planned_tokens(40)
    settings = ["data.dir=tokens", "data.block_size=4", "data.seq_len=8"]
    whole = plan(*settings)
    assert whole.cache_bytes_to_come == whole.cache_bytes > 0
    parts = [plan(*settings, f"cache.part={i}/3").cache_bytes_to_come for i in range(3)]
    assert parts == [whole.cache_bytes * blocks // 10 for blocks in (4, 3, 3)]


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        # At 128,256 ids and 1.6 nats: entries, bytes per token.
        ({"tau": 0.2}, (3.48, 8.42)),
        ({"tau": 0.06}, (6.29, 13.58)),
        ({"tau": 0.02}, (11.18, 22.33)),
        ({"method": "multinomial", "draws": 10}, (3.87, 8.92)),
        ({"method": "multinomial", "draws": 200}, (20.3, 38.9)),
        ({"method": "topk", "k": 8}, (8.1, 21.3)),
        ({"method": "topk", "k": 64}, (64.0, 138.4)),
        ({"method": "topp", "p": 0.95}, (20.5, 46.4)),
    ],
)
def test_bytes_follow_from_the_entries_as_the_codec_was_measured(settings, measured):
    from megadistill.config import TargetsConfig

    estimate = position(TargetsConfig(**settings), vocab_size=128_256)
    entries, size = measured
    assert 0.95 < estimate.entries / entries < 1.8
    assumed = sparse_method(settings.get("method", "varopt"))
    assert assumed.bytes_per_position + assumed.bytes_an_entry * entries == pytest.approx(
        size, rel=0.06
    )


def test_topp_of_everything_is_k():
    from megadistill.config import TargetsConfig

    assert position(TargetsConfig(method="topp", p=1, k=64), vocab_size=None).entries == 65
