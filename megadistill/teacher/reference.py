"""The teacher as transformers runs it: loaded from the same files, touched by no engine.

`teacher/verification.py` compares the engine with it. The model's weights stay mapped from the
files in host memory. On an accelerator, or in another dtype than the run's, each decoder layer is
copied when it is called and dropped afterwards. The copies take the memory of the largest layer: of
the embedding only the rows in use are copied, of the head a block of rows at a time. Weights that
transformers converts on loading (another dtype than the run's, experts that it stacks) are
converted when their layer is called (`teacher/deferred.py`), again in each of the two passes.
Together the copies and what they are made of then take up to twice the largest layer in float32:
of a Mixtral of 1.8 GB in float32 with layers of 208 MiB, 262 MiB, where the whole model took 1,601.
Adapters, and models that `load_deferred` loads whole, are held in host memory by the rank that runs
the reference, until the comparison is made.

Shape letters: T positions, C positions of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from megadistill.config import TeacherConfig
from megadistill.errors import TeacherError, first_line
from megadistill.models.pretrained import backbone
from megadistill.teacher.deferred import is_deferred, load_deferred, values

_HEAD_BYTES = 64 << 20  # of a block of the head's rows


class Reference:
    """A causal language model of transformers, and the probe's tokens.

    hidden_TH is in the run's dtype; exact_TH is the same in float32, or the same tensor where the
    run is in float32 itself.
    """

    def __init__(
        self, config: TeacherConfig, tokens_T: torch.Tensor, *, key: str, device: torch.device
    ) -> None:
        """Loads the model on the CPU and runs it over the tokens, in both dtypes.

        key: where the configuration names the model. Raises ConfigError where it cannot be loaded,
        TeacherError where it does not run.
        """
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.device, self.key = device, key
        attention = config.attention
        if "flash" in attention and device.type == "cpu":
            attention = "sdpa"  # flash attention exists on GPUs only
        section = config.model_copy(update={"attention": attention})
        self.model = load_deferred(section, key=key, dtype=self.dtype).eval()
        self._attention = self.model.config._attn_implementation
        self._output: Any = None
        self.run(tokens_T)

    def run(self, tokens_T: torch.Tensor) -> None:
        """Runs the model over other tokens, int64 [T]: hidden_TH and exact_TH are theirs."""
        self.hidden_TH = self._hidden(tokens_T, self.dtype)
        same = self.dtype == torch.float32
        self.exact_TH = self.hidden_TH if same else self._hidden(tokens_T, torch.float32)

    @torch.no_grad()
    def _hidden(self, tokens_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if "flash" in str(self._attention):  # it has no float32
            exact = dtype == torch.float32
            self.model.set_attn_implementation("sdpa" if exact else self._attention)
        try:
            with fetched(self.model, device=self.device, dtype=dtype):
                self._output = backbone(self.model)(
                    input_ids=tokens_T[None].to(self.device), use_cache=False
                )
        except torch.OutOfMemoryError:
            raise
        except (
            AttributeError,
            IndexError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise TeacherError(
                f"{self.key}: transformers cannot run {type(self.model).__name__} "
                f"({self.model.config.model_type}) in {str(dtype).removeprefix('torch.')} "
                f"({type(error).__name__}: {first_line(error)}): set another teacher.dtype, or use "
                "another model"
            ) from error
        return self._output.last_hidden_state[0]

    @torch.no_grad()
    def log_probs(self, hidden_CH: torch.Tensor, *, vocab_size: int) -> torch.Tensor:
        """float32 [C, vocab_size] on the device: through the model's own head, in their dtype."""
        core = backbone(self.model)
        output = type(self._output)(**{**self._output, "last_hidden_state": hidden_CH[None]})
        ids = torch.zeros(1, len(hidden_CH), dtype=torch.int64, device=self.device)
        with fetched(self.model, device=self.device, dtype=hidden_CH.dtype):
            core.forward = lambda *_, **__: output
            try:
                logits_CV = self.model(input_ids=ids, use_cache=False).logits[0]
            finally:
                del core.forward
        return torch.log_softmax(logits_CV[:, :vocab_size].float(), -1)


@contextlib.contextmanager
def fetched(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `model` computes on `device` in `dtype`, with a layer's copy at a time.

    Parameters and buffers that are in float32 stay in float32.
    """
    own = next(model.parameters())
    if own.device == device and own.dtype == dtype and not is_deferred(model):
        yield
        return
    hooks = []
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight = head.weight
    for module, whole in _units(model):
        fetch = _Fetched(module, whole, device=device, dtype=dtype)
        if module is head and isinstance(module, nn.Linear):
            fetch.replace_linear()
            continue
        hooks.append(module.register_forward_pre_hook(fetch.before, with_kwargs=True))
        hooks.append(module.register_forward_hook(fetch.after, always_call=True))
    try:
        yield
    finally:
        if "forward" in head.__dict__:
            del head.forward
            head.weight = weight
        for hook in hooks:
            hook.remove()


class _Fetched:
    """Puts copies in the place of a module's tensors before it is called, and takes them away."""

    def __init__(
        self, module: nn.Module, whole: bool, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.module, self.whole = module, whole
        self.device, self.dtype = device, dtype
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.padding: int | None = None

    def copy(self, tensor: torch.Tensor, rows: Any = None) -> torch.Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        if tensor.dtype == torch.float32:
            dtype = torch.float32
        return values(tensor, rows).to(self.device, dtype)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if isinstance(module, nn.Embedding) and len(args) == 1:
            # Only the rows that are looked up, under new ids.
            rows, ids = torch.unique(args[0], return_inverse=True)
            self.put(module.weight, self.copy(module.weight, rows.cpu()))
            self.padding, module.padding_idx = module.padding_idx, None
            return (ids,), kwargs
        for tensor in self.tensors():
            self.put(tensor, self.copy(tensor))
        return None

    def after(self, module: nn.Module, *_: Any) -> None:
        for tensor, data in self.kept:
            tensor.data = data
        self.kept.clear()
        if isinstance(module, nn.Embedding):
            module.padding_idx = self.padding

    def put(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        self.kept.append((tensor, tensor.data))
        tensor.data = data

    def tensors(self) -> list[torch.Tensor]:
        module, deep = self.module, self.whole
        return [*module.parameters(recurse=deep), *module.buffers(recurse=deep)]

    def replace_linear(self) -> None:
        """Has the module multiply with a block of its weight's rows on the device at a time."""
        module: Any = self.module
        weight, bias = module.weight, module.bias

        def linear(hidden: torch.Tensor) -> torch.Tensor:
            rows = max(1, _HEAD_BYTES // (4 * weight.shape[1]))
            blocks = [slice(first, first + rows) for first in range(0, len(weight), rows)]
            parts = [
                F.linear(
                    hidden,
                    self.copy(weight, block),
                    None if bias is None else self.copy(bias, block),
                )
                for block in blocks
            ]
            return torch.cat(parts, -1)

        module.forward = linear
        # Some models cast hidden states to the type of this weight (Mamba). It takes no memory.
        seen = torch.zeros((), dtype=self.copy(weight, slice(0, 0)).dtype, device=self.device)
        module.weight = nn.Parameter(seen.expand(weight.shape), requires_grad=False)


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """(module, whether its children belong to it): layers of lists, and what stands outside."""
    for name, child in model.named_children():
        del name
        if isinstance(child, nn.ModuleList):
            yield from ((layer, True) for layer in child)
        else:
            yield from _units(child)
    yield model, False


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Inside, torch computes with all cores of this process; the host's other ranks wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
