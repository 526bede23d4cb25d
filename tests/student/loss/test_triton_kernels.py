"""The Triton kernels, without a GPU: what they compute in Triton's interpreter, that they compile.

On a GPU `kernels_agree` compares them with torch at their first use.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from megadistill.student.loss import softmax

PROGRAM = """
import torch
from megadistill.student.loss import softmax, triton_kernels as kernels
from megadistill.student.head import distillation_terms
from tests.student.loss.reference import random_targets

kernels.LARGEST_BLOCK = {block}
assert softmax.kernels_agree(torch.device("cpu"))
z_CV = torch.randn(7, 1001)
z_CV[3, 5], z_CV[4, 9] = torch.nan, torch.inf
top_C, total_C = kernels.norms(z_CV[:, :1000])
assert total_C.isnan().tolist() == [False] * 3 + [True] * 2 + [False] * 2

torch.manual_seed(0)
counts = torch.tensor([3, 0, 5, 1, 8, 2, 4, 4]).numpy()
hidden_NH, weight_VH = torch.randn(8, 16), torch.randn(77, 16)
labels_N = torch.randint(70, (8,))
for method, temperature in (("varopt", 1.0), ("topk", 1.0), ("topk", 2.0), (None, 1.0)):
    targets = None
    if method:
        targets = random_targets(counts, 70, method=method, seed=1, temperature=temperature)
    found = []
    for by_kernels in (False, True):
        softmax._by_kernels = lambda z_CV, answer=by_kernels: answer
        leaves = [t.clone().requires_grad_() for t in (hidden_NH, weight_VH)]
        terms = distillation_terms(
            *leaves, targets, labels_N, ce_weight=0.5, z_loss=0.1, label_smoothing=0.1,
            temperature=temperature, softcap=5.0, vocab_size=70, chunk_size=3,
        )
        terms.loss.backward()
        found.append((terms.loss, *(t.grad for t in leaves)))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
print("agrees")
"""


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megadistill.student.loss import triton_kernels as kernels

for kernel, third in ((kernels._norms, "total_ptr"), (kernels._exponentials, "factor_ptr")):
    names = {"z_ptr": "*fp32", "top_ptr": "*fp32", third: "*fp32", "stride": "i64", "vocab": "i32"}
    source = ASTSource(kernel, names | {"BLOCK": "constexpr"}, {"BLOCK": kernels.LARGEST_BLOCK})
    for capability in (80, 90):
        found = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16})
        assert ".local" not in found.asm["ptx"], "registers spill"
        assert found.asm["cubin"]
print("compiles")
"""
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton comes with CUDA builds of torch"
)


def said(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.stdout or done.stderr


@needs_triton
@pytest.mark.parametrize("block", [64, 16_384])
def test_the_kernels_do_what_torch_does(block):
    assert said(PROGRAM.format(block=block), TRITON_INTERPRET="1") == "agrees\n"


@needs_triton
def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    assert said(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiles\n"


def test_without_triton_or_where_it_fails_torch_serves(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "megadistill.student.loss.triton_kernels", None)
    softmax.kernels_agree.cache_clear()
    assert not softmax.kernels_agree(torch.device("cpu"))
    assert not caplog.records

    class Broken:
        def norms(self, z_CV):
            raise RuntimeError("no such instruction\nat line 7")

    monkeypatch.setitem(sys.modules, "megadistill.student.loss.triton_kernels", Broken())
    monkeypatch.setattr("megadistill.student.loss.triton_kernels", Broken(), raising=False)
    softmax.kernels_agree.cache_clear()
    assert not softmax.kernels_agree(torch.device("cpu"))
    softmax.kernels_agree.cache_clear()
    assert "not used on cpu (RuntimeError: no such instruction): torch's" in caplog.text
