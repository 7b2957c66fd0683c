"""Every kernel compiled for sm_90: nothing is spilled, wide loads are wide, and barriers stand where they must."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.assembly import Assembly, assemble

pytestmark = pytest.mark.compiled

DTYPES = ["*bf16", "*fp32"]
LISTS = [(entropy, listing) for entropy in (False, True) for listing in (False, True)]
CASES = ["teacher", "student", "mixture"]
# Of a streaming multiprocessor's 65,536 registers, two programs of 8 warps, or four of 4, may have so many a thread.
REGISTERS = 128
SHARED_BYTES = 16 * 2**10


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Assembly]:
    """Compiles a kernel without Triton's cache, and checks what holds for all of them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_and_check(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: Any) -> Assembly:
        assembly = assemble(kernel, pointers, constants, folder=tmp_path, **{"aligned": (), **options})
        assert assembly.stack_bytes == 0, "registers are spilled"
        assert assembly.registers <= REGISTERS
        assert assembly.shared_bytes <= SHARED_BYTES
        return assembly

    return compile_and_check


def outline(ptx: str, narrow: str) -> str:
    """The order of what shares the logits: W and w load and store 16 bytes, n and s one logit, | is a barrier."""
    letters = {r"ld\.global\.v4\.b32": "W", r"st\.global\.v4\.b32": "w", "bar.sync": "|"}
    letters |= {rf"ld\.global\.{narrow}": "n", rf"st\.global\.{narrow}": "s"}
    pattern = "|".join(f"({expression})" for expression in letters)
    names = list(letters.values())
    return "".join(names[found.lastindex - 1] for found in re.finditer(pattern, ptx) if found.lastindex)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_maxima(compiled: Callable[..., Assembly], dtype: str) -> None:
    from megatron_rl.ops.triton import rows

    pointers = {"logits_ptr": dtype, "maxima_ptr": "*fp32"}
    constants = {"WIDTH": 16, "BLOCK": rows.BLOCK}
    aligned = ["logits_ptr", "stride", "maxima_ptr"]
    assembly = compiled(rows.block_maxima_kernel, pointers, constants, aligned=aligned, warps=rows.WARPS)
    assert 16 in assembly.accesses("ld")


