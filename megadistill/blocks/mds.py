"""The one place where mosaicml-streaming is imported.

`import streaming` imports `streaming.vision`, and that imports torchvision, which nothing here
uses, and of which there is none for a CPU torch. A torchvision built for another torch is worse
than none: its import dies with `operator torchvision::nms does not exist`, and transformers, which
finds it installed, dies with it. So:

- torchvision works: nothing is touched;
- torchvision is absent: a placeholder stands in for `streaming.vision` during the import;
- torchvision is installed and broken: the process goes on as if it were absent.

Importing streaming takes 2 to 5 s (torch and transformers come with it): reading shards does
without, only writing needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streaming import MDSWriter

log = logging.getLogger(__name__)

_LOCK = threading.RLock()


def mds_writer() -> type[MDSWriter]:
    """streaming's MDSWriter. The first call of a process takes seconds."""
    return load_streaming().MDSWriter


def load_streaming() -> ModuleType:
    """The module `streaming`, whatever state torchvision is in."""
    with _LOCK:
        if "streaming" not in sys.modules and not hide_broken_torchvision():
            return _import_without_vision()
        return importlib.import_module("streaming")


def hide_broken_torchvision() -> bool:
    """Make a torchvision that cannot be imported look absent; True where it works.

    transformers remembers what is installed when it is first imported: call this before. It costs
    nothing where torchvision is absent.
    """
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


def _import_without_vision() -> ModuleType:
    name = "streaming.vision"
    sys.modules[name] = ModuleType(name, "A placeholder: torchvision is not usable here.")
    try:
        return importlib.import_module("streaming")
    finally:
        # A later import of streaming.vision then fails with the true reason.
        sys.modules.pop(name, None)
