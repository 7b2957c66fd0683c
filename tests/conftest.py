"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.pool import Pool

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real 260K-parameter Llama, where the environment says it lies."""
    path = os.environ.get("MEGATRON_RL_STORIES", "")
    if not path:
        pytest.skip("set MEGATRON_RL_STORIES to a directory with the stories260K model in Hugging Face format")
    return Path(path)
