"""Held-out text: what `eval` names is read as `data` would be."""

from megadistill.config import load_config
from megadistill.config.held_out import held_out


def test_a_held_out_dataset_is_the_one_that_eval_names():
    settings = [
        "eval.name=owner/text",
        "eval.config=en",
        "eval.split=test",
        "eval.revision=abc123",
        "eval.max_samples=7",
    ]
    config = load_config("zero3.yaml", settings)
    data = held_out(config).data
    assert (data.name, data.config, data.split) == ("owner/text", "en", "test")
    assert (data.revision, data.max_samples) == ("abc123", 7)
    assert data.seq_len == config.data.seq_len
    assert config.data.revision != "abc123"
