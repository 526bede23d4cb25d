"""The one place where mosaicml-streaming is imported.

`import streaming` imports `streaming.vision`, and that imports torchvision, which nothing here
needs. Where torchvision is absent, or broken and therefore hidden (megadistill/workarounds.py), a
placeholder stands in for `streaming.vision` during the import.

Importing streaming takes 2 to 5 s (torch and transformers come with it): reading shards does
without, only writing needs it.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType
from typing import TYPE_CHECKING

from megadistill.workarounds import hide_broken_torchvision

if TYPE_CHECKING:
    from streaming import MDSWriter

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


def _import_without_vision() -> ModuleType:
    name = "streaming.vision"
    sys.modules[name] = ModuleType(name, "A placeholder: torchvision is not usable here.")
    try:
        return importlib.import_module("streaming")
    finally:
        # A later import of streaming.vision then fails with the true reason.
        sys.modules.pop(name, None)
