"""Every option is read somewhere, and every shipped config is valid."""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import SCHEMAS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples").rglob("*.yaml"))
SWEEPS = sorted((ROOT / "tools" / "sweeps").glob("*.yaml"))


def fields(schema: type) -> Iterator[tuple[str, str]]:
    """(section, field) of every option."""
    for section in dataclasses.fields(schema):
        if dataclasses.is_dataclass(section.type):
            for item in dataclasses.fields(section.type):
                yield section.name, item.name
        else:
            yield "", section.name


def attributes_read() -> set[str]:
    """Names that the package reads as attributes, outside the checks of the configuration itself."""
    found = set()
    for path in (ROOT / "megatron_rl").rglob("*.py"):
        if path.parent.name != "config":
            found |= {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    return found


# The layout is handed on whole, as keyword arguments of the mesh.
HANDED_ON = {("parallel", name) for name in ("tp", "pp", "vpp", "dp", "ep", "etp", "sequence_parallel", "recompute")}


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_every_option_has_a_reader(trainer: str) -> None:
    read = attributes_read()
    unread = {(section, name) for section, name in fields(SCHEMAS[trainer]) if name not in read}
    assert unread <= HANDED_ON


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_few_options(trainer: str) -> None:
    assert len(list(fields(SCHEMAS[trainer]))) <= 132


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT)) for path in CONFIGS])
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize("path", SWEEPS, ids=[path.stem for path in SWEEPS])
def test_every_case_of_a_sweep_is_valid(path: Path) -> None:
    sweep = yaml.safe_load(path.read_text())
    assert len(sweep["cases"]) > 1 and sweep["seeds"]
    for case, overrides in sweep["cases"].items():
        config = sweep["config"]
        load_config(
            ROOT / (config[case] if isinstance(config, dict) else config), [*sweep.get("options", []), *overrides]
        )


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_yaml_reads_every_option_as_a_word(trainer: str) -> None:
    """It takes a bare off, no or y for a truth value, which is no option."""
    for names in fields(SCHEMAS[trainer]):
        assert all(yaml.safe_load(f"{name}: 1") == {name: 1} for name in names if name)
