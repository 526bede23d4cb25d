"""Memory in use: what is not free of a device, the resident memory of a process on a CPU."""

import numpy as np
import pytest
import torch

from megadistill.train.reporting.device_stats import memory, readings_line

GIB = 2**30


def test_used_memory_of_a_gpu_is_all_that_is_not_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 10 * GIB))
    used, total = memory(torch.device("cuda", 0))
    assert (used, total) == (7 * GIB, 10 * GIB)
    line = readings_line({"memory_used": used, "memory_total": total})
    assert line == "  mem 7.0/10.0 GiB"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_used_memory_of_a_gpu_grows_with_a_tensor():
    device = torch.device("cuda", 0)
    before, total = memory(device)
    tensor = torch.zeros(GIB // 4, device=device)
    after, _ = memory(device)
    assert after - before >= tensor.nbytes
    assert after <= total


def test_used_memory_of_a_cpu_is_the_process_resident_memory():
    before, total = memory(torch.device("cpu"))
    kept = np.ones(64 << 17)  # 64 MiB, written to
    after, _ = memory(torch.device("cpu"))
    assert 0.9 * kept.nbytes <= after - before <= 2 * kept.nbytes
    assert after < total
