"""These tests have processes of their own, in which Transformer Engine is imported before megatron-core."""

import os
from collections.abc import Iterator

import pytest

from tests.dist.pool import Pool
from tests.te.fused import FusedPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "MEGATRON_RL_TE" not in os.environ:
        for item in items:
            if "/tests/te/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="`make test-te` installs Transformer Engine's Python layer"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    workers = Pool(first=("tests.te.ready",))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def fused(pool: Pool) -> FusedPool:
    return FusedPool(pool)
