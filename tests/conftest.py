"""What holds for every test: no network, one thread, nothing written to the home folder."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TESTS = Path(__file__).parent

# Before anything imports torch or Hugging Face's packages, which read these once. Processes that
# tests start inherit them.
_caches = tempfile.TemporaryDirectory(prefix="megadistill-tests-")
os.environ.update(
    HF_HOME=_caches.name,
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    # Ranks share two cores: more threads a rank only get in each other's way.
    OMP_NUM_THREADS="1",
)

# A shell that starts the suite in the background has it ignore these, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# Many tests import transformers at their top: megadistill must have come before it.
import megadistill  # noqa: E402, F401

# Other processes may be busy on the same cores: how long an example takes says nothing.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# The files that take longest come first, so that no worker is left alone with one at the end.
_SLOW = ("launch", "chaos", "train", "tools", "bench", "parallel", "student")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders of tests by how long they take; within a folder nothing changes."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(_TESTS).parts[0]
        return _SLOW.index(folder) if folder in _SLOW else len(_SLOW)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def _no_handler_outlives_its_test() -> Iterator[None]:
    """A command that a test runs in this process logs to that test's stderr, now closed."""
    yield
    logging.getLogger("megadistill").handlers.clear()
