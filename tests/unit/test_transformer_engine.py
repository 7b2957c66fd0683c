"""The operators of Transformer Engine that are called, against what a release of it takes."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_rl.models import transformer_engine
from megatron_rl.parallel import device
from megatron_rl.types import RunError

# Written by tools/te_signatures.py, of the newest release that megatron-core 0.16.1 allows.
RELEASE = json.loads((Path(__file__).parent / "te_signatures.json").read_text())
COMPILED = ("multi_tensor_applier", "multi_tensor_l2norm", "multi_tensor_scale")


def function(names: list[str]) -> Any:
    """One that takes these parameters."""
    kinds = [(n.strip("*") or "more", inspect.Parameter.VAR_KEYWORD if n == "**" else 1) for n in ["self", *names]]
    called = lambda *_: None  # noqa: E731
    called.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n, kind in kinds])  # type: ignore[attr-defined,arg-type]
    return called


def library(**changed: list[str]) -> Any:
    """transformer_engine.pytorch as the release has it; `changed`: other parameters."""
    signatures = {**RELEASE["parameters"], **changed}
    adam = function(signatures.pop("optimizers.FusedAdam"))
    found: dict[str, Any] = {}
    for name in [name for name in signatures if "." not in name]:
        methods = {"__init__": function(signatures[name])}
        if f"{name}.forward" in signatures:
            methods["forward"] = function(signatures[f"{name}.forward"])
        found[name] = type(name, (), methods)
    return SimpleNamespace(**found, optimizers=SimpleNamespace(FusedAdam=adam, **dict.fromkeys(COMPILED, print)))


def test_the_release_has_all_that_is_called() -> None:
    assert RELEASE["wheel"].startswith("transformer_engine-2.11.0-")
    assert transformer_engine.faults(library()) == []


def test_what_a_version_lacks_is_named() -> None:
    older = library(Linear=[name for name in RELEASE["parameters"]["Linear"] if name != "tp_group"])
    del older.RMSNorm, older.optimizers.multi_tensor_scale
    assert transformer_engine.faults(older) == [
        "RMSNorm is missing",
        "Linear has no parameter tp_group",
        "optimizers.multi_tensor_scale is missing",
    ]


def test_a_run_does_not_start_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="not installed"):
        transformer_engine.check()
    package = ModuleType("transformer_engine")
    package.__version__ = "1.0"  # type: ignore[attr-defined]
    modules = {"transformer_engine": package, "transformer_engine.pytorch": library(Linear=["in_features"])}
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(transformer_engine.importlib, "import_module", modules.__getitem__)
    with pytest.raises(RunError, match=r"Transformer Engine 1\.0 .* Linear has no parameter out_features"):
        transformer_engine.check()
    modules["transformer_engine.pytorch"] = library()
    transformer_engine.check()


@pytest.mark.parametrize("found", [{"transformer_engine"}, {"transformer_engine", "transformer_engine_torch"}, set()])
def test_a_part_of_it_is_one_line(monkeypatch: pytest.MonkeyPatch, found: set[str]) -> None:
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name if name in found else None)
    if len(found) == 1:
        with pytest.raises(RunError, match="without its extension for torch"):
            device.check_transformer_engine()
    else:
        device.check_transformer_engine()


def test_a_command_beside_a_part_of_it_ends_in_one_line(tmp_path: Path) -> None:
    """As megatron-core would find it: a package that cannot load its extension."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise FileNotFoundError('libtransformer_engine.so')\n")
    config = Path(__file__).parents[2] / "examples" / "quickstart" / "grpo.yaml"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "megatron_rl", "check", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done
    (line,) = done.stderr.strip().splitlines()
    assert "without its extension for torch" in line


def test_the_package_is_silent_without_it(tmp_path: Path) -> None:
    code = "import sys, megatron_rl.trainers.run; print('transformer_engine' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
