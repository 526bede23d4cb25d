"""Faults planted behind every engine are stopped at start where they move the model enough.

A fault counts where it moves plain transformers, in some quarter of the positions, by at least
three times the KL between the plain model in float32 and in bfloat16. Those that count are stopped
under tensor_parallel at tp 1 and 2 and under zero3, in float32 and in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from megadistill.models.probe_tokens import Probe
from tests.ranks import run_ranks
from tests.teacher import faults

pytestmark = [pytest.mark.long, pytest.mark.models]

VOCAB, SEQ_LEN = 512, 1024
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "head_dim": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}


@dataclass(frozen=True)
class Case:
    """A model, and faults for it.

    packed: faults that show only where documents share a sequence. tp: where it can be sharded.
    apart: the model carries a state, and its documents are run one after another.
    """

    model_type: str
    faults: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    attention: str = "sdpa"
    packed: tuple[str, ...] = ()
    tp: tuple[int, ...] = (1, 2)
    apart: bool = False


CASES = {
    "llama": Case(
        "llama",
        (
            "another_rope_base",
            "rounded_tables",
            "scale_left_out",
            "bias_lost",
            "layer_twice",
            "norm_left_out",
            "scale_slightly_off",
            "shard_missing",
            "shard_doubled",
            "position_off_by_one_late",
        ),
        {"attention_bias": True},
        packed=("leak_late", "leak_in_one_layer"),
    ),
    "llama3 rope": Case("llama", ("no_rope_scaling", "rounded_tables"), {"rope_scaling": LLAMA3}),
    "yarn": Case("llama", ("no_rope_scaling", "rounded_tables"), {"rope_scaling": YARN}),
    "gemma2": Case(
        "gemma2",
        ("window_off_by_one", "no_window", "no_attention_cap"),
        {"sliding_window": 48, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 16},
        attention="eager",
    ),
    "mixtral": Case(
        "mixtral",
        ("expert_missing", "expert_doubled"),
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "falcon_h1": Case(
        "falcon_h1",
        (),
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 32,
        },
        packed=("state_left_over",),
        tp=(1,),
        apart=True,
    ),
}


def save(folder: Path, case: Case) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(case.model_type, **SIZES, **case.settings)
    model = AutoModelForCausalLM.from_config(settings)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they begin at zero
            parameter.data = torch.randn_like(parameter) * 0.5
    model.save_pretrained(folder)
    return str(folder)


def plain(folder: str, case: Case, dtype: torch.dtype, *, fault: str | None = None, packed=False):
    """float64 [T, V]: log-probabilities of plain transformers, with or without a fault."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=case.attention
    ).eval()
    probe = Probe.of(seq_len=SEQ_LEN, vocab_size=VOCAB)
    tokens = torch.from_numpy(probe.packed_T if packed else probe.tokens_T)[None]
    positions = torch.from_numpy(probe.positions_T)[None] if packed else None
    if fault is not None:
        getattr(faults, fault)(model.model)
    if positions is None:
        positions = torch.arange(SEQ_LEN)[None]
    with torch.no_grad():
        if packed and case.apart:
            parts = tokens.tensor_split(probe.starts[1:].tolist(), dim=1)
            logits = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
        else:
            output = model(tokens, position_ids=positions, attention_mask=None, use_cache=False)
            logits = output.logits
    return torch.log_softmax(logits[0].double(), -1)


def quarters(own_TV: torch.Tensor, other_TV: torch.Tensor) -> torch.Tensor:
    kl_T = (own_TV.exp() * (own_TV - other_TV)).sum(1)
    return torch.stack([q.mean() for q in kl_T.tensor_split(4)])


def verdicts(mesh, folder: str, engine: str, dtype: str, attention: str, names: list[str | None]):
    """What the start says, for each fault by name (None: no fault)."""
    import deepspeed

    from megadistill.config import Config
    from megadistill.errors import TeacherError
    from megadistill.teacher import engine as teacher_engine

    verify, said = teacher_engine._verify, {}
    teacher = {
        "model": folder,
        "engine": engine,
        "tp": mesh.tp,
        "dtype": dtype,
        "attention": attention,
    }
    data = {"source": "python-stdlib", "seq_len": SEQ_LEN}
    config = Config.model_validate({"data": data, "teacher": teacher})
    for fault in names:

        def planted(teacher, *arguments, fault=fault):
            module = teacher.engine.module
            held = list(module.parameters()) if engine == "zero3" else []
            with deepspeed.zero.GatheredParameters(held, modifier_rank=0, enabled=bool(held)):
                if fault is not None:
                    getattr(faults, fault)(module)
            verify(teacher, *arguments)

        teacher_engine._verify = planted
        try:
            teacher_engine.load_teacher(config, mesh, vocab_size=VOCAB)
            said[fault] = ""
        except TeacherError as error:
            said[fault] = str(error)
        finally:
            teacher_engine._verify = verify
    return said


@pytest.fixture(scope="module", params=CASES)
def planted(request, tmp_path_factory):
    """A case, its folder, and by how much each fault moves plain transformers, in roundings."""
    case = CASES[request.param]
    folder = save(tmp_path_factory.mktemp("model"), case)
    moved = {}
    for packed, names in ((False, case.faults), (True, case.packed)):
        if not names:
            continue
        exact = plain(folder, case, torch.float32, packed=packed)
        rounding = quarters(exact, plain(folder, case, torch.bfloat16, packed=packed))
        for name in names:
            faulty = plain(folder, case, torch.float32, fault=name, packed=packed)
            moved[name] = float((quarters(exact, faulty) / rounding).max())
    return case, folder, moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [(1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3")],
    ids=["tp1", "tp2", "zero3"],
)
def test_what_counts_is_stopped_and_nothing_else_is(planted, ranks, tp, engine, dtype, capsys):
    case, folder, moved = planted
    if tp not in case.tp:
        pytest.skip(f"tp={tp} is refused by name")
    results = run_ranks(
        ranks,
        "tests.teacher.test_planted_faults:verdicts",
        tp=tp,
        folder=folder,
        engine=engine,
        dtype=dtype,
        attention=case.attention,
        names=[None, *moved],
    )
    lines, missed = [], []
    for result in results:
        assert result[None] == ""
        for name, roundings in moved.items():
            lines.append(f"{name} moves by {roundings:.3g} roundings: {result[name][-0:90]!r}")
            if roundings >= 3 and not result[name]:
                missed.append(name)
    with capsys.disabled():
        print("\n" + "\n".join(lines[: len(moved)]))  # noqa: T201
    assert not missed
