import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megadistill.blocks import BlockStore
from megadistill.data.tokens import build_tokens, statistics, token_counts
from megadistill.errors import ConfigError, DataError, RecipeError, StoreError
from tests.data.chats import CHAT, CHATML, stock
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


def test_the_store_holds_the_corpus_packed(config, corpus, tokenizer):
    store = build_tokens(config(files=corpus))
    end = AutoTokenizer.from_pretrained(tokenizer).eos_token_id
    backend = AutoTokenizer.from_pretrained(tokenizer).backend_tokenizer
    stream, starts = [], []
    for text in filter(None, TEXTS):
        starts.append(len(stream))
        stream += [*backend.encode(text, add_special_tokens=False).ids, end]
    count = len(stream) // 32
    assert len(store) == store.num_sequences == count
    assert store.complete()
    assert store.verify() == []
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
    assert counted["cut_documents"] == sum(
        32 * i not in [*starts, len(stream)] for i in range(1, count + 1)
    )
    assert token_counts(store).tolist() == np.bincount(stream[: count * 32], minlength=512).tolist()


def test_concatenated_documents_are_one_stream(config, corpus):
    isolated = build_tokens(config(files=corpus))
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


@pytest.mark.parametrize("documents", [40, 117, 122])
def test_more_samples_make_the_store_of_a_run_with_as_many(config, corpus, tmp_path, documents):
    build_tokens(config(files=corpus, max_samples=documents))
    first = state(tmp_path / "tokens" / "blocks")
    build_tokens(config(files=corpus))
    build_tokens(config(files=corpus, dir=str(tmp_path / "undisturbed")))
    assert same_store(tmp_path / "tokens", tmp_path / "undisturbed")
    kept = sorted(first)[:-1]
    assert {p: s for p, s in state(tmp_path / "tokens" / "blocks").items() if p in kept} == {
        p: first[p] for p in kept
    }


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
        "from megadistill.blocks import BlockStore\n"
        "from megadistill.config import Config\n"
        "from megadistill.data.tokens import build_tokens\n"
        "commit = BlockStore.commit\n"
        "def commit_and_die(self, block, *args, **kwargs):\n"
        "    commit(self, block, *args, **kwargs)\n"
        "    if block == int(sys.argv[2]):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "BlockStore.commit = commit_and_die\n"
        "build_tokens(Config.model_validate_json(sys.argv[1]))\n"
    )
    settings = config(**shape)
    for block in (blocks // 3, blocks - 1):
        command = [sys.executable, "-c", program, settings.model_dump_json(), str(block)]
        killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert BlockStore.open(settings.data.dir).committed() == list(range(block + 1))
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

    commit = BlockStore.commit
    monkeypatch.setattr(BlockStore, "commit", kill_after_some)
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
    store = build_tokens(config(files=files, messages_field="messages", tokenizer=folder))
    tokens = np.concatenate([s["tokens"] for s in store])
    mask = np.concatenate([s["loss_mask"] for s in store])
    learned = hf.decode(tokens[mask == 1])
    assert learned.startswith("It is 2.<|end|>It is 4.<|end|>It is 2.")
    assert statistics(store)["learned_tokens"] == mask.sum()


def test_prompts_and_completions_have_a_loss_mask(config, tmp_path, tokenizer):
    rows = [{"q": f"What is {i}?", "a": f" It is {i}."} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    keys = {"prompt_field": "q", "completion_field": "a"}
    store = build_tokens(config(files=[str(tmp_path / "a.jsonl")], **keys))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    tokens = np.concatenate([s["tokens"] for s in store])
    mask = np.concatenate([s["loss_mask"] for s in store])
    assert hf.decode(tokens[mask == 1]).startswith(" It is 0.<|end|> It is 1.<|end|>")


@pytest.mark.parametrize(
    ("texts", "said"), [(["", "", ""], "is empty: 3 doc"), (["short"], "1 documents with 5 tokens")]
)
def test_a_corpus_of_less_than_a_sequence_is_refused_and_nothing_written(
    config, tmp_path, texts, said
):
    files = write(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match=said):
        build_tokens(config(files=files, seq_len=64))
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
    with pytest.raises(RecipeError, match=r"recipe.pack is 'isolate'.*'concat'"):
        build_tokens(config(files=corpus, pack="concat"))
    with pytest.raises(RecipeError, match=r"source.content"):
        build_tokens(config(files=write(tmp_path / "b.jsonl", TEXTS[::-1])))
    assert state(store.path) == before


def test_a_folder_that_holds_something_else_is_left_alone(config, corpus, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError):
        build_tokens(config(files=corpus))
    assert os.listdir(tmp_path / "tokens") == ["thesis.tex"]
