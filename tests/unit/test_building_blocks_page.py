"""docs/building_blocks.md: every block of code runs, in order, and prints what the page shows."""

import doctest
import re
from pathlib import Path

from megatron_rl import building_blocks

PAGE = Path(__file__).parents[2] / "docs" / "building_blocks.md"


def test_the_page_prints_what_it_shows() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    code = doctest.DocTestParser().get_doctest("".join(blocks), {}, PAGE.name, str(PAGE), 0)
    assert len(code.examples) > 40
    shown = "".join(example.source for example in code.examples)
    assert not [name for name in building_blocks.__all__ if name.islower() and f"{name}(" not in shown]
    reports: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(code, out=reports.append)
    assert not reports, "".join(reports)
