"""Kernels compiled for a GPU that is not there: sm_90 machine code, and what the assembler says of it."""

import re
import subprocess
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOPPER = ("cuda", 90, 32)


@dataclass(frozen=True)
class Assembly:
    ptx: str
    order: str  # of its loads (r), stores (w) and barriers (|), as it was written
    registers: int  # per thread
    stack_bytes: int  # per thread; a register that is spilled lies here
    shared_bytes: int  # per program

    def accesses(self, kind: str) -> list[int]:
        """The bytes of each global load (`ld`) or store (`st`) of a thread, in the order of the text."""
        found = re.findall(rf"\b{kind}\.global(?:\.[a-z_:0-9]+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s", self.ptx)
        return [int(count or 1) * int(bits) // 8 for count, bits in found]


def assemble(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Collection[str],
    warps: int,
    folder: Path,
) -> Assembly:
    """Compiles a kernel whose pointers have these types; what else is no constant is int32, or as it is annotated.

    `aligned` are the arguments that are multiples of 16, which Triton finds out by itself when it launches.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    annotated = {parameter.name: parameter.annotation_type for parameter in kernel.params}
    types = {
        name: "constexpr" if name in constants else pointers.get(name) or annotated[name] or "i32"
        for name in kernel.arg_names
    }
    divisible = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=types, constexprs=dict(constants), attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget(*HOPPER), options={"num_warps": warps})
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    letters = {"tt.load": "r", "tt.store": "w", "ttg.barrier": "|"}
    order = "".join(
        letters[name] for name in re.findall(r"\b(?:tt\.load|tt\.store|ttg\.barrier)\b", compiled.asm["ttir"])
    )
    return Assembly(compiled.asm["ptx"], order, registers, stack, compiled.metadata.shared)
