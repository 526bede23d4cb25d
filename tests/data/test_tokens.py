import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from megadistill.blocks import BlockWriter, open_store
from megadistill.blocks.install import retract_block
from megadistill.blocks.maintenance.verify import verify_store
from megadistill.blocks.padding import without_padding
from megadistill.data import token_plan
from megadistill.data.counts import statistics, token_counts
from megadistill.data.packing import best_fit
from megadistill.data.tokens import build_tokens
from megadistill.errors import ConfigError, DataError, RecipeError, StoreError
from megadistill.inspect.inspection import inspect_store
from megadistill.models.packed_sequences import sample_labels
from tests.data.chats import CHAT, CHATML, stock
from tests.data.packing import slow_packing
from tests.data.stores import same_store

TEXTS = ["", *(f"def f{i}(x):\n    return x + {i}\n" * (i % 9) for i in range(120)), "end"]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return [str(path)]


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus.jsonl", TEXTS)


def state(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(folder).rglob("*.*")}


def test_the_store_holds_the_corpus_packed_in_order(config, corpus, tokenizer):
    store = build_tokens(config(files=corpus, packing="in_order"))
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    stream, starts = [], []
    for text in filter(None, TEXTS):
        starts.append(len(stream))
        stream += [*backend.encode(text, add_special_tokens=False).ids, end]
    count = len(stream) // 32
    assert len(store) == store.num_sequences == count
    assert store.complete()
    assert verify_store(store) == []
    for i, sample in enumerate(store):
        begin = 32 * i
        assert sample["tokens"].tolist() == stream[begin : begin + 32]
        inside = [s - begin for s in starts if begin < s < begin + 32]
        assert sample["documents"].tolist() == [0, *inside]
    counted = statistics(store)
    empty = sum(not t for t in TEXTS)
    assert counted["documents_read"] == len(TEXTS)
    assert counted["empty_documents"] == empty
    assert counted["dropped_tokens"] == len(stream) % 32
    in_store = [s for s in [*starts[1:], len(stream)] if s <= count * 32]
    assert counted["documents"] == len(in_store)
    assert counted["characters"] == sum(len(t) for t in list(filter(None, TEXTS))[: len(in_store)])
    edges = zip(starts, [*starts[1:], len(stream)], strict=True)
    kept = [(a, b) for a, b in edges if b <= count * 32]
    assert counted["cut_documents"] == sum(a // 32 != (b - 1) // 32 for a, b in kept)
    assert counted["dropped_documents"] == len(starts) - len(kept)
    assert token_counts(store).tolist() == np.bincount(stream[: count * 32], minlength=512).tolist()


def test_concatenated_documents_are_one_stream(config, corpus):
    isolated = build_tokens(config(files=corpus, packing="in_order"))
    concat = build_tokens(config(files=corpus, pack="concat", dir=str(isolated.path) + "2"))
    for a, b in zip(isolated, concat, strict=True):
        assert a["tokens"].tolist() == b["tokens"].tolist()
        assert b["documents"].tolist() == [0]


def test_any_number_of_processes_writes_the_same_store(config, corpus, monkeypatch, tmp_path):
    stores = [tmp_path / f"with{n}" for n in (1, 2, 4)]
    for store, workers in zip(stores, (1, 2, 4), strict=True):
        # Other batches, too: neither may be seen in the store.
        monkeypatch.setattr("megadistill.data.tokens.BATCH_CHARACTERS", 100 * workers)
        build_tokens(config(files=corpus, workers=workers, dir=str(store)))
    assert same_store(stores[0], stores[1])
    assert same_store(stores[0], stores[2])


def test_a_stream_makes_the_same_store_as_a_whole_dataset(config, tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", TEXTS)
    whole = config(name=str(tmp_path / "folder"), dir=str(tmp_path / "whole"))
    build_tokens(whole)
    stream = {"streaming": True, "max_samples": 10_000}
    build_tokens(config(name=str(tmp_path / "folder"), dir=str(tmp_path / "stream"), **stream))
    assert same_store(tmp_path / "whole", tmp_path / "stream")


def test_a_complete_store_is_left_alone(config, corpus):
    store = build_tokens(config(files=corpus))
    before = state(store.path)
    again = build_tokens(config(files=corpus))
    assert len(again) == len(store)
    assert state(store.path) == before


@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
@pytest.mark.parametrize("documents", [40, 117, 122])
def test_more_samples_make_the_store_of_a_run_with_as_many(
    config, corpus, tmp_path, monkeypatch, documents, packing
):
    monkeypatch.setattr(best_fit, "WINDOW", 9)
    keys = {"files": corpus, "packing": packing, "block_size": 4}
    fewer = build_tokens(config(**keys, max_samples=documents))
    redone = [b for b in fewer.committed() if "end" in fewer.marker(b)]
    first = state(tmp_path / "tokens" / "blocks")
    build_tokens(config(**keys))
    build_tokens(config(**keys, dir=str(tmp_path / "undisturbed")))
    assert same_store(tmp_path / "tokens", tmp_path / "undisturbed")
    kept = sorted(first)[: -len(redone)]
    assert len(kept) > 2
    assert {p: s for p, s in state(tmp_path / "tokens" / "blocks").items() if p in kept} == {
        p: first[p] for p in kept
    }
    assert len(redone) == 1 if packing == "in_order" else len(redone) <= -(-19 // 4) + 1


def test_the_store_holds_the_corpus_packed_by_best_fit(config, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(best_fit, "WINDOW", 9)
    store = build_tokens(config(files=corpus))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    documents = [
        [*hf.backend_tokenizer.encode(t, add_special_tokens=False).ids, hf.eos_token_id]
        if t
        else []
        for t in TEXTS
    ]
    rows = slow_packing.best_fit(documents, seq_len=32, bos=False, window=9)
    assert len(store) == len(rows)
    assert verify_store(store) == []
    for sample, row in zip(store, rows, strict=True):
        assert sample["tokens"].tolist() == row.tokens(32, None, hf.eos_token_id)
        assert sample["documents"].tolist() == row.documents(32)
        assert sample["padding"] == 32 - row.length()
    stored = [t for row in rows for _, _, tokens, _ in row.segments for t in tokens]
    assert token_counts(store).tolist() == np.bincount(stored, minlength=512).tolist()
    counted = statistics(store)
    assert counted["tokens"] == len(stored) == inspect_store(store.path)["num_positions"]
    assert counted["padding_tokens"] == 32 * len(rows) - len(stored) > 0
    assert counted["cut_documents"] == sum(len(d) > 32 for d in documents)
    assert counted["documents"] == sum(map(bool, documents))


@pytest.mark.parametrize("packing", ["in_order", "best_fit"])
def test_a_document_that_is_cut_continues_with_bos_where_the_tokenizer_sets_one(
    config, tmp_path, tokenizer, packing
):
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.add_special_tokens({"bos_token": "<|begin|>"})
    backend = hf.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", hf.bos_token_id)]
    )
    hf.save_pretrained(tmp_path / "with_bos")
    assert hf("x").input_ids[0] == hf.bos_token_id
    files = write(tmp_path / "a.jsonl", ["def f(x): return x\n" * 60])
    store = build_tokens(config(files=files, tokenizer=str(tmp_path / "with_bos"), packing=packing))
    assert len(store) > 2
    assert all(sample["tokens"][0] == hf.bos_token_id for sample in store)
    learned = np.concatenate([sample_labels(sample) for sample in store])
    assert hf.bos_token_id not in learned
    text = hf.decode(np.concatenate([without_padding(s) for s in store]), skip_special_tokens=True)
    whole = "def f(x): return x\n" * 60
    assert whole.startswith(text) if packing == "in_order" else whole == text


def test_a_store_without_padding_or_bos_grows_as_it_was_packed(
    config, corpus, tmp_path, monkeypatch
):
    # Stores of before had no field `packing` in their recipe: in order, without a BOS.
    monkeypatch.setattr(token_plan, "_packing", lambda data, spec: None)
    build_tokens(config(files=corpus, max_samples=60))
    build_tokens(config(files=corpus, dir=str(tmp_path / "undisturbed")))
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"packed by data.packing in_order, found best_fit"):
        build_tokens(config(files=corpus, packing="best_fit"))
    store = build_tokens(config(files=corpus))
    assert "packing" not in store.recipe
    assert same_store(store.path, tmp_path / "undisturbed")


def test_a_run_that_stops_while_a_store_grows_passes_for_no_complete_one(
    config, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(best_fit, "WINDOW", 9)
    keys = {"files": corpus, "block_size": 4}
    before = build_tokens(config(**keys, max_samples=60, dir=str(tmp_path / "before")))
    whole = build_tokens(config(**keys, dir=str(tmp_path / "undisturbed")))
    commit, retract, left = BlockWriter.commit, retract_block, [0]

    class Stopped(Exception):
        pass

    def count_down(change):
        def counted(*args, **kwargs):
            if not left[0]:
                raise Stopped
            left[0] -= 1
            return change(*args, **kwargs)

        return counted

    first = min(b for b in before.committed() if "end" in before.marker(b))
    for stop in range(len(before.committed()) - first + 6):
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        shutil.copytree(before.path, tmp_path / "tokens")
        monkeypatch.setattr(BlockWriter, "commit", count_down(commit))
        monkeypatch.setattr("megadistill.blocks.writer.retract_block", count_down(retract))
        left[0] = stop
        with pytest.raises(Stopped):
            build_tokens(config(**keys))
        monkeypatch.setattr(BlockWriter, "commit", commit)
        monkeypatch.setattr("megadistill.blocks.writer.retract_block", retract)
        # Back to as few documents: the old store again, or refused where it holds more by now.
        with contextlib.suppress(RecipeError):
            build_tokens(config(**keys, max_samples=60))
            assert same_store(tmp_path / "tokens", before.path)
        build_tokens(config(**keys))
        assert same_store(tmp_path / "tokens", whole.path)


def test_fewer_samples_than_the_store_has_are_refused(config, corpus):
    build_tokens(config(files=corpus))
    with pytest.raises(
        RecipeError, match=r"holds the tokens of 122 documents, data.max_samples is 50"
    ):
        build_tokens(config(files=corpus, max_samples=50))


@pytest.mark.parametrize("lost", [[0], [3], [2, 3, 7], "last"])
def test_a_store_with_gaps_is_closed(config, corpus, tmp_path, lost):
    store = build_tokens(config(files=corpus))
    build_tokens(config(files=corpus, dir=str(tmp_path / "undisturbed")))
    for block in [store.num_blocks - 1] if lost == "last" else lost:
        (store.path / "blocks" / f"{block:06d}.json").unlink()
    build_tokens(config(files=corpus))
    assert same_store(store.path, tmp_path / "undisturbed")


def test_a_run_killed_at_any_block_goes_on_to_the_same_store(config, corpus, tmp_path, tokenizer):
    long = write(tmp_path / "long.jsonl", [" ".join(TEXTS) * 40, *TEXTS])  # in several pieces
    shape = {"files": long, "seq_len": 64, "block_size": 200, "workers": 2}
    undisturbed = build_tokens(config(**shape, dir=str(tmp_path / "undisturbed")))
    blocks = undisturbed.num_blocks
    program = (
        "import os, signal, sys\n"
        "from megadistill.blocks import BlockWriter, open_store\n"
        "from megadistill.config import Config\n"
        "from megadistill.data.tokens import build_tokens\n"
        "commit = BlockWriter.commit\n"
        "def commit_and_die(self, block, *args, **kwargs):\n"
        "    commit(self, block, *args, **kwargs)\n"
        "    if block == int(sys.argv[2]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "BlockWriter.commit = commit_and_die\n"
        "build_tokens(Config.model_validate_json(sys.argv[1]))\n"
    )
    settings = config(**shape)
    for block in (blocks // 3, blocks - 1):
        command = [sys.executable, "-c", program, settings.model_dump_json(), str(block)]
        killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert open_store(settings.data.dir).committed() == list(range(block + 1))
    build_tokens(settings)
    assert same_store(settings.data.dir, undisturbed.path)


def test_a_killed_tokenising_process_ends_the_run_with_a_line(config, corpus, monkeypatch):
    from megadistill.data import workers

    started = []
    popen = subprocess.Popen

    def note(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", note)
    monkeypatch.setattr("megadistill.data.tokens.BATCH_CHARACTERS", 50)

    def kill_after_some(self, *args, **kwargs):
        os.kill(started[0].pid, signal.SIGKILL)
        return commit(self, *args, **kwargs)

    commit = BlockWriter.commit
    monkeypatch.setattr(BlockWriter, "commit", kill_after_some)
    with pytest.raises(DataError, match=r"ended with exit code -9: out of memory\?"):
        build_tokens(config(files=corpus))
    assert all(process.poll() is not None for process in started)


def test_chats_have_a_loss_mask(config, tokenizer, tmp_path):
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.chat_template = stock(CHATML).replace("<|im_end|>", "<|end|>")
    hf.save_pretrained(tmp_path / "chat")
    rows = "".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(20))
    (tmp_path / "chats.jsonl").write_text(rows)
    files, folder = [str(tmp_path / "chats.jsonl")], str(tmp_path / "chat")
    store = build_tokens(
        config(files=files, messages_field="messages", tokenizer=folder, packing="in_order")
    )
    ids = np.concatenate([s["tokens"] for s in store])
    mask = np.concatenate([s["loss_mask"] for s in store])
    learned = hf.decode(ids[mask == 1])
    assert learned.startswith("It is 2.<|end|>It is 4.<|end|>It is 2.")
    assert statistics(store)["learned_tokens"] == mask.sum()


def test_prompts_and_completions_have_a_loss_mask(config, tmp_path, tokenizer):
    rows = [{"q": f"What is {i}?", "a": f" It is {i}."} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = {"prompt_field": "q", "completion_field": "a", "packing": "in_order"}
    store = build_tokens(config(files=[str(tmp_path / "a.jsonl")], **keys))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    ids = np.concatenate([s["tokens"] for s in store])
    mask = np.concatenate([s["loss_mask"] for s in store])
    assert hf.decode(ids[mask == 1]).startswith(" It is 0.<|end|> It is 1.<|end|>")


@pytest.mark.parametrize(
    ("texts", "said"), [(["", "", ""], "is empty: 3 doc"), (["short"], "1 documents with 5 tokens")]
)
def test_a_corpus_of_less_than_a_sequence_is_refused_and_nothing_written(
    config, tmp_path, texts, said
):
    files = write(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=said):
        build_tokens(config(files=files, seq_len=64, packing="in_order"))
    assert not (tmp_path / "tokens").exists()


def test_a_missing_corpus_or_tokenizer_writes_nothing(config, corpus, tmp_path):
    with pytest.raises(DataError):
        build_tokens(config(files=["nowhere.jsonl"]))
    with pytest.raises(ConfigError):
        build_tokens(config(files=corpus, tokenizer=str(tmp_path)))
    assert not (tmp_path / "tokens").exists()


def test_another_recipe_is_refused_with_the_field(config, corpus, tmp_path):
    store = build_tokens(config(files=corpus))
    before = state(store.path)
    with pytest.raises(RecipeError, match=r"data.pack is 'isolate'.*'concat'"):
        build_tokens(config(files=corpus, pack="concat"))
    with pytest.raises(RecipeError, match=r"data.files is corpus.jsonl .*, this run.s is b.jsonl "):
        build_tokens(config(files=write(tmp_path / "b.jsonl", TEXTS[::-1])))
    assert state(store.path) == before


def test_a_folder_that_holds_something_else_is_left_alone(config, corpus, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError):
        build_tokens(config(files=corpus))
    assert os.listdir(tmp_path / "tokens") == ["thesis.tex"]
