"""Every folder of tests is collected: one that pytest passes over would be green for ever."""

from fnmatch import fnmatch
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    skipped = request.config.getini("norecursedirs")
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert len(folders) > 2
    for folder in folders:
        for part in folder.parts:
            assert not any(fnmatch(part, pattern) for pattern in skipped), f"tests/{folder} is never collected"
