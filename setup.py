"""Installing megadistill: `pip install .`, or `make venv` for the pinned environment."""

from setuptools import find_packages, setup

# Ranges that the code is known to work with, wide enough to resolve next to mosaicml-streaming
# 0.13, which wants transformers < 5 and numpy < 2.2. The environment that `make venv` builds has
# newer ones: requirements.lock pins it, overrides.txt says where streaming's wishes are overruled.
REQUIRES = [
    "accelerate>=1.1",  # transformers asks for it before it partitions a model under ZeRO-3
    "datasets>=3",
    "deepspeed>=0.19.8,<0.20",
    "fsspec",
    "huggingface-hub",
    "matplotlib",
    "mosaicml-streaming>=0.13,<0.14",
    "numpy>=2",
    "pydantic>=2.9",
    "pyyaml>=6",
    "safetensors>=0.5",
    "tokenizers>=0.20",
    "torch>=2.9",
    "tqdm",
    "transformers>=4.57,<6",
    "xxhash>=3.4",
]
DEVELOP = [
    "hypothesis",
    "import-linter>=2.3",
    "mypy>=1.15",
    "ninja",
    "pre-commit",
    "pytest>=8",
    "ruff>=0.12",
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
    extras_require={"dev": DEVELOP},
)
