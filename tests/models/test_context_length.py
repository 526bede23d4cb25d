"""The longest sequence of known models, by the lengths that their authors publish."""

import pytest
from transformers import AutoConfig

from megadistill.config import StudentConfig
from megadistill.errors import ConfigError
from megadistill.models.context_length import longest_sequence
from megadistill.models.model_files import find_model
from megadistill.preflight.model_checks import check_seq_len
from megadistill.student.model import check_fits, student_settings
from tests.models.made import tiny_llama

FACTORS = {"short_factor": [1.0] * 48, "long_factor": [1.5] * 48}
KNOWN = {
    "Llama 2": ("llama", {"max_position_embeddings": 4096}, 4096),
    "GPT-2": ("gpt2", {"n_positions": 1024}, 1024),
    "Qwen2.5": ("qwen2", {"max_position_embeddings": 32768}, 32768),
    "Qwen2.5 with YaRN": (
        "qwen2",
        {
            "max_position_embeddings": 32768,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        },
        131072,
    ),
    "Qwen3 with YaRN": (
        "qwen3",
        {
            "max_position_embeddings": 40960,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "rope_type": "yarn",
            },
        },
        131072,
    ),
    "Llama 3.1": (
        "llama",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        131072,
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        163840,
    ),
    "Phi-3 mini 128k": (
        "phi3",
        {
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", **FACTORS},
        },
        131072,
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
        131072,
    ),
    "Vicuna 16k": (
        "llama",
        {"max_position_embeddings": 4096, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        16384,
    ),
    "dynamic NTK": (
        "llama",
        {"max_position_embeddings": 2048, "rope_scaling": {"factor": 2.0, "rope_type": "dynamic"}},
        4096,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_longest_sequence_counts_rope_scaling(name):
    model_type, settings, length = KNOWN[name]
    assert longest_sequence(settings) == length
    # What transformers makes of it: version 5 moves the keys and fills in defaults.
    assert longest_sequence(AutoConfig.for_model(model_type, **settings).to_dict()) == length


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": None, "rope_scaling": {"type": "yarn", "factor": 4}}, None),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "mrope", "factor": 4}}, 64),
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn"}}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                },
            },
            512,
        ),
    ],
)
def test_what_says_nothing_of_scaling_counts_for_nothing(settings, length):
    assert longest_sequence(settings) == length


def test_sequences_up_to_the_scaled_length_are_taken_and_longer_ones_refused(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    folder = tiny_llama(tmp_path / "model", max_position_embeddings=32, rope_scaling=scaling)
    files = find_model(folder, key="teacher.model")
    settings = student_settings(StudentConfig(model=folder))

    check_seq_len(128, files)
    check_fits(settings, vocab_size=512, seq_len=128)
    with pytest.raises(ConfigError, match="129 is beyond the 128 positions"):
        check_seq_len(129, files)
    with pytest.raises(ConfigError, match="129 is beyond the 128 positions of student"):
        check_fits(settings, vocab_size=512, seq_len=129)
