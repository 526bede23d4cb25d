"""The export keeps what the student's own folder says about generating, and what lies beside it.

What counts is what plain transformers makes of the exported folder.
"""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from megadistill.config import StudentConfig
from megadistill.train.own_files import own_files, special_ids
from tests.models.made import tiny_llama, tiny_tokenizer
from tests.ranks import run_ranks
from tests.train.stores import VOCAB, make_config

SECOND_STOP = VOCAB + 5  # among the rows that the data has no ids for
SETTINGS = {
    "eos_token_id": [0, SECOND_STOP],
    "pad_token_id": 0,
    "do_sample": False,
    "temperature": 0.6,
    "max_new_tokens": 8,
    "note": "kept as it is",
}


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def exported(config):
    assert run_ranks(1, "tests.train.runs:run", config=config) == [4]
    return config.train.out_dir + "/model"


class Say(LogitsProcessor):
    """Makes a token the only one possible from the third on."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] >= 5:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token] = 0.0
        return scores


def test_the_export_generates_until_the_second_stop_token_of_the_students_own_settings(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB + 32, hidden_size=32, intermediate_size=48)
    text = json.dumps(SETTINGS, indent=3)
    (folder / "generation_config.json").write_text(text)
    (folder / "LICENSE.txt").write_text("as it was given")
    out = exported(make_config(tmp_path))
    with open(f"{out}/generation_config.json") as file:
        assert file.read() == text
    with open(f"{out}/LICENSE.txt") as file:
        assert file.read() == "as it was given"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == SECOND_STOP + 1
    tokens = torch.arange(1, 4)[None]
    lengths = [
        model.generate(tokens, logits_processor=[Say(token)]).shape[1]
        for token in (SECOND_STOP, SECOND_STOP - 1)
    ]
    assert lengths == [3 + 3, 3 + 8]


def test_sampling_settings_in_an_old_config_json_become_generation_settings(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB, hidden_size=32, intermediate_size=48)
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", temperature=0.7, top_k=3, max_length=77)  # no do_sample
    plain = AutoModelForCausalLM.from_pretrained(folder).generation_config
    found = AutoModelForCausalLM.from_pretrained(exported(make_config(tmp_path))).generation_config
    for name in ("temperature", "top_k", "max_length", "eos_token_id"):
        assert getattr(found, name) == getattr(plain, name), name
    assert (found.temperature, found.eos_token_id) == (0.7, 0)


def test_a_student_with_code_of_its_own_is_exported_with_it(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB, hidden_size=32, intermediate_size=48)
    (folder / "configuration_halved.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        "class HalvedConfig(LlamaConfig):\n    model_type = 'halved'\n"
    )
    (folder / "modeling_halved.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_halved import HalvedConfig\n\n\n"
        "class HalvedForCausalLM(LlamaForCausalLM):\n    config_class = HalvedConfig\n"
    )
    change_json(
        folder / "config.json",
        model_type="halved",
        architectures=["HalvedForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_halved.HalvedConfig",
            "AutoModelForCausalLM": "modeling_halved.HalvedForCausalLM",
        },
    )
    out = exported(make_config(tmp_path, student={"trust_remote_code": True}))
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "HalvedForCausalLM"
    assert type(model).__module__.startswith("transformers_modules.")
    for name in ("configuration_halved.py", "modeling_halved.py"):
        with open(f"{out}/{name}") as file:
            assert file.read() == (folder / name).read_text()


def test_settings_that_transformers_calls_invalid_are_kept_and_said_in_one_line(tmp_path, caplog):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB)
    content = json.dumps(SETTINGS).encode()
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match="temperature"):
        GenerationConfig.from_dict(SETTINGS).validate(strict=True)
    with caplog.at_level(logging.WARNING):
        files = own_files(StudentConfig(model=str(folder), init="random"))
    assert files == {"generation_config.json": content}
    assert special_ids(files) == [0, SECOND_STOP, 0]
    (record,) = [r for r in caplog.records if r.name.startswith("megadistill")]
    assert "\n" not in record.getMessage()
    assert "calls them invalid: `temperature`" in record.getMessage()


@pytest.mark.parametrize("damage", [b"{", b"[1]", b"\xff", b'{"early_stopping": 3}'])
def test_settings_that_cannot_be_read_are_kept_and_said(tmp_path, caplog, damage):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB)
    (folder / "generation_config.json").write_bytes(damage)
    files = own_files(StudentConfig(model=str(folder), init="random"))
    assert files == {"generation_config.json": damage}
    assert special_ids(files) == []
    assert "calls them invalid" in caplog.text


def test_a_random_student_without_settings_gets_none_and_no_licence(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(folder, vocab_size=VOCAB)
    (folder / "generation_config.json").unlink()
    (folder / "LICENSE").write_text("of the weights")
    assert own_files(StudentConfig(model=str(folder), init="random")) == {}
    assert own_files(StudentConfig(model=str(folder))) == {"LICENSE": b"of the weights"}


def test_tokenizer_files_are_kept_with_the_tokenizer_they_belong_to(tmp_path):
    from transformers import AutoTokenizer

    for name in ("own", "other"):
        tiny_llama(tmp_path / name, vocab_size=VOCAB)
        (tmp_path / name / "generation_config.json").unlink()
        tiny_tokenizer(tmp_path / name)
        (tmp_path / name / "tokenizer.model").write_bytes(b"sentences")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    student = StudentConfig(model=str(tmp_path / "own"))
    assert own_files(student, tokenizer=tokenizer) == {"tokenizer.model": b"sentences"}
    student = StudentConfig(model=str(tmp_path / "other"))
    assert own_files(student, tokenizer=tokenizer) == {}
