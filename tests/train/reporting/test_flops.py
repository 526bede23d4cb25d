"""The operations of a step against torch's own count, and the peaks by device."""

import gc
import mmap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megadistill.student.model import Student
from megadistill.train.reporting.device_stats import DeviceStats, memory, readings_line
from megadistill.train.reporting.flops import Flops, peak_flops

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def counted(model, *, sequences, seq_len):
    """torch's count of the model's own forward and backward, all positions with a label."""
    ids = torch.arange(sequences * seq_len).reshape(sequences, seq_len) % model.config.vocab_size
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [{}, {"head_dim": 32}])
def test_a_llamas_step_has_the_operations_that_torch_counts(tied, more):
    config = LlamaConfig(**SIZES, **more, tie_word_embeddings=tied, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    expected = counted(model, sequences=2, seq_len=48)
    flops = Flops.of(Student(model), seq_len=48)
    # torch counts the rotary angles too, a product of one column by one row.
    assert flops.step(tokens=2 * 48, labels=96) == pytest.approx(expected, rel=2e-3)


def test_the_head_counts_where_there_are_labels_and_for_the_rows_that_take_part():
    flops = Flops.of(Student(LlamaForCausalLM(LlamaConfig(**SIZES))), seq_len=48)
    some, all_of_them = (flops.step(tokens=48, labels=n) for n in (8, 48))
    assert all_of_them - some == 6 * 512 * 64 * 40
    cut = Flops.of(Student(LlamaForCausalLM(LlamaConfig(**SIZES)), vocab_size=500), seq_len=48)
    assert flops.step(tokens=48, labels=8) - cut.step(tokens=48, labels=8) == 6 * 12 * 64 * 8


def test_a_sliding_window_bounds_what_is_attended_to():
    from transformers import MistralConfig, MistralForCausalLM

    wide, narrow = (
        Flops.of(Student(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=w))), seq_len=48)
        for w in (None, 16)
    )
    difference = wide.step(tokens=48, labels=0) - narrow.step(tokens=48, labels=0)
    assert difference == 12 * 3 * 64 * 48 * (48 - 16)


def test_of_experts_those_count_that_are_chosen():
    sizes = SIZES | {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16}
    two, four = (
        Flops.of(
            Student(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts_per_tok=n))), seq_len=8
        )
        for n in (2, 4)
    )
    an_expert = 3 * 64 * 32
    difference = four.step(tokens=8, labels=0) - two.step(tokens=8, labels=0)
    assert difference == 6 * 3 * 2 * an_expert * 8


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_very_device_or_none(device, tera):
    assert peak_flops(device) == (None if tera is None else tera * 1e12)


def test_the_line_for_people_says_how_much_of_the_device_and_of_its_peak():
    record = {"memory_used": 60 << 30, "memory_total": 80 << 30, "flops": 1e15, "mfu": 0.4123}
    assert readings_line(record) == "  mem 60.0/80.0 GiB  mfu 41.2 %"
    del record["mfu"]
    assert readings_line(record) == "  mem 60.0/80.0 GiB"


def test_on_a_cpu_memory_is_the_processs_and_there_is_no_utilisation():
    gc.collect()
    before = memory(torch.device("cpu"))[0]
    # Pages of its own: an allocator may have 64 MiB left over from other tests.
    with mmap.mmap(-1, 512 << 20) as held:
        held[:: mmap.PAGESIZE] = bytes(len(held) // mmap.PAGESIZE)
        used, total = memory(torch.device("cpu"))
        assert abs(used - before - len(held)) < 64 << 20
    assert used < total
    flops = Flops.of(Student(LlamaForCausalLM(LlamaConfig(**SIZES))), seq_len=48)
    readings = DeviceStats(flops, device=torch.device("cpu"), world=1, dtype=torch.bfloat16)
    found = readings.step(tokens=4 * 48, labels=100, seconds=2.0)
    assert found.keys() == {"memory_used", "memory_total", "flops"}
    assert found["flops"] == flops.step(tokens=4 * 48, labels=100)
