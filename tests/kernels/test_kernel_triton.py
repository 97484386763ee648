"""The Triton kernels: correct in the interpreter, and compiled as intended for GPUs that are not here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mergemix_kernels.triton_kernels import TILE_ELEMENTS as TILE


def test_in_the_interpreter():
    here = Path(__file__).parent
    # Without conftest.py, whose imports take longer than these tests.
    options = ["-q", "--noconftest", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(here / "interpreted_triton.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert re.search(r"\d+ passed", finished.stdout)
    assert "skipped" not in finished.stdout


def compile_to_ptx(capability: int, element: str, hint: int) -> str:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mergemix_kernels import triton_kernels

    constants = {
        "ELEMENT": getattr(tl, element),
        "HINT": hint,
        "TILE": TILE,
    }
    arguments = {"table": "*i64", "row_length": "i32", "tile_group": "*i32", "tile_index": "*i32"}
    arguments |= {"weights": "*fp32", "order": "*i32", "active": "i32"}
    signature = arguments | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_kernels.weighted_sum_kernel, signature=signature, constexprs=constants)
    options = {"num_warps": triton_kernels.NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ["uint16", "float16", "float32"])
def test_machine_code(capability, element):
    aligned = compile_to_ptx(capability, element, 16)
    assert re.search(r"ld\.global\S*\.v4\.b32", aligned), "16-byte loads"
    assert re.search(r"st\.global\S*\.v4\.b32", aligned), "16-byte stores"
    unaligned = compile_to_ptx(capability, element, 4 if element == "float32" else 2)
    assert not re.search(r"(ld|st)\.global\S*\.v[248]", unaligned), "a wide access would fault"
    for ptx in (aligned, unaligned):
        assert "fma.rn.f32" not in ptx
        assert "mul.rn.f32" in ptx, "a product without .rn may be fused by the assembler"
        assert "add.rn.f32" in ptx
        assert ".ftz" not in ptx, "subnormals must survive"
        # tile_index * TILE passes 2**31 in tensors of more elements than that
        in_64_bits = (
            rf"mul\.wide\.s32\s+%rd\d+, %r\d+, {TILE};|shl\.b64\s+%rd\d+, %rd\d+, {TILE.bit_length() - 1};"
        )
        assert re.search(in_64_bits, ptx), "the offset of a tile must be computed in 64 bits"
