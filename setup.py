"""Installing megadistill: `pip install .`, or `make venv` for the pinned environment."""

from pathlib import Path

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
# An extra for each optional library, by the name that an error message or the reference tells.
# trackio 0.43 wants pillow < 13, and the locks are beyond that, so that it is in neither; its tests
# run where it is installed.
TRACKERS = {"tensorboard": "tensorboard>=2.19", "wandb": "wandb>=0.21", "trackio": "trackio>=0.20"}
OPTIONAL = {
    **{name: [requirement] for name, requirement in TRACKERS.items()},
    "trackers": list(TRACKERS.values()),
    "peft": ["peft>=0.17"],  # merges LoRA adapters into their base
    "slow-tokenizers": ["protobuf", "sentencepiece", "tiktoken"],  # to convert tokenizer.model
    # Caches at URLs: s3://, gs://, sftp://.
    "s3": ["s3fs"],
    "gs": ["gcsfs"],
    "sftp": ["paramiko"],
}
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
    *OPTIONAL["peft"],
    "gguf>=0.10",  # the tests of a real model, which comes as GGUF
    *OPTIONAL["tensorboard"],
    *OPTIONAL["wandb"],
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
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=[
        "knowledge distillation",
        "large language models",
        "deepspeed",
        "logit caching",
        "sparse logits",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    # The configurations stay in configs/, and are installed inside the package.
    packages=[*find_packages(include=["megadistill", "megadistill.*"]), "megadistill.configs"],
    package_dir={"megadistill.configs": "configs"},
    package_data={"megadistill": ["py.typed"], "megadistill.configs": ["*.yaml"]},
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require={"dev": DEVELOP, **OPTIONAL},
    entry_points={"console_scripts": ["megadistill = megadistill.__main__:main"]},
)
