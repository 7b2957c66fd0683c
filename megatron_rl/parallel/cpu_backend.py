"""Run an unmodified megatron-core on a machine without CUDA: CPU tensors and gloo.

megatron-core spells its device in the source: `device="cuda"`, `torch.cuda.current_device()`,
`"torch.cuda.FloatTensor"`. PyTorch offers the same device interface for the CPU as `torch.cpu`. `install()` therefore
makes Python read the modules below `megatron.core`, and no others, with "cuda" spelled "cpu". torch itself is not
touched: `torch.cuda.is_available()` stays False for everybody. With CUDA present `install()` does nothing.

What a change of spelling cannot mend is listed in `DEBTS`, each with its place in megatron-core 0.16.1 and the reason.
A debt whose target has moved raises, so that a new release of megatron-core cannot be patched half.
"""

import ast
import importlib.abc
import importlib.machinery
import sys
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.ops.products import factor_dtype
from megatron_rl.parallel.cpu_adam import CpuAdam
from megatron_rl.parallel.cpu_kernels import add_weight_gradient, rotate_packed

PACKAGE = "megatron.core"


class _Event(torch.cpu.Event):
    """`torch.cpu.Event` with the arguments and the timing of `torch.cuda.Event`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return (end.time - self.time) * 1e3


class _Stream(torch.cpu.Stream):
    """The one stream of a CPU."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Stream":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:  # type: ignore[override]
        return event or _Event()

    def synchronize(self) -> None:
        pass


def _cpu_as_cuda() -> types.SimpleNamespace:
    """The part of `torch.cuda` that megatron-core uses, on the CPU."""
    stream = _Stream()
    rng = {
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": torch.default_generator.manual_seed,
    }

    def zero(*args: Any, **kwargs: Any) -> int:
        return 0

    return types.SimpleNamespace(
        current_device=torch.cpu.current_device,
        device_count=torch.cpu.device_count,
        set_device=torch.cpu.set_device,
        synchronize=torch.cpu.synchronize,
        stream=torch.cpu.stream,
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda device=None: stream,
        default_stream=lambda device=None: stream,
        default_generators=[torch.default_generator],
        random=types.SimpleNamespace(**rng),
        empty_cache=zero,
        memory_allocated=zero,
        memory_reserved=zero,
        max_memory_allocated=zero,
        reset_peak_memory_stats=zero,
        nvtx=types.SimpleNamespace(range_push=zero, range_pop=zero),
        **rng,
    )


class _Respell(ast.NodeTransformer):
    """Reads CUDA as CPU. `names` are the members of torch.cuda that have a CPU counterpart."""

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`torch.cuda.synchronize` -> `_cpu.synchronize`; `x.is_cuda` -> `x.is_cpu` ("is it on the device?")."""
        self.generic_visit(node)
        if node.attr == "is_cuda":
            node.attr = "is_cpu"
        if node.attr in self.names and ast.unparse(node.value) == "torch.cuda":
            node.value = ast.copy_location(ast.Name("_cpu", ast.Load()), node.value)
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """`"cuda"`, `"cuda:0"` -> `"cpu"`; `"torch.cuda.FloatTensor"` -> `"torch.FloatTensor"`."""
        text = node.value
        if isinstance(text, str):
            if text == "cuda" or text.startswith("cuda:"):
                node.value = "cpu"
            elif text.startswith("torch.cuda."):
                node.value = text.replace("torch.cuda.", "torch.", 1)
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """`f"cuda:{i}"` -> `"cpu"`."""
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and first.value == "cuda:":
            return ast.copy_location(ast.Constant("cpu"), node)
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """`pin_memory=True` -> `pin_memory=False`: pinning needs an accelerator."""
        self.generic_visit(node)
        if node.arg == "pin_memory" and isinstance(node.value, ast.Constant):
            node.value = ast.copy_location(ast.Constant(False), node.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """`x.cuda(...)` -> `x.cpu()`; `torch.device("cuda", i)` -> `torch.device("cpu")`."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            node.func.attr, node.args, node.keywords = "cpu", [], []
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "device" and len(node.args) > 1:
            first = node.args[0]
            if isinstance(first, ast.Constant) and first.value == "cpu":
                node.args = [first]
        return node


