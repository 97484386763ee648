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


REGISTERS = 65_536  # of a multiprocessor
THREADS = 128
MOST_PROGRAMS = 8


def _unmeasured(elements: int, registers: int) -> Tiling:
    """As many programs of THREADS threads as the registers hold.

    With one output a tile may be large: 64 bytes of each source per thread. With more, the fp32 sums take up the
    registers, and a thread has 16 bytes of each source.
    """
    programs = min(REGISTERS // (registers * THREADS), MOST_PROGRAMS)
    source = (
        f"not measured: with {registers} registers a thread (ptxas 12.9) {programs} programs are resident"
    )
    return Tiling(elements, THREADS // 32, programs, source)


# By the name that the driver gives, or by compute capability; then by the greatest number of outputs it is for.
TILINGS: dict[str | tuple[int, int], dict[int, Tiling]] = {
    (8, 0): {1: _unmeasured(4096, 96), 4: _unmeasured(1024, 64), 8: _unmeasured(1024, 96)},
    (9, 0): {1: _unmeasured(4096, 80), 4: _unmeasured(1024, 56), 8: _unmeasured(1024, 96)},
}
ELSEWHERE = {1: _unmeasured(4096, 128), 8: _unmeasured(1024, 128)}


def tiling_for(name: str, capability: tuple[int, int], outputs: int) -> Tiling:
    """The tiling for a GPU: by its name, else by its compute capability, else one that suits any."""
    by_outputs = TILINGS.get(name) or TILINGS.get(capability) or ELSEWHERE
    return by_outputs[min(most for most in by_outputs if most >= outputs)]
