"""A real model by position: 4,096 tokens of text in bfloat16, under every engine.

The truth is plain transformers: in float32, in bfloat16, and in bfloat16 with logits in float32.
In bfloat16 it rounds the logits themselves, to 1/16 where they are 16. This moves a real model by
some 4e-4 nats, more than all of its layers' rounding in another order. The teacher's head does not
round them. So each engine's hidden states are compared twice: through plain transformers' own head,
which rounds, and through the teacher's head, with the truth whose head does not round, either.

Shape letters: T positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ranks import run_ranks
from tests.real.smollm2 import smollm2
from tests.real.test_smollm2 import documents

pytestmark = pytest.mark.long

log = logging.getLogger(__name__)
TRUTHS = ("float32", "bfloat16", "float32 logits")
ROUNDED = "bfloat16, logits rounded"
SEQUENCES, SEQ_LEN, CHUNK, QUARTERS = 2, 4096, 256, 4
FAR = "tests.real.test_positions:distances"


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> Path:
    """tokens.npy, and the log-probabilities of each truth."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, folder = smollm2(), tmp_path_factory.mktemp("truth")
    ids = AutoTokenizer.from_pretrained(model)("\n\n".join(documents())).input_ids
    tokens = np.array(ids[: SEQUENCES * SEQ_LEN]).reshape(SEQUENCES, SEQ_LEN)
    np.save(folder / "tokens.npy", tokens)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    for dtype in ("float32", "bfloat16"):
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        write(folder / f"{dtype}.npy", plain, tokens)
        if dtype == "bfloat16":
            torch.save(plain.lm_head.weight.detach().clone(), folder / "head.pt")
            plain.lm_head = copy.deepcopy(plain.lm_head).float()
            write(folder / "float32 logits.npy", plain, tokens)
    torch.set_num_threads(threads)
    return folder


@torch.no_grad()
def write(path: Path, model, tokens_BT: np.ndarray) -> None:
    """Log-probabilities [B, T, V], a chunk of positions at a time."""
    shape = (*tokens_BT.shape, model.config.vocab_size)
    file = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for number, tokens_T in enumerate(torch.from_numpy(tokens_BT)):
        hidden_TH = model.model(tokens_T[None]).last_hidden_state[0]
        for first in range(0, SEQ_LEN, CHUNK):
            rows = slice(first, first + CHUNK)
            logits_CV = model.lm_head(hidden_TH[rows].to(model.lm_head.weight.dtype)).float()
            file[number, rows] = torch.log_softmax(logits_CV, -1).numpy()
    file.flush()


def kl(true_CV: torch.Tensor, found_CV: torch.Tensor) -> torch.Tensor:
    """float64 [C]; each term is positive, so that slices of the vocabulary add up."""
    difference_CV = found_CV.double() - true_CV.double()
    return (true_CV.double().exp() * (difference_CV.expm1() - difference_CV)).sum(1)


def by_quarter(kl_BT: torch.Tensor) -> np.ndarray:
    return np.array([float(quarter.mean()) for quarter in kl_BT.tensor_split(QUARTERS, dim=1)])


def distances(mesh, folder: str, engine: str) -> dict[str, torch.Tensor]:
    """KL from each truth, [B, T], over this rank's slice of the vocabulary.

    At tp = 1 also KL(plain bfloat16 || plain's own head on this engine's hidden states).
    """
    from megadistill.config import Config
    from megadistill.teacher.engine import load_teacher

    teacher = {"model": str(smollm2()), "tp": mesh.tp, "engine": engine, "dtype": "bfloat16"}
    data = {"source": "python-stdlib", "seq_len": SEQ_LEN, "pack": "concat"}
    config = Config.model_validate({"data": data, "teacher": teacher})
    loaded = load_teacher(config, mesh, vocab_size=49_152)
    head = loaded.head
    plain_head_VH = torch.load(f"{folder}/head.pt")
    names = TRUTHS if mesh.tp > 1 else (*TRUTHS, ROUNDED)
    found = {name: torch.zeros(SEQUENCES, SEQ_LEN) for name in names}
    for number, tokens_T in enumerate(np.load(f"{folder}/tokens.npy")):
        hidden_TH = loaded.hidden(tokens_T[None], [np.zeros(1, np.int64)])
        for first in range(0, SEQ_LEN, head.chunk):
            rows = slice(first, first + head.chunk)
            own_CV = head.log_probs(hidden_TH[rows])
            columns = slice(head.vocabulary.first, head.vocabulary.first + own_CV.shape[1])
            for name, kl_BT in found.items():
                truth, found_CV = name, own_CV
                if name == ROUNDED:
                    truth = "bfloat16"
                    found_CV = (hidden_TH[rows] @ plain_head_VH.T).float().log_softmax(-1)
                true = np.load(f"{folder}/{truth}.npy", mmap_mode="r")[number, rows, columns]
                kl_BT[number, rows] = kl(torch.tensor(true), found_CV).float()
    return found


def rounding(folder: Path, truth: str) -> np.ndarray:
    """By quarter, KL(float32 || plain transformers in bfloat16)."""
    exact, plain = (np.load(folder / f"{d}.npy", mmap_mode="r") for d in ("float32", truth))
    kl_BT = torch.stack(
        [
            torch.cat(
                [
                    kl(torch.tensor(exact[b, i : i + CHUNK]), torch.tensor(plain[b, i : i + CHUNK]))
                    for i in range(0, SEQ_LEN, CHUNK)
                ]
            )
            for b in range(SEQUENCES)
        ]
    )
    return by_quarter(kl_BT)


@pytest.mark.parametrize(("ranks", "engine"), [(1, "tensor_parallel"), (2, "zero3")])
def test_every_quarter_is_that_of_plain_transformers(truth, ranks, engine):
    for found in run_ranks(ranks, FAR, folder=str(truth), engine=engine):
        for name, kl_BT in found.items():
            log.info("%s: KL(%s || engine) by quarter %s", engine, name, by_quarter(kl_BT))
        assert (by_quarter(found[ROUNDED]) <= 1e-4).all()
        assert (by_quarter(found["float32 logits"]) <= 1e-4).all()
        assert (by_quarter(found["float32"]) <= rounding(truth, "bfloat16")).all()


def test_sharded_every_quarter_is_as_exact_as_plain_transformers(truth):
    halves = run_ranks(2, FAR, tp=2, folder=str(truth), engine="tensor_parallel")
    sharded = by_quarter(halves[0]["float32"] + halves[1]["float32"])
    log.info("tp=2: KL(float32 || engine) by quarter %s", sharded)
    for name in ("bfloat16", "float32 logits"):
        plain = rounding(truth, name)
        log.info("KL(float32 || plain %s) by quarter %s", name, plain)
        assert (sharded <= 1.25 * plain).all()
