"""The names that `import megadistill` gives: to dir, help, signatures and type checkers."""

from __future__ import annotations

import ast
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import megadistill
from megadistill.api.fused_loss import LossOptions, fused_linear_distillation
from megadistill.student.head import distillation_terms

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "streaming", "transformers", "numpy")


def test_every_name_is_loaded_listed_and_seen_by_type_checkers() -> None:
    tree = ast.parse(Path(megadistill.__file__).read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If))
    seen = {alias.name for n in checked.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert seen == set(megadistill.__all__) == set(megadistill._HOME)
    assert megadistill.__all__ == sorted(megadistill.__all__)
    assert set(megadistill.__all__) <= set(dir(megadistill))
    for name in megadistill.__all__:
        value = getattr(megadistill, name)
        assert value.__doc__, name
        assert getattr(sys.modules[megadistill._HOME[name]], name) is value


def test_help_shows_functions_and_classes_with_their_arguments() -> None:
    text = pydoc.plain(pydoc.render_doc(megadistill))
    for expected in ("select_targets(", "keys_N", "class SparseTargets(", "wrap_student(model"):
        assert expected in text


def test_no_public_function_hides_its_arguments() -> None:
    for name in megadistill.__all__:
        value = getattr(megadistill, name)
        if inspect.isfunction(value):
            signature = inspect.signature(value)
            kinds = {p.kind for p in signature.parameters.values()}
            assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(
                p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()
            )


def test_the_loss_has_the_same_options_wherever_they_are_listed() -> None:
    public, kernel = (
        {
            p.name: p.default
            for p in inspect.signature(f).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        for f in (fused_linear_distillation, distillation_terms)
    )
    counts_only = {"agreement", "calibration"}  # what the loss does not depend on
    assert public == {k: v for k, v in kernel.items() if k not in counts_only}
    of_the_head = {"bias_V", "logit_scale", "softcap", "vocab_size"}
    assert set(LossOptions.__annotations__) == set(public) - of_the_head


def test_importing_costs_nothing_and_an_unknown_name_is_an_error() -> None:
    script = (
        f"import sys, megadistill; dir(megadistill);print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'selct_targets'"):
        _ = megadistill.selct_targets


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(megadistill.__file__).parent / "py.typed").read_bytes() == b""