@pytest.mark.parametrize(("entropy", "listing"), LISTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_statistics(compiled: Callable[..., Assembly], dtype: str, entropy: bool, listing: bool) -> None:
    from megatron_rl.ops.triton import rows

    pointers = {"logits_ptr": dtype, "labels_ptr": "*i64", "rows_ptr": "*fp32"}
    pointers |= {"ids_ptr": "*i64", "listed_ptr": "*fp32"}
    constants = {"ENTROPY": entropy, "LISTING": listing, "BLOCK": rows.BLOCK, "LIST_BLOCK": rows.LIST_BLOCK}
    # The size of the vocabulary may be any number.
    aligned = ["logits_ptr", "stride"]
    assembly = compiled(rows.row_statistics_kernel, pointers, constants, aligned=aligned, warps=rows.WARPS)
    assert 16 in assembly.accesses("ld")
    if listing:
        # Label; list read, overwritten; the row read; the list put back; results. A barrier stands between any two.
        assert assembly.order == "rr" + "rrw|w" + "|rr|" + "rrw" + "wwwww"
    if listing and dtype == "*bf16":
        assert re.fullmatch(r"nn\|*\|s\|+W[W|n]*\|s\|*", outline(assembly.ptx, "b16"))


@pytest.mark.parametrize(("entropy", "listing"), LISTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dlogits(compiled: Callable[..., Assembly], dtype: str, entropy: bool, listing: bool) -> None:
    from megatron_rl.ops.triton import dlogits

    numbers = ("top_ptr", "offset_ptr", "slope_ptr", "grad_logp_ptr", "listed_ptr")
    pointers = {"logits_ptr": dtype, "labels_ptr": "*i64", "ids_ptr": "*i64", **dict.fromkeys(numbers, "*fp32")}
    constants = {"ENTROPY": entropy, "LISTING": listing, "BLOCK": dlogits.BLOCK, "LIST_BLOCK": dlogits.LIST_BLOCK}
    aligned = ["logits_ptr", "stride"]
    assembly = compiled(dlogits.dlogits_kernel, pointers, constants, aligned=aligned, warps=dlogits.WARPS)
    assert 16 in assembly.accesses("ld") and 16 in assembly.accesses("st")
    assert dlogits.BLOCK >= 32 * dlogits.WARPS
    if listing:
        # The row in whole blocks and the rest, then the list over it.
        assert assembly.order.endswith("rwrw" + "|" + "rrw")
    if listing and dtype == "*bf16":
        assert re.fullmatch(r"Ww[ns]*\|s", outline(assembly.ptx, "b16"))


@pytest.mark.parametrize("constants", [{"k": 1}, {"k": 1, "size": 1, "stride": 1}])
def test_one_id_and_one_column(compiled: Callable[..., Assembly], constants: dict[str, int]) -> None:
    """Triton makes a constant of an argument that is 1."""
    from megatron_rl.ops.triton import dlogits, rows

    pointers = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "ids_ptr": "*i64"}
    lists = {"ENTROPY": True, "LISTING": True, "LIST_BLOCK": 128, **constants}
    numbers = dict.fromkeys(("rows_ptr", "listed_ptr"), "*fp32")
    compiled(rows.row_statistics_kernel, {**pointers, **numbers}, {**lists, "BLOCK": rows.BLOCK}, warps=rows.WARPS)
    numbers = dict.fromkeys(("top_ptr", "offset_ptr", "slope_ptr", "grad_logp_ptr", "listed_ptr"), "*fp32")
    compiled(dlogits.dlogits_kernel, {**pointers, **numbers}, {**lists, "BLOCK": dlogits.BLOCK}, warps=dlogits.WARPS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence(compiled: Callable[..., Assembly], dtype: str, case: str) -> None:
    from megatron_rl.ops.triton import divergence

    heads = {"student_ptr": dtype, "teacher_ptr": dtype, "student_total_ptr": "*fp32", "teacher_total_ptr": "*fp32"}
    constants = {"CASE": case, "BLOCK": divergence.BLOCK}
    aligned = ["student_ptr", "student_stride", "teacher_ptr", "teacher_stride", "size"]
    options = {"aligned": aligned, "warps": divergence.WARPS}
    sums = compiled(divergence.sums_kernel, {**heads, "sums_ptr": "*fp32"}, constants, **options)
    assert sums.accesses("ld").count(16) >= 2
    numbers = ("slopes_ptr", "entropy_ptr", "grad_loss_ptr", "grad_logp_ptr", "grad_entropy_ptr")
    pointers = {**heads, "labels_ptr": "*i64", **dict.fromkeys(numbers, "*fp32")}
    slope = compiled(divergence.slope_kernel, pointers, constants, **options)
    assert slope.accesses("ld").count(16) >= 2 and 16 in slope.accesses("st")
    assert divergence.BLOCK >= 32 * divergence.WARPS


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("copying", [True, False])
def test_average(compiled: Callable[..., Assembly], copying: bool, aligned: bool) -> None:
    import triton.language as tl

    from megatron_rl.ops.triton import average

    constants = {"AVERAGE": tl.float32, "WEIGHT": tl.float32, "COPY": tl.bfloat16, "BLOCK": average.BLOCK}
    constants |= {"COPYING": copying, "ALIGNED": aligned}
    tables = {"addresses_ptr": "*i64", "parts_ptr": "*i64"}
    assembly = compiled(average.update_kernel, tables, constants, warps=average.WARPS)
    # 8 numbers a thread: 2 loads each of average and weight, 2 stores, and 1 of the copy.
    assert assembly.accesses("ld").count(16) == (4 if aligned else 0)
    assert assembly.accesses("st").count(16) == ((3 if copying else 2) if aligned else 0)
    assert average.BLOCK >= 32 * average.WARPS


@pytest.mark.parametrize("reverse", [False, True])
def test_scan(compiled: Callable[..., Assembly], reverse: bool) -> None:
    from megatron_rl.ops.triton import scan

    pointers = {"values_ptr": "*fp32", "total_ptr": "*fp32", "bounds_ptr": "*i64"}
    compiled(scan.scan_kernel, pointers, {"REVERSE": reverse, "BLOCK": scan.BLOCK}, warps=scan.WARPS)


def test_segments(compiled: Callable[..., Assembly]) -> None:
    from megatron_rl.ops.triton import segments

    constants = {"BLOCK": segments.BLOCK}
    pointers = {"values_ptr": "*fp32", "mask_ptr": "*u8", "bounds_ptr": "*i64"}
    numbers = {"means_ptr": "*fp32", "counts_ptr": "*fp32"}
    compiled(segments.mean_kernel, {**pointers, **numbers}, constants, warps=segments.WARPS)
    pointers = {"slopes_ptr": "*fp32", "mask_ptr": "*u8", "bounds_ptr": "*i64", "grad_ptr": "*fp32"}
    compiled(segments.spread_kernel, pointers, constants, warps=segments.WARPS)


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is not blind: one warp has no room for a block of 16 warps."""
    import triton.language as tl

    from megatron_rl.ops.triton import average

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    constants = {"AVERAGE": tl.float32, "WEIGHT": tl.float32, "COPY": tl.bfloat16, "BLOCK": average.BLOCK}
    constants |= {"COPYING": True, "ALIGNED": True}
    tables = {"addresses_ptr": "*i64", "parts_ptr": "*i64"}
    assembly = assemble(average.update_kernel, tables, constants, aligned=(), warps=1, folder=tmp_path)
    assert assembly.stack_bytes > 0
