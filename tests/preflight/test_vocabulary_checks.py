"""Bad input, vocabularies and tokenizers that do not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megadistill.preflight import check_generate, check_train
from tests.models.made import tiny_llama, tiny_tokenizer
from tests.preflight.starts import a_cache, config, refused, settings


@pytest.mark.parametrize("check", [check_generate, check_train])
def test_a_vocabulary_mismatch_between_teacher_and_student(check, start_folder):
    settings("student", vocab_size=500)
    if check is check_train:
        a_cache()
    line = refused(check)
    assert line.startswith(
        "student.model: ./student has a vocabulary of 500, the tokenizer ./teacher has 512 ids"
    )


@pytest.mark.parametrize("check", [check_generate, check_train])
@pytest.mark.parametrize(("padded", "rows"), [("teacher", 640), ("student", 600)])
def test_a_model_that_is_padded_further_than_the_other_is_fine(check, padded, rows, start_folder):
    tiny_llama(padded, vocab_size=rows)
    if check is check_train:
        a_cache()
    check(config(), world=1)


@pytest.mark.parametrize("check", [check_generate, check_train])
def test_tokenizers_that_give_other_ids(check, start_folder):
    path = Path("student/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[300], list(vocabulary)[301]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer))
    if check is check_train:
        a_cache()
    line = refused(check)
    assert "student.model: the tokenizer of ./student turns text into other ids than" in line
    assert f"({a!r} is 300 in the one and 301 in the other)" in line


def test_a_student_that_is_not_there_yet_does_not_hold_up_generating(start_folder, caplog):
    shutil.rmtree("student")
    check_generate(config(), world=1)
    assert "the student is not compared with the teacher yet" in caplog.text


def test_a_teacher_that_is_gone_does_not_hold_up_training(start_folder):
    shutil.rmtree("teacher")
    a_cache()
    check_train(config(), world=1)


def test_a_tokenizer_that_does_not_match_the_model(start_folder):
    tiny_tokenizer("large", vocab_size=700)
    assert refused(check_generate, "data.tokenizer=./large", "student=null").startswith(
        "data.tokenizer: the tokenizer ./large has ids up to 699, and the teacher ./teacher a "
        "vocabulary of 512"
    )


def test_an_added_token_without_a_row_is_named_with_its_cure(start_folder):
    tokenizer = AutoTokenizer.from_pretrained("teacher")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained("teacher")
    said = refused(check_generate, "student=null")
    assert said.startswith("teacher.model: the tokenizer ./teacher has ids up to 512, and")
    assert "the added token '[PAD]' (id 512) has no row in the model: remove" in said
    assert "data.tokenizer" not in said


def test_a_sentencepiece_model_alone_is_named_with_its_cure(start_folder):
    (start_folder / "pieces").mkdir()
    (start_folder / "pieces/tokenizer.model").write_bytes(
        b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
    )
    Path("pieces/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    Path("pieces/config.json").write_text('{"model_type": "llama"}')
    said = refused(check_generate, "data.tokenizer=./pieces", "student=null")
    assert said.startswith(
        "data.tokenizer: ./pieces: found tokenizer.model and no tokenizer.json, expected a fast "
        "tokenizer: convert it once (pip install sentencepiece"
    )


def test_a_tokenizer_that_is_not_there(start_folder):
    line = refused(check_generate, "data.tokenizer=./none")
    assert line.startswith("data.tokenizer: ./none does not exist, expected a folder with")


def test_a_model_without_a_tokenizer(start_folder):
    for file in Path("teacher").glob("tokenizer*"):
        file.unlink()
    assert refused(check_generate).startswith(
        "teacher.model: ./teacher: no tokenizer can be loaded"
    )
