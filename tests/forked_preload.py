"""What the server of tests/forked.py imports before it forks."""

import os

# First: it hides a torchvision that transformers would die of.
import megadistill  # noqa: F401 isort: skip

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

# Imported last: megadistill.parallel, which all of those above import, chooses its accelerator.
import deepspeed  # noqa: F401 isort: skip

torch.set_num_threads(1)
# A lock that another thread holds at the fork is never released in the child.
assert len(os.listdir("/proc/self/task")) == 1, "importing has started threads"
