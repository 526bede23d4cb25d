"""A watch on what torch allocates: no tensor may have as many elements as a whole [N, V]."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationWatch(TorchDispatchMode):
    """Remembers the largest storage that any operation under it returned, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.shape, self.operation = 0, (), ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # The storage, not numel: an expanded view of one element holds one element.
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.largest:
                    self.largest, self.shape = elements, tuple(tensor.shape)
                    self.operation = str(func)
        return result
