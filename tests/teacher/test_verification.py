"""The comparison with plain transformers at start stops engines that change the model."""

from __future__ import annotations

import copy
import itertools
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from megadistill.config import Config, TeacherConfig
from megadistill.errors import TeacherError
from megadistill.models.probe_tokens import Probe
from megadistill.teacher.deferred import values
from megadistill.teacher.reference import Reference
from tests.models.architectures import save_architecture
from tests.models.made import tiny_llama
from tests.ranks import run_ranks
from tests.teacher import faults

VOCAB, SEQ_LEN = 512, 192


def settings(model: str, *, engine: str, tp: int, dtype: str, seq_len: int = SEQ_LEN) -> Config:
    teacher = {"model": model, "engine": engine, "tp": tp, "dtype": dtype}
    data = {"source": "python-stdlib", "seq_len": seq_len}
    return Config.model_validate({"data": data, "teacher": teacher})


def verdict(mesh, model: str, fault: str | None, **options) -> str:
    """What the start says of a teacher in which a fault has been planted behind the engine."""
    from megadistill.teacher import engine as teacher_engine

    verify = teacher_engine._verify

    def planted(teacher, *arguments):
        if fault is not None:
            getattr(faults, fault)(teacher.engine.module)
        verify(teacher, *arguments)

    teacher_engine._verify = planted
    try:
        config = settings(model, tp=mesh.tp, **options)
        teacher_engine.load_teacher(config, mesh, vocab_size=VOCAB)
    except TeacherError as error:
        return str(error)
    finally:
        teacher_engine._verify = verify
    return ""


VERDICT = "tests.teacher.test_verification:verdict"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return tiny_llama(
        tmp_path_factory.mktemp("llama"),
        max_position_embeddings=1024,
        num_hidden_layers=3,
        attention_bias=True,
        num_key_value_heads=4,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "tp", "engine"),
    [(1, 1, "tensor_parallel"), (2, 2, "tensor_parallel"), (2, 1, "zero3")],
)
def test_a_sound_engine_passes_and_a_leak_does_not(llama, ranks, tp, engine, dtype):
    options = {"model": llama, "engine": engine, "dtype": dtype, "tp": tp}
    assert run_ranks(ranks, VERDICT, fault=None, **options) == [""] * ranks
    for said in run_ranks(ranks, VERDICT, fault="leak_late", **options):
        assert "(several documents in a sequence), quarter 4 of the positions" in said
        assert "set data.pack=concat" in said


def test_a_head_that_asks_for_its_weights_dtype_is_compared_in_float32(tmp_path):
    """Mamba casts hidden states to it, as the last step before the head."""
    model = save_architecture(tmp_path, "mamba", vocab_size=VOCAB)
    options = {"model": model, "engine": "tensor_parallel", "dtype": "bfloat16", "fault": None}
    assert run_ranks(1, VERDICT, **options) == [""]


@pytest.mark.skipif(version("transformers").startswith("4."), reason="it fails in float32 there")
def test_a_model_that_transformers_cannot_run_is_refused_by_name(tmp_path):
    model = save_architecture(tmp_path, "xlstm", vocab_size=VOCAB)
    options = {"model": model, "engine": "tensor_parallel", "dtype": "bfloat16", "fault": None}
    [said] = run_ranks(1, VERDICT, **options)
    assert said.startswith(
        "teacher.model: transformers cannot run xLSTMForCausalLM (xlstm) in bfloat16 (RuntimeError:"
    )
    assert said.endswith("): set another teacher.dtype, or use another model")


@pytest.mark.parametrize("fault", ["another_rope_base", "layer_twice", "position_off_by_one_late"])
def test_a_changed_model_is_refused_with_quarter_and_distance(llama, fault):
    [said] = run_ranks(
        1, VERDICT, model=llama, engine="tensor_parallel", dtype="bfloat16", fault=fault
    )
    quarter = "quarter 4" if "late" in fault else "quarter 1"
    assert said.startswith(
        "teacher.model: LlamaForCausalLM (llama) under DeepSpeed says something else than in "
        f"transformers: on {4 * SEQ_LEN} random tokens (one document), {quarter} of the "
        "positions, KL "
    )


@pytest.mark.parametrize("seq_len", [1, 2, 3, 4, 7, 8, 64, 100, 4096])
def test_the_second_sequence_holds_prefixes_down_to_one_token_late(seq_len):
    probe = Probe.of(seq_len=seq_len, vocab_size=VOCAB)
    assert len(probe.tokens_T) == len(probe.positions_T) == len(probe.packed_T) == seq_len
    starts = [*probe.starts, seq_len]
    assert starts[0] == 0
    for first, last in itertools.pairwise(starts):
        assert first < last
        np.testing.assert_array_equal(probe.packed_T[first:last], probe.tokens_T[: last - first])
    if seq_len >= 8:
        assert sum(start >= seq_len * 3 // 4 for start in starts[:-1]) >= 2


@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_is_plain_transformers_in_both_dtypes(tmp_path, tied):
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(Path(tmp_path) / "m", tie_word_embeddings=tied, vocab_size=VOCAB)
    tokens = torch.from_numpy(Probe.of(seq_len=64, vocab_size=VOCAB).tokens_T)
    section = TeacherConfig(model=folder, dtype="bfloat16")
    reference = Reference(section, tokens, key="teacher.model", device=torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in plain.state_dict().items()}
    exact = copy.deepcopy(plain).float()
    for hidden, model in ((reference.hidden_TH, plain), (reference.exact_TH, exact)):
        with torch.no_grad():
            expected = torch.log_softmax(model(tokens[None]).logits[0].float(), -1)
        found = reference.log_probs(hidden, vocab_size=VOCAB)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for name, value in before.items():
        assert torch.equal(values(reference.model.get_parameter(name)), value)
