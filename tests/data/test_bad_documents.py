import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megadistill.data.counts import statistics
from megadistill.data.encode import Encoder, Unit
from megadistill.data.skipped import Skipped
from megadistill.data.tokenizer import encoder_spec
from megadistill.data.tokens import build_tokens
from megadistill.errors import BadDocumentError
from tests.data.stores import same_store

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(120)]
BAD = {3: 42, 50: ["a list"], 100: {"a": "dictionary"}}


def write(path, values):
    path.write_text("".join(json.dumps({"text": v}) + "\n" for v in values))
    return [str(path)]


@pytest.fixture
def good(tmp_path):
    return write(tmp_path / "good.jsonl", [t for i, t in enumerate(TEXTS) if i not in BAD])


@pytest.fixture
def mixed(tmp_path):
    return write(tmp_path / "mixed.jsonl", [BAD.get(i, t) for i, t in enumerate(TEXTS)])


def tokens(store):
    return [sample["tokens"].tolist() for sample in store]


def listed(folder):
    lines = Path(f"{folder}.run", "skipped.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_first_value_that_is_no_text_ends_the_run_with_its_place(config, mixed, tmp_path):
    with pytest.raises(
        BadDocumentError, match=r"mixed.jsonl: line 4: column 'text': .*=skip"
    ) as error:
        build_tokens(config(files=mixed))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tokens").exists()


def test_bad_documents_are_left_out_counted_and_listed(config, mixed, good, tmp_path):
    store = build_tokens(config(files=mixed, on_bad_document="skip"))
    clean = build_tokens(config(files=good, dir=str(tmp_path / "clean")))
    assert tokens(store) == tokens(clean)
    assert statistics(store)["skipped_documents"] == len(BAD)
    assert "skipped_documents" not in statistics(clean)
    assert [entry["document"] for entry in listed(store.path)] == list(BAD)


def test_a_corpus_without_bad_documents_gives_the_same_store_either_way(config, good, tmp_path):
    build_tokens(config(files=good))
    build_tokens(config(files=good, on_bad_document="skip", dir=str(tmp_path / "skip")))
    assert same_store(tmp_path / "tokens", tmp_path / "skip")
    assert not (tmp_path / "skip.run" / "skipped.jsonl").exists()


def test_a_run_that_stopped_at_a_bad_document_continues_with_skip(config, mixed, tmp_path):
    Path(mixed[0]).write_text(Path(mixed[0]).read_text().replace(": 42}", ': "was 42"}'))
    small = {"files": mixed, "seq_len": 16, "block_size": 16, "workers": 1}
    with pytest.raises(BadDocumentError):
        build_tokens(config(**small))
    build_tokens(config(**small, on_bad_document="skip"))
    build_tokens(config(**small, on_bad_document="skip", dir=str(tmp_path / "undisturbed")))
    assert same_store(tmp_path / "tokens", tmp_path / "undisturbed")
    assert listed(tmp_path / "tokens") == listed(tmp_path / "undisturbed")


def test_a_document_that_two_runs_skip_is_listed_once_and_half_a_line_is_dropped(tmp_path):
    for document in ([1, 2], [2, 3]):
        skipped = Skipped(str(tmp_path / "tokens"))
        for number in document:
            skipped.add(Unit(number, place=f"row {number}", problem="no text"))
        skipped.write()
        with skipped.path.open("a") as file:
            file.write('{"document": 9')
    Skipped(str(tmp_path / "tokens"))._open()
    assert [entry["document"] for entry in listed(tmp_path / "tokens")] == [1, 2, 3]


def test_units_that_the_encoder_refuses_are_found_one_by_one(tokenizer):
    class Picky(Encoder):
        def encode(self, units):
            if any(unit.text == "bad" and unit.problem is None for unit in units):
                raise BadDocumentError("it is bad")
            return super().encode(units)

    encoder = Picky(encoder_spec(AutoTokenizer.from_pretrained(tokenizer)))
    units = [Unit(i, text=t) for i, t in enumerate(["a", "bad", "b", "bad"])]
    problems, (ids, lengths, mask) = encoder.answer(units)
    assert problems == {1: "it is bad", 3: "it is bad"}
    assert (lengths > 0).tolist() == [True, False, True, False]
    assert len(ids) == lengths.sum()
    assert mask is None
