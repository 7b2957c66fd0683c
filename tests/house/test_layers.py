"""The floors of the house, read from the imports of every file: imports only go down."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_rl"

# From the ground up. A module may import from lower floors and from its own room; rooms of one floor are neighbours
# without a door, except on the top one, whose rooms together are the front door.
FLOORS = (
    {"__init__", "types", "config", "metrics"},
    {"algorithms", "ops"},
    {"data", "rewards"},
    {"parallel", "building_blocks"},
    {"models"},
    {"checkpoint"},
    {"workers", "rollout", "report", "planning", "bench"},
    {"trainers", "convert"},
    {"cli", "__main__", "launch"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOP = len(FLOORS) - 1

# Who may import a library: the rooms, folders or modules it is open to. The longest matching name decides.
DOORS = {
    "megatron.core": ("parallel", "models", "checkpoint", "workers"),
    "megatron.core.parallel_state": ("parallel.mesh",),
    "transformer_engine": ("models.transformer_engine",),
    "vllm": ("rollout.vllm",),
    "triton": ("ops.triton",),
    # No loss, planner or reward knows of ranks; the vocabulary operator does, for its columns are sharded.
    "torch.distributed": (
        "ops",
        "parallel",
        "models",
        "checkpoint",
        "workers",
        "rollout",
        "trainers",
        "launch",
        "convert",
    ),
}
# On the ground floor torch comes late or not at all.
LAZY_TORCH = "metrics.backends"
NAMELESS_ROOMS = {"utils", "util", "helpers", "helper", "common", "misc"}


class Import(NamedTuple):
    name: str
    line: int
    lazy: bool


def is_within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def imports(tree: ast.AST) -> Iterator[Import]:
    """Every import as a full name; lazy when it stands in a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            names = [start + alias.name for alias in node.names]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, id(node) in inside)


def floor_fault(module: str, name: str) -> str | None:
    """Why `module` (without the package's name) may not import `name` from the package, if it may not."""
    room, target = module.split(".")[0], name.split(".")[1] if "." in name else "__init__"
    if target not in FLOOR_OF:
        target = "__init__"  # a name of the package itself, such as its version
    here, there = FLOOR_OF[room], FLOOR_OF[target]
    if room == target or there < here or here == there == TOP:
        return None
    return f"{room} (floor {here}) imports {target} (floor {there})"


def door_fault(module: str, found: Import) -> str | None:
    """Why `module` may not import this library, if it may not."""
    doors = [library for library in DOORS if is_within(found.name, library)]
    if doors and not any(is_within(module, place) for place in DOORS[max(doors, key=len)]):
        return f"{module} imports {found.name}, which is open to {', '.join(DOORS[max(doors, key=len)])} only"
    on_ground = FLOOR_OF[module.split(".")[0]] == 0
    if on_ground and is_within(found.name, "torch") and not (found.lazy and module == LAZY_TORCH):
        return f"{module} imports torch on the ground floor"
    return None


def handler_faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "a bare except"
            if all(is_nothing(statement) for statement in node.body):
                yield node.lineno, "an except that passes"


def is_nothing(statement: ast.stmt) -> bool:
    is_ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or is_ellipsis


