"""Installing megadistill: `pip install .`, or `make venv` for the pinned environment."""

from setuptools import find_packages, setup

# What plain pip resolves to: mosaicml-streaming 0.13 wants transformers < 5, numpy < 2.2 and
# xxhash < 4. The upper bounds say what follows from that, because older pips (23.2, which Python
# 3.11 brings) find it out by trying versions for minutes. The environment of `make venv` is newer:
# requirements.lock pins it, and overrides.txt says where these bounds are overruled.
REQUIRES = [
    "accelerate>=1.1",  # transformers asks for it before it partitions a model under ZeRO-3
    "datasets>=3,<5.1",  # 5.1 wants a newer huggingface-hub
    "deepspeed>=0.19.8,<0.20",
    "fsspec",
    "huggingface-hub>=0.34,<1",
    "matplotlib",
    "mosaicml-streaming>=0.13,<0.14",
    "numpy>=2,<2.2",
    "psutil",
    "pydantic>=2.9",
    "pyyaml>=6",
    "safetensors>=0.5",
    "tokenizers>=0.22,<0.23",
    "torch>=2.9",
    "tqdm",
    "transformers>=4.57,<5",
    "xxhash>=3.4,<4",
    "zstd>=1.5",  # what tools/bench.py compares with; mosaicml-streaming brings it, too
]
# What train.trackers can name. trackio 0.43 wants pillow < 13, and the locks are beyond that, so
# that it is in neither; its tests run where it is installed.
TRACKERS = {"tensorboard": "tensorboard>=2.19", "wandb": "wandb>=0.21", "trackio": "trackio>=0.20"}
ADAPTERS = "peft>=0.17"  # merges LoRA adapters into their base
DEVELOP = [
    "hypothesis",
    "import-linter>=2.3",
    "mypy>=1.15",
    "ninja",
    "pre-commit",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    ADAPTERS,
    "gguf>=0.10",  # the tests of a real model, which comes as GGUF
    TRACKERS["tensorboard"],
    TRACKERS["wandb"],
    "types-tqdm",
    "uv",
]

setup(
    name="megadistill",
    version="0.1.0",
    description=(
        "Distil large language models from a cache of sparse, unbiased teacher targets, with "
        "DeepSpeed on any number of hosts"
    ),
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["megadistill", "megadistill.*"]),
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require={"dev": DEVELOP, "peft": [ADAPTERS], "trackers": list(TRACKERS.values())},
)
