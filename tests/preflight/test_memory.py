"""Activations of the plan: those of "Reducing Activation Recomputation" (arXiv 2205.05198)."""

import pytest

from megadistill.config import load_config
from megadistill.models.model_files import find_model
from megadistill.preflight.plan.memory import student_memory
from tests.models.made import tiny_llama

LAYERS, HIDDEN, WORLD = 3, 64, 2


@pytest.mark.parametrize(
    ("bf16", "checkpointing", "bytes_per_token_and_unit"),
    [
        # 34 bytes a layer in 16 bits, without the attention matrix; twice that in 32.
        (True, False, 34 * LAYERS),
        (False, False, 2 * 34 * LAYERS),
        # Each layer's input, and one layer's activations.
        (True, True, 2 * LAYERS + 34),
        (False, True, 2 * (2 * LAYERS + 34)),
    ],
)
def test_activations_are_34_bytes_a_token_layer_and_hidden_unit(
    tmp_path, bf16, checkpointing, bytes_per_token_and_unit
):
    model = tiny_llama(tmp_path / "model", num_hidden_layers=LAYERS, hidden_size=HIDDEN)
    files = find_model(model, key="student.model")
    found = []
    for micro_batch in (1, 2):
        settings = [
            f"train.micro_batch={micro_batch}",
            "data.seq_len=128",
            f"train.activation_checkpointing={str(checkpointing).lower()}",
            f"deepspeed.bf16.enabled={str(bf16).lower()}",
        ]
        found.append(student_memory(load_config("demo.yaml", settings), files, WORLD))
    assert found[1] - found[0] == 128 * HIDDEN * bytes_per_token_and_unit
