"""A torchvision that cannot be imported looks absent, before transformers sees it.

There is no torchvision for a CPU torch; pip installs the CUDA one beside it, because streaming asks
for one, and its import dies with `operator torchvision::nms does not exist`. transformers looks
once, when it is first imported, whether torchvision is installed; where it is, models import it,
and not even a Llama can be loaded. Nothing here needs torchvision.

Many import transformers, in this package and below it (deepspeed, streaming), so the check hangs on
that import and not on calls: importing megadistill costs nothing, and importing transformers costs
the trial only where a torchvision is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from importlib.abc import MetaPathFinder
from typing import Any

log = logging.getLogger(__name__)

_LOCK = threading.RLock()


def hide_broken_torchvision() -> bool:
    """Make a torchvision that cannot be imported look absent; True where one works."""
    with _LOCK:
        if importlib.util.find_spec("torchvision") is None:
            return False
        try:
            importlib.import_module("torchvision")
        # A mismatch shows as RuntimeError, OSError, ImportError or AttributeError, by version.
        except Exception as error:  # noqa: BLE001
            log.warning(
                "torchvision is installed but cannot be imported (%s: %s); going on without it, "
                "nothing here needs it",
                type(error).__name__,
                error,
            )
        else:
            return True
        for name in [n for n in sys.modules if n.startswith("torchvision.")]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # the documented "not there"
        return False


class _BeforeTransformers(MetaPathFinder):
    """Finds nothing; is asked first when transformers is about to be imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "transformers" and self in sys.meta_path:
            sys.meta_path.remove(self)
            hide_broken_torchvision()


def install() -> None:
    """Have torchvision checked before transformers is first imported. Twice is once."""
    installed = any(isinstance(finder, _BeforeTransformers) for finder in sys.meta_path)
    if "transformers" not in sys.modules and not installed:
        sys.meta_path.insert(0, _BeforeTransformers())
