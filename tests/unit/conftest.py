"""Fixtures of the tests of conversions."""

from collections.abc import Callable

import pytest

from megatron_rl.cli import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a conversion says that is refused: one line, and exit code 2."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["convert", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("megatron-rl: ") and said.count("\n") == 1, said
        return said

    return run
