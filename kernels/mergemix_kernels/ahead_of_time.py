"""The Triton kernel compiled for GPUs that are not here, and what can be read off the machine code."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from mergemix_kernels.tiles import Tiling, tiling_for

CAPABILITIES = ((8, 0), (9, 0))  # A100; H100 and H200


def compile_for(capability: tuple[int, int], outputs: int, tiling: Tiling | None = None) -> dict[str, str]:
    """ "ptx", "sass" and "resources" of the kernel as `triton_kernels` launches it. Needs no GPU.

    tiling: by default the one for GPUs of that compute capability. Raises FileNotFoundError or
    subprocess.CalledProcessError when the disassembler that Triton brings is missing or fails.
    """
    from triton.compiler import ASTSource

    from mergemix_kernels import triton_kernels

    tiling = tiling or tiling_for("", capability, outputs)
    constants = {"OUTPUTS": outputs, "SIZE": tiling.elements}
    signature = {"table": "*i64", "row_length": "i32", "tile_group": "*i32", "tiles": "i32", "terms": "*i32"}
    signature |= {"active": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=triton_kernels.weighted_sum_kernel, signature=signature, constexprs=constants)
    return machine_code(source, capability, tiling.warps)


def machine_code(source: Any, capability: tuple[int, int], warps: int) -> dict[str, str]:
    """ "ptx", "sass" and "resources" of any kernel (a triton ASTSource), as it is launched here: without fused sums."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options
    )
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])

        def dump(what: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, what, str(binary)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        return {"ptx": compiled.asm["ptx"], "sass": dump("-sass"), "resources": dump("-res-usage")}


def facts(capability: tuple[int, int], outputs: int) -> dict[str, str | int]:
    """What the machine code of the kernel shows: one row for a results file."""
    tiling = tiling_for("", capability, outputs)
    code = compile_for(capability, outputs)
    used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", code["resources"])}
    return {
        "capability": f"sm_{capability[0]}{capability[1]}",
        "outputs": outputs,
        "tile_elements": tiling.elements,
        "warps": tiling.warps,
        "programs_per_multiprocessor": tiling.programs,
        "registers_per_thread": used["REG"],
        "spilled_bytes_per_thread": used["STACK"],
        "shared_bytes": used["SHARED"],
        "loads_of_16_bytes": len(re.findall(r"ld\.global\S*\.v4\.b32", code["ptx"])),
        "stores_of_16_bytes": len(re.findall(r"st\.global\S*\.v4\.b32", code["ptx"])),
        "fused_multiply_adds": len(re.findall(r"\bfma\.", code["ptx"]))
        + len(re.findall(r"\bFFMA\b", code["sass"])),
    }
