"""How the Triton kernel cuts its work, per GPU, and where each figure comes from.

`python -m benchmarks.bench_kernel --device cuda --tune` measures the choices on the GPU at hand; what it prints
as the best belongs in TILINGS, with the date and the GPU in `source`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """What one program does at a time, and how many of them a multiprocessor is given.

    elements: of BF16 or F16 in a tile, a power of two; a tile of F32 has half as many, so as many bytes.
    warps: per program. programs: per multiprocessor; each walks through its share of the tiles.
    source: where the figures come from.
    """

    elements: int
    warps: int
    programs: int
    source: str


# One output needs few registers, so a tile may be large: 64 bytes of each source per thread. With more outputs
# the fp32 sums fill the registers, and a thread takes 16 bytes of each source.
_BY_REGISTERS = (
    "not measured: as many programs as fit 65,536 registers beside each other, at the registers per thread "
    "that ptxas 12.9 reports ({registers} with {outputs})"
)
_GUESS = "not measured: no figures for this GPU; small enough for any that Triton supports"

# By the name that the driver gives or by compute capability: the tiling for one output, and for two to eight.
TILINGS: dict[str | tuple[int, int], tuple[Tiling, Tiling]] = {
    (8, 0): (
        Tiling(4096, 4, 5, _BY_REGISTERS.format(registers=96, outputs="one output")),
        Tiling(1024, 4, 5, _BY_REGISTERS.format(registers=96, outputs="eight outputs")),
    ),
    (9, 0): (
        Tiling(4096, 4, 6, _BY_REGISTERS.format(registers=80, outputs="one output")),
        Tiling(1024, 4, 5, _BY_REGISTERS.format(registers=96, outputs="eight outputs")),
    ),
}
ELSEWHERE = (Tiling(4096, 4, 4, _GUESS), Tiling(1024, 4, 4, _GUESS))


def tiling_for(name: str, capability: tuple[int, int], outputs: int) -> Tiling:
    """The tiling for a GPU: by its name, else by its compute capability, else one that suits any."""
    one, several = TILINGS.get(name) or TILINGS.get(capability) or ELSEWHERE
    return one if outputs == 1 else several
