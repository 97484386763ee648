"""What bench_kernel times: implementations of the weighted sums, inputs for them, and the gate before any figure."""

from collections.abc import Callable, Sequence

import torch

from mergemix_kernels import reference
from mergemix_kernels.dispatch import DTYPE_NAMES, GroupedWeightedSum
from mergemix_kernels.weights import MAX_OUTPUTS, active_weights

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WORDS = {2: torch.int16, 4: torch.int32}  # by bytes: what bit patterns are compared as
CHUNK_ELEMENTS = 1 << 20

Weights = Sequence[Sequence[float]]  # [P][K]
Call = Callable[[], None]
Provider = Callable[[Sequence[torch.Tensor], Weights, Sequence[torch.Tensor]], Call]


def stack_and_sum(sources: Sequence[torch.Tensor], weights: Weights, outs: Sequence[torch.Tensor]) -> Call:
    """The incumbent's way: all sources stacked, weights and products in the sources' dtype. Not exact."""

    def call() -> None:
        for of_output, out in zip(weights, outs, strict=True):
            stacked = torch.stack(list(sources))
            factors = torch.tensor(of_output, dtype=out.dtype, device=out.device)
            out.copy_((stacked * factors.view(-1, *[1] * out.dim())).sum(0))

    return call


def torch_chunked(sources: Sequence[torch.Tensor], weights: Weights, outs: Sequence[torch.Tensor]) -> Call:
    """The best that eager torch does: chunks small enough for the cache, accumulated in fp32 scratch."""
    device = outs[0].device
    total, product = (torch.empty(CHUNK_ELEMENTS, dtype=torch.float32, device=device) for _ in range(2))

    def sum_into(out: torch.Tensor, of_output: Sequence[float]) -> None:
        active, values = active_weights(of_output, len(sources))
        (first, first_weight), *others = zip([sources[k] for k in active], values.tolist(), strict=True)
        for begin in range(0, out.numel(), CHUNK_ELEMENTS):
            part = slice(begin, min(begin + CHUNK_ELEMENTS, out.numel()))
            count = part.stop - begin
            total[:count].copy_(first[part]).mul_(first_weight)
            for source, weight in others:
                total[:count].add_(product[:count].copy_(source[part]).mul_(weight))
            out[part] = total[:count]

    def call() -> None:
        for of_output, out in zip(weights, outs, strict=True):
            sum_into(out, of_output)

    return call


def ours(sources: Sequence[torch.Tensor], weights: Weights, outs: Sequence[torch.Tensor]) -> Call:
    grouped = GroupedWeightedSum([(sources, outs)])
    return lambda: grouped(weights)


def ours_one_by_one(sources: Sequence[torch.Tensor], weights: Weights, outs: Sequence[torch.Tensor]) -> Call:
    """One pass over the sources for every output: what several outputs at once are compared with."""
    calls = [ours(sources, [of_output], [out]) for of_output, out in zip(weights, outs, strict=True)]

    def call() -> None:
        for one in calls:
            one()

    return call


def providers(device: str, outputs: int) -> dict[str, Provider]:
    """By name; ours is "numba" on a CPU and "triton" on a GPU."""
    name = "numba" if device == "cpu" else "triton"
    if outputs > 1:
        return {f"{name}_one_by_one": ours_one_by_one, name: ours}
    return {"stack_and_sum": stack_and_sum, "torch_chunked": torch_chunked, name: ours}


def random_sources(count: int, elements: int, dtype: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(elements, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(count)]


def awkward_sources(count: int, elements: int, dtype: str, device: str) -> list[torch.Tensor]:
    """Uniform bit patterns of finite numbers, huge ones among them, after an eighth of -0.0 and one of subnormals."""
    generator = torch.Generator().manual_seed(0)
    word = WORDS[DTYPES[dtype].itemsize]
    least_normal = torch.tensor(torch.finfo(DTYPES[dtype]).tiny, dtype=DTYPES[dtype]).view(word)
    eighth = -(-elements // 8)
    sources = []
    for _ in range(count):
        info = torch.iinfo(word)
        bits = torch.randint(info.min, info.max + 1, (elements,), generator=generator, dtype=word)
        bits[eighth : 2 * eighth] %= least_normal
        values = bits.view(DTYPES[dtype])
        values[:eighth] = -0.0
        sources.append(torch.where(values.isfinite(), values, -0.0).to(device))
    return sources


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    word = WORDS[left.itemsize]
    return torch.equal(left.view(word), right.view(word))


def uneven_weights(count: int, outputs: int = 1) -> list[list[float]]:
    """Rows that sum to 1, each a rotation of the others."""
    row = [2 * (k + 1) / (count * (count + 1)) for k in range(count)]
    return [row[p % count :] + row[: p % count] for p in range(outputs)]


def poisoned_like(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [torch.full_like(tensor, float("nan")) for _ in range(count)]


def correctness_gate(device: str) -> list[str]:
    """What is not bit-equal to the reference on this device, among those that promise to be."""
    failures = []
    for dtype in DTYPES:
        for count, elements in (
            (1, 1),
            (2, 4097),
            (3, 100_003),
            (5, CHUNK_ELEMENTS + 1),
            (65, 999),
            (300, 999),
        ):
            for make in (random_sources, awkward_sources):
                sources = make(count, elements, dtype, device)
                one_hot = [1.0] + [0.0] * (count - 1)
                for weights in (uneven_weights(count), [one_hot], [one_hot, *uneven_weights(count, 3)]):
                    for name, provider in providers(device, len(weights)).items():
                        outs = poisoned_like(sources[0], len(weights))
                        provider(sources, weights, outs)()
                        if name != "stack_and_sum" and not _equal_reference(sources, weights, outs):
                            failures.append(
                                f"{name} on {device}, {dtype}, {len(weights)} of {count} x {elements}"
                            )
    return failures + _mixed_launch(device)


def _equal_reference(sources: Sequence[torch.Tensor], weights: Weights, outs: Sequence[torch.Tensor]) -> bool:
    return all(
        same_bits(out, reference.weighted_sum(sources, of_output))
        for of_output, out in zip(weights, outs, strict=True)
    )


def _mixed_launch(device: str) -> list[str]:
    """Every dtype, length and alignment at once, with the greatest number of outputs."""
    groups = []
    for dtype in DTYPES:
        for elements, shift in ((1, 0), (1, 1), (4096, 0), (100_003, 0), (70_001, 3)):
            sources = [s[shift:] for s in awkward_sources(4, elements + shift, dtype, device)]
            outs = [
                whole[shift:]
                for whole in poisoned_like(torch.cat([sources[0], sources[0][:shift]]), MAX_OUTPUTS)
            ]
            groups.append((sources, [out[: sources[0].numel()] for out in outs]))
    weights = uneven_weights(4, MAX_OUTPUTS)
    weights[1] = [0.0, 1.0, 0.0, -1.0]
    GroupedWeightedSum(groups)(weights)
    good = all(_equal_reference(sources, weights, outs) for sources, outs in groups)
    return [] if good else [f"one launch of mixed dtypes and alignments on {device}"]
