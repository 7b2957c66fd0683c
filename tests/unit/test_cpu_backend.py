"""The CPU backend: quiet, limited to megatron-core, inert on CUDA, and loud about moved targets."""

import ast
import subprocess
import sys
import types

import pytest
import torch

from megatron_rl.parallel import cpu_backend


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_is_silent_and_torch_stays_as_it_was() -> None:
    done = python(
        "import torch; before = dict(vars(torch.cuda));"
        "import megatron_rl.parallel.device as d; import megatron.core.pipeline_parallel, megatron.core.optimizer;"
        "changed = [k for k, v in before.items() if getattr(torch.cuda, k) is not v];"
        "assert d.ON_CPU and not changed and not torch.cuda.is_available(), changed"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_inert_where_there_is_cuda() -> None:
    done = python(
        "import sys, torch; torch.cuda.is_available = lambda: True;"
        "from megatron_rl.parallel import cpu_backend;"
        "finders = list(sys.meta_path); filters = list(__import__('warnings').filters);"
        "assert cpu_backend.install() is False;"
        "assert sys.meta_path == finders and __import__('warnings').filters == filters"
    )
    assert done.returncode == 0, done.stderr


def test_too_late_is_said() -> None:
    done = python(
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('x');"
        "from megatron_rl.parallel import cpu_backend; cpu_backend.install()"
    )
    assert "comes too late" in done.stderr


def respelled(source: str) -> str:
    names = frozenset({"current_device", "synchronize"})
    return ast.unparse(cpu_backend._Respell(names).visit(ast.parse(source)))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("torch.cuda.current_device()", "_cpu.current_device()"),
        ("torch.cuda.is_available()", "torch.cuda.is_available()"),
        ("torch.zeros(1, device='cuda:1')", "torch.zeros(1, device='cpu')"),
        ("torch.zeros(1, device=f'cuda:{i}')", "torch.zeros(1, device='cpu')"),
        ("t.type() == 'torch.cuda.FloatTensor'", "t.type() == 'torch.FloatTensor'"),
        ("x.cuda(non_blocking=True)", "x.cpu()"),
        ("x.is_cuda", "x.is_cpu"),
        ("torch.device('cuda', 3)", "torch.device('cpu')"),
        ("torch.empty(2, pin_memory=True)", "torch.empty(2, pin_memory=False)"),
        ("say('a cuda device')", "say('a cuda device')"),
    ],
)
def test_spelling(source: str, expected: str) -> None:
    assert respelled(source) == expected


def test_a_moved_target_raises(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    path = tmp_path / "moved.py"
    path.write_text("Adam = None\n")
    debt = cpu_backend.Debt("moved", ("Adam", "GONE"), "somewhere.py:1", "a reason", lambda module: None)
    monkeypatch.setattr(cpu_backend, "DEBTS", (debt,))
    loader = cpu_backend._Loader("moved", str(path), cpu_backend._cpu_as_cuda())
    with pytest.raises(RuntimeError, match=r"expects GONE in moved \(somewhere.py:1"):
        loader.exec_module(types.ModuleType("moved"))


def test_every_debt_says_where_and_why() -> None:
    for debt in cpu_backend.DEBTS:
        assert debt.names and ".py:" in debt.place and len(debt.reason) > 20


def test_adam_is_torchs() -> None:
    """Same trajectory as torch.optim.AdamW, and the state that the distributed optimizer saves."""
    from megatron_rl.parallel.cpu_adam import CpuAdam

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, generator=generator)
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.03}
    ours, reference = CpuAdam([mine], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        gradient = torch.randn(50, generator=generator)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert ours.param_groups[0]["step"] == 5
    assert set(ours.state[mine]) == {"exp_avg", "exp_avg_sq"}
