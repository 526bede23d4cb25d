"""What holds for every test: no network, one thread, nothing written to the home folder."""

from __future__ import annotations

import os
import tempfile

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

import hypothesis  # noqa: E402

# Many tests import transformers at their top: megadistill must have come before it.
import megadistill  # noqa: E402, F401

# Other processes may be busy on the same cores: how long an example takes says nothing.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
