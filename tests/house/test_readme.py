"""Every command that the documentation shows exists."""

import re
from pathlib import Path

import pytest

from megatron_rl.cli import VERBS

ROOT = Path(__file__).parents[2]

CODE = re.compile(r"```.*?\n(?P<block>.*?)```|`(?P<span>[^`\n]+)`", re.DOTALL)
COMMENT = re.compile(r"(^|\s)#.*$", re.MULTILINE)
MAKE = re.compile(r"(?<![\w./-])make(?P<targets>(?: +[a-z][\w-]*)+)")
VERB = re.compile(r"(?<![\w./-])(?:megatron-rl|-m megatron_rl) +(?P<verb>[a-z][\w-]*)")


def code(markdown: str) -> str:
    """The code blocks and spans, without their comments."""
    parts = (match["block"] or match["span"] or "" for match in CODE.finditer(markdown))
    return COMMENT.sub("", "\n".join(parts))


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


def unknown_commands(markdown: str, targets: set[str], verbs: set[str]) -> list[str]:
    """Commands in the code of a page that nothing answers to."""
    shown = code(markdown)
    made = {target for match in MAKE.finditer(shown) for target in match["targets"].split()}
    called = {match["verb"] for match in VERB.finditer(shown)}
    return [f"make {t}" for t in sorted(made - targets)] + [f"megatron-rl {v}" for v in sorted(called - verbs)]


def test_shown_commands_exist() -> None:
    targets = make_targets((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"help", "venv", "quickstart", "test"} <= targets
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found = {
        str(page.relative_to(ROOT)): unknown
        for page in pages
        if (unknown := unknown_commands(page.read_text(encoding="utf-8"), targets, set(VERBS)))
    }
    assert not found


PAGE = """
Do not make haste; `make test` and `make` are enough, or

```bash
make lint tset SEED=3   # then make coffee
.venv/bin/megatron-rl train config.yaml
megatron-rl fly config.yaml && python -m megatron_rl swim
megatron-rl --help
```
"""


def test_planted_commands_are_found() -> None:
    assert unknown_commands(PAGE, {"test", "lint"}, {"train"}) == ["make tset", "megatron-rl fly", "megatron-rl swim"]


@pytest.mark.parametrize("page", ["", "Please make tea with megatron-rl tea.", "`make test`\n```\nmake test\n```"])
def test_a_page_without_unknown_commands_passes(page: str) -> None:
    assert unknown_commands(page, {"test"}, set()) == []


def test_targets_are_read_from_a_makefile() -> None:
    makefile = "VENV ?= .venv\nSTAMP := x\n.PHONY: all\nall: venv ## Everything\ntest-full: all\n\t@echo no: yes\n"
    assert make_targets(makefile) == {"all", "test-full"}
