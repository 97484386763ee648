"""Weighted sums of torch tensors, by the device they live on."""

from collections.abc import Iterator, Sequence

import torch

from mergemix_kernels.weights import MAX_SOURCES, active_weights

DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Elements of a strided group that are gathered at a time: bounds the temporaries, per source, to 4 MiB of fp32.
PIECE_ELEMENTS = 1 << 20


def _check_group(sources: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    if not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"the number of sources must be from 1 to {MAX_SOURCES}, but got {len(sources)}")
    if out.dtype not in DTYPE_NAMES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPE_NAMES))}, but got {out.dtype}")
    for k, source in enumerate(sources):
        for rule in ("dtype", "shape", "device"):
            if getattr(source, rule) != getattr(out, rule):
                raise ValueError(
                    f"source {k} and out must have the same {rule}, "
                    f"but got {getattr(source, rule)} and {getattr(out, rule)}"
                )


def _flatten(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """1-D views of all tensors in one common order of elements, or None where only a copy could be flat.

    Tensors that are dense and laid out alike (all transposed, say) qualify.
    """
    order = sorted(range(tensors[-1].dim()), key=lambda d: tensors[-1].stride(d), reverse=True)
    permuted = [tensor.permute(order) for tensor in tensors]
    if not all(tensor.is_contiguous() for tensor in permuted):
        return None
    return [tensor.view(-1) for tensor in permuted]


def _pieces(tensors: Sequence[torch.Tensor]) -> Iterator[Sequence[torch.Tensor]]:
    """Matching views that cover all tensors, each of at most PIECE_ELEMENTS elements."""
    numel = tensors[-1].numel()
    if numel <= PIECE_ELEMENTS:
        yield tensors
        return
    dim = max(range(tensors[-1].dim()), key=lambda d: tensors[-1].shape[d])
    length = tensors[-1].shape[dim]
    step = max(1, PIECE_ELEMENTS * length // numel)
    for part in zip(*(tensor.split(step, dim) for tensor in tensors), strict=True):
        yield from _pieces(part)


def _sum_flat_on_cpu(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    from mergemix_kernels import cpu

    def as_array(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
        return (tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint16)).numpy()

    cpu.weighted_sum([as_array(s) for s in sources], weights, as_array(out), DTYPE_NAMES[out.dtype])


def _sum_flat_on_gpu(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    from mergemix_kernels import triton_kernels

    triton_kernels.GroupedWeightedSum([(sources, out)])(weights)


def _sum_flat(device: torch.device):  # type: ignore[no-untyped-def]
    if device.type == "cpu":
        return _sum_flat_on_cpu
    if device.type == "cuda":
        return _sum_flat_on_gpu
    raise ValueError(f"tensors must be on a CPU or a GPU that Triton can use, but got device {device}")


def weighted_sum(sources: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """out = sum of weights[k] * sources[k], bit-equal to `reference.weighted_sum`.

    Sources (1 to 64) and `out` share shape, dtype (bf16, fp16 or fp32) and device; strides are free.
    `out` may be one of the sources; it must not overlap one in part. Sources of weight zero are not read.

    Raises ValueError where these do not hold, and for weights that `active_weights` refuses.
    """
    _check_group(sources, out)
    active, _ = active_weights(weights, len(sources))
    used = [weights[k] for k in active]
    sum_flat = _sum_flat(out.device)
    tensors = [sources[k].detach() for k in active] + [out.detach()]
    flat = _flatten(tensors)
    if flat is not None:
        sum_flat(flat[:-1], used, flat[-1])
        return
    for *parts, target in _pieces(tensors):
        result = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        sum_flat([part.contiguous().view(-1) for part in parts], used, result.view(-1))
        target.copy_(result)


class GroupedWeightedSum:
    """The same weighted sum over many groups of tensors at once, replayed with new weights each call.

    Args:
        groups: (sources, out) pairs as for `weighted_sum`. All have the same number of sources and one
            device; dtype, shape and strides may differ between groups. The tensors are kept, and must
            keep their storage: their addresses are taken once.

    Raises ValueError where this does not hold.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]]) -> None:
        for sources, out in groups:
            _check_group(sources, out)
            if len(sources) != len(groups[0][0]) or out.device != groups[0][1].device:
                raise ValueError(
                    "all groups must have one number of sources and one device, "
                    f"but got {len(groups[0][0])} on {groups[0][1].device} and {len(sources)} on {out.device}"
                )
        self._groups = [(tuple(sources), out) for sources, out in groups]

    def __call__(self, weights: Sequence[float]) -> None:
        """Write every out. ValueError for weights that `active_weights` refuses."""
        for sources, out in self._groups:
            weighted_sum(sources, weights, out)
