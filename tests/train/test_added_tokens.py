"""A student whose tokenizer has tokens that its teacher's has not, a chat's markers for example."""

import numpy as np
import pytest
import torch

from megadistill.errors import ConfigError
from megadistill.preflight import check_generate, check_train
from tests.models.made import teacher_and_text, tiny_llama
from tests.ranks import run_ranks
from tests.train.online.test_online_teacher import series, settings, train

IDS, ROWS = 514, 520  # of the student: two more than its teacher, and padding


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = teacher_and_text(tmp_path_factory.mktemp("pair"), documents=60)
    tiny_llama(folder / "student", vocab_size=ROWS, hidden_size=32, intermediate_size=48, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    assert len(tokenizer) == 512
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|reply|>"]})
    tokenizer.save_pretrained(folder / "student")
    return folder


def added_mass(folder, tokens):
    """The mean probability that a model gives to the added tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens.astype(np.int64))[None]).logits[0, :, :IDS]
    return float(logits.softmax(1)[:, 512:].sum(1).mean())


@pytest.mark.parametrize("method", [pytest.param("exact", marks=pytest.mark.long), "topk"])
def test_they_are_tokens_that_the_teacher_never_says(pair, method):
    """In the softmax, without a target: the student learns not to say them, and keeps them."""
    from transformers import AutoConfig, AutoTokenizer

    from megadistill.blocks import open_store

    config = settings(
        pair, method, targets={"method": method, "k": 8}, train={"lr": 1e-2, "steps": 25}
    )
    check_train(config, world=2)
    train(config, 2)
    folder = pair / method / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|reply|>") == IDS - 1
    tokens = open_store(pair / "tokens")[0]["tokens"]
    before, after = (added_mass(each, tokens) for each in (pair / "student", folder))
    assert after < 0.5 * before
    assert AutoConfig.from_pretrained(folder).vocab_size == IDS


def test_from_a_cache_it_is_the_same(pair):
    targets = {"method": "topk", "k": 8}
    cached = settings(pair, "cached", targets=targets, teacher={"mode": "cached"})
    check_generate(cached, world=2)
    run_ranks(2, "tests.cache.building:build", config=cached)
    check_train(cached, world=2)
    found = train(cached, 2)
    online = train(settings(pair, "online", targets=targets), 2)
    np.testing.assert_allclose(series(found, "ce_loss"), series(online, "ce_loss"), rtol=1e-3)
    np.testing.assert_allclose(series(found, "kd_loss"), series(online, "kd_loss"), atol=5e-3)


def test_tokens_that_have_no_rows_are_refused(pair):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    tokenizer.add_tokens(["quick brown"])
    tiny_llama(pair / "few", vocab_size=512)
    tokenizer.save_pretrained(pair / "few")
    few = settings(pair, "none", student={"model": str(pair / "few")})
    with pytest.raises(
        ConfigError, match=r"student.model: .* has a tokenizer of 515 ids and a vocabulary of 512"
    ):
        check_train(few, world=2)