def faults(module: str, source: str) -> list[str]:
    """Everything that one module does against the rules of the house."""
    if nameless := NAMELESS_ROOMS & set(module.split(".")):
        return [f"{module}: a room called {nameless.pop()}"]
    if module.split(".")[0] not in FLOOR_OF:
        return [f"{module}: not in the table of floors"]
    tree = ast.parse(source)
    found: list[tuple[int, str]] = list(handler_faults(tree))
    for item in imports(tree):
        if item.name.startswith("."):
            found.append((item.line, f"a relative import, {item.name}"))
        elif is_within(item.name, "megatron_rl"):
            found.append((item.line, floor_fault(module, item.name) or ""))
        else:
            found.append((item.line, door_fault(module, item) or ""))
    return [f"{module}:{line}: {fault}" for line, fault in sorted(found) if fault]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def test_every_module_keeps_to_its_floor() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "__init__.py" in paths
    found = [fault for path in paths for fault in faults(module_name(path), path.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


PLANTED = [
    # Stairs that lead up, and neighbours without a door.
    ("ops.reference", "from megatron_rl.data.samples import Sample", "ops (floor 1) imports data (floor 2)"),
    ("data.collate", "def f() -> None:\n    import megatron_rl.parallel.device", "data (floor 2) imports parallel"),
    ("checkpoint", "from megatron_rl import trainers", "checkpoint (floor 5) imports trainers (floor 7)"),
    ("types", "from megatron_rl.config.schema import DType", "types (floor 0) imports config (floor 0)"),
    ("rollout.sync", "from megatron_rl.workers.actor import Actor", "rollout (floor 6) imports workers (floor 6)"),
    ("workers.actor", "from megatron_rl.rollout import sync", "workers (floor 6) imports rollout (floor 6)"),
    ("algorithms.kl", "import megatron_rl.ops.reference", "algorithms (floor 1) imports ops (floor 1)"),
    ("ops.ema", "import torch\nfrom megatron_rl.algorithms import kl", "ops.ema:2: ops (floor 1) imports algorithms"),
    ("launch.slurm", "if True:\n    from megatron_rl.cli import main\nimport vllm", "launch.slurm imports vllm"),
    ("data.chat", "from . import samples", "a relative import, .samples"),
    # Doors to libraries.
    ("rollout.sync", "from megatron.core import tensor_parallel", "rollout.sync imports megatron.core.tensor_parallel"),
    ("data.planner", "import megatron.core", "open to parallel, models, checkpoint, workers only"),
    ("workers.actor", "from megatron.core import parallel_state", "open to parallel.mesh only"),
    ("parallel.schedule", "from megatron.core.parallel_state import is_initialized", "open to parallel.mesh only"),
    ("models.attention", "import transformer_engine.pytorch as te", "open to models.transformer_engine only"),
    ("rollout.engine", "def f() -> None:\n    from vllm import LLM", "open to rollout.vllm only"),
    ("ops.dispatch", "import triton.language as tl", "open to ops.triton only"),
    ("algorithms.kl", "import torch.distributed as dist", "algorithms.kl imports torch.distributed"),
    ("data.planner", "from torch import distributed", "data.planner imports torch.distributed"),
    # Torch on the ground floor.
    ("types", "from torch import Tensor", "types imports torch on the ground floor"),
    ("metrics.backends", "import torch", "metrics.backends imports torch on the ground floor"),
    ("config.load", "def f() -> None:\n    import torch", "config.load imports torch on the ground floor"),
    # Names and handlers.
    ("utils", "", "a room called utils"),
    ("data.helpers", "", "a room called helpers"),
    ("garage.car", "", "not in the table of floors"),
    ("data.chat", "try:\n    f()\nexcept:\n    raise", "data.chat:3: a bare except"),
    ("data.chat", "try:\n    f()\nexcept OSError:\n    pass", "data.chat:3: an except that passes"),
    ("data.chat", "try:\n    f()\nexcept (OSError, KeyError):\n    ...", "data.chat:3: an except that passes"),
]


@pytest.mark.parametrize(("module", "source", "message"), PLANTED)
def test_planted_faults_are_found(module: str, source: str, message: str) -> None:
    (fault,) = faults(module, source)
    assert message in fault


ALLOWED = [
    ("cli", "from megatron_rl import __version__\nfrom megatron_rl.launch import torchrun"),
    ("trainers.grpo", "from megatron_rl.rollout import sync\nfrom megatron_rl.workers.actor import Actor"),
    ("data.collate", "import torch\nfrom megatron_rl.data.samples import Sample\nfrom megatron_rl.types import Prompt"),
    ("parallel.mesh", "from megatron.core import parallel_state, tensor_parallel"),
    ("models.families.llama", "from megatron.core.transformer import TransformerConfig"),
    ("models.transformer_engine", "def f() -> None:\n    import transformer_engine"),
    ("rollout.vllm.engine", "def f() -> None:\n    import vllm"),
    ("ops.triton.linear", "import triton\nimport triton.language as tl"),
    ("ops.dispatch", "from megatron_rl.ops.triton import linear"),
    ("metrics.backends", "def f() -> None:\n    from torch.utils.tensorboard import SummaryWriter"),
    ("types", "import torchless"),
    ("data.chat", "try:\n    f()\nexcept OSError as error:\n    raise ValueError from error"),
]


@pytest.mark.parametrize(("module", "source"), ALLOWED)
def test_what_the_rules_allow_is_no_fault(module: str, source: str) -> None:
    assert faults(module, source) == []