@dataclass(frozen=True, slots=True)
class Debt:
    """A replacement inside one module of megatron-core, made right after its import."""

    module: str
    names: tuple[str, ...]
    place: str
    reason: str
    apply: Callable[[types.ModuleType], None]


def _rng(module: Any) -> None:
    module._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _optimizer(module: Any) -> None:
    if module.USING_PYTORCH_OPTIMIZER:
        module.Adam, module.USING_PYTORCH_OPTIMIZER = CpuAdam, False


def _distributed_optimizer(module: Any) -> None:
    if not module.HAVE_APEX_OR_TE:
        module.Adam, module.HAVE_APEX_OR_TE, module.USING_TE_OPTIMIZER = CpuAdam, True, True


def _uneven_pieces(module: Any) -> None:
    gather, reduce_scatter = module._gather_along_first_dim, module._reduce_scatter_along_first_dim

    def gathered(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *options: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return gather(tensor, group, sizes, *options)
        whole = tensor.new_empty(sum(sizes), *tensor.shape[1:])
        sent = tensor.repeat(group.size(), *[1] * (tensor.dim() - 1))
        dist.all_to_all_single(whole, sent, sizes, [len(tensor)] * group.size(), group=group)
        return whole

    def reduced(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *options: Any) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return reduce_scatter(tensor, group, sizes, *options)
        pieces = tensor.new_empty(group.size(), sizes[group.rank()], *tensor.shape[1:])
        own = [len(pieces[0])] * group.size()
        dist.all_to_all_single(pieces.flatten(0, 1), tensor.contiguous(), own, sizes, group=group)
        return pieces.sum(0)

    module._gather_along_first_dim, module._reduce_scatter_along_first_dim = gathered, reduced


def _routing(module: Any) -> None:
    def as_it_is(tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = as_it_is
    if not module.HAVE_TE:
        module.te_general_gemm = None


def _linear(module: Any) -> None:
    def widened(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @wraps(linear)
        def forward(input: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
            wide = factor_dtype(input)
            if wide != weight.dtype:
                options["gradient_accumulation_fusion"] = False  # the widened copy has no `main_grad`
            return linear(input=input.to(wide), weight=weight.to(wide), **options).to(input.dtype)

        return forward

    for name in _LINEAR:
        setattr(module, name, widened(getattr(module, name)))


def _weight_gradients(module: Any) -> None:
    def unread(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype)

    module._grad_accum_fusion_available = True
    module.get_dummy_wgrad = unread  # where Transformer Engine is installed, its own lies on a GPU
    module.fused_weight_gradient_mlp_cuda = types.SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)


def _rotation(module: Any) -> None:
    module.fused_apply_rotary_pos_emb_thd = rotate_packed


_LINEAR = ("linear_with_grad_accumulation_and_async_allreduce", "linear_with_frozen_weight")


def _reduction(module: Any) -> None:
    reduce_scatter = module.dist_reduce_scatter_func

    def reduced(output: torch.Tensor, input: torch.Tensor, *, group: Any, **options: Any) -> Any:
        if group.size() == 1:
            assert output.data_ptr() == input.data_ptr() and output.shape == input.shape
            return None
        return reduce_scatter(output, input, group=group, **options)

    module.dist_reduce_scatter_func = reduced


def _jit(module: Any) -> None:
    module.disable_jit_fuser()


DEBTS = (
    Debt(
        f"{PACKAGE}.tensor_parallel.layers",
        _LINEAR,
        "tensor_parallel/layers.py:360,629",
        "a CPU without instructions for bfloat16 multiplies it up to eighty times as slowly as float32, and the "
        "gradient of a layer's input most slowly of all: there the factors are widened, and the product is rounded",
        _linear,
    ),
    Debt(
        f"{PACKAGE}.tensor_parallel.layers",
        ("_grad_accum_fusion_available",),
        "tensor_parallel/layers.py:44-48,569",
        "apex's product, which adds a weight's gradient to `main_grad`, is for CUDA; a CPU's own saves a pass over the "
        "gradients for each micro-batch, and their memory",
        _weight_gradients,
    ),
    Debt(
        f"{PACKAGE}.models.common.embeddings.rope_utils",
        ("fused_apply_rotary_pos_emb_thd",),
        "models/common/embeddings/rope_utils.py:31-34,292",
        "Transformer Engine's rotation of packed sequences is for CUDA, and megatron-core's own takes cosines anew in "
        "each layer and seven passes over queries and keys",
        _rotation,
    ),
    Debt(
        f"{PACKAGE}.jit",
        ("jit_fuser", "disable_jit_fuser"),
        "jit.py:17-38",
        "it decorates fused CUDA functions, which a CPU never calls, with torch.compile: importing the compiler and "
        "Triton costs seconds and 150 MB in every process",
        _jit,
    ),
    Debt(
        f"{PACKAGE}.tensor_parallel.mappings",
        ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
        "tensor_parallel/mappings.py:112,155",
        "tensor-parallel ranks of an expert have unlike numbers of tokens, and gloo gathers like ones only",
        _uneven_pieces,
    ),
    Debt(
        f"{PACKAGE}.transformer.moe.moe_utils",
        ("HAVE_TE", "RouterGatingLinearFunction", "maybe_move_tensor_to_cpu"),
        "transformer/moe/moe_utils.py:34-39,1078-1100,1192",
        "the router asks whether Transformer Engine has given it a product, under a name that without it does not "
        "exist; and counts of tokens are kept alive for a stream of copies, of which a CPU has none",
        _routing,
    ),
    Debt(
        f"{PACKAGE}.distributed.param_and_grad_buffer",
        ("dist_reduce_scatter_func",),
        "distributed/param_and_grad_buffer.py:36,443",
        "gloo copies all gradients to sum them over one rank, which has the sum already",
        _reduction,
    ),
    Debt(
        f"{PACKAGE}.tensor_parallel.random",
        ("_get_cuda_rng_state", "_set_cuda_rng_state"),
        "tensor_parallel/random.py:41,72",
        "they go through torch._C and a CUDA generator; the CPU's default generator takes their place",
        _rng,
    ),
    Debt(
        f"{PACKAGE}.optimizer",
        ("Adam", "USING_PYTORCH_OPTIMIZER"),
        "optimizer/__init__.py:10-34",
        "see the next entry: both modules must name the same class",
        _optimizer,
    ),
    Debt(
        f"{PACKAGE}.optimizer.distrib_optimizer",
        ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER"),
        "optimizer/distrib_optimizer.py:21-36,640-676",
        "with torch.optim.Adam the distributed optimizer cannot load its own checkpoint (it looks for one `step` per "
        "group); an Adam whose state is laid out as Transformer Engine's can",
        _distributed_optimizer,
    ),
)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, api: types.SimpleNamespace) -> None:
        super().__init__(name, path)
        self.api = api

    def get_code(self, fullname: str) -> types.CodeType:
        """Compiles the respelled source; the package's own bytecode cache is neither read nor written."""
        path = self.get_filename(fullname)
        tree = _Respell(frozenset(vars(self.api))).visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["_cpu"] = self.api
        super().exec_module(module)
        for debt in DEBTS:
            if debt.module == module.__name__:
                missing = [name for name in debt.names if not hasattr(module, name)]
                if missing:
                    raise RuntimeError(
                        f"megatron_rl's CPU backend expects {', '.join(missing)} in {debt.module} ({debt.place} of "
                        f"megatron-core 0.16.1), but this version has none. Install megatron-core 0.16.1."
                    )
                debt.apply(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self) -> None:
        self.api = _cpu_as_cuda()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self.api)
        return spec


def _silence() -> None:
    """Hides the notices that are certain on a machine without CUDA and ask nothing of the reader."""
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    warnings.filterwarnings("ignore", message=r".*full scope is deprecated")
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.* is deprecated")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r".*CUDA_DEVICE_MAX_CONNECTIONS")


def install() -> bool:
    """Makes megatron-core run on the CPU if there is no CUDA; says whether it does. Repeated calls do nothing more."""
    if torch.cuda.is_available():
        return False
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        if PACKAGE in sys.modules:
            raise RuntimeError(
                "import megatron_rl.parallel.device before megatron.core: the CPU backend comes too late"
            )
        _silence()
        sys.meta_path.insert(0, _Finder())
    return True
