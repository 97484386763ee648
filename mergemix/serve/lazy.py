"""The lazy merged tensor: what vLLM's own weight loaders are fed with.

A `LazyMerge` looks like one tensor of a checkpoint. It holds no numbers, only which elements of the tensor it stands
for: each view operation (slice, narrow, unbind, transpose ...) is applied to that, and it becomes numbers only when a
loader copies it into a parameter. So the recorder learns which slice of which parameter comes from which slice of
the operands' tensors, without a word about architectures, fused layouts or tensor-parallel sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_map

from mergemix.checkpoints.adapter import LowRankDelta
from mergemix.checkpoints.header import TensorInfo
from mergemix.serve.dtypes import TORCH_DTYPES

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint tensor that a lazy tensor is a view of.

    tensors: where each operand has it, all of one shape, to be read as the first one's dtype; of an adapter that has
    none of its own, the base's. classes: one number per operand, the position of the first one whose tensor is bitwise
    equal. holders: the operands that have one of their own; empty where all have. deltas: what adapters add to it, each
    with its operand.
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    classes: tuple[int, ...]
    holders: tuple[int, ...] = ()
    deltas: tuple[tuple[int, LowRankDelta], ...] = ()


class Recorder(Protocol):
    """Who is told when a lazy tensor becomes numbers."""

    def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
        """Write the merge into `destination`, with `copy_`'s broadcasting and conversion, and remember it."""

    def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
        """The merge as a plain tensor, for an operation that cannot be replayed with other weights."""


class LazyMerge(torch.Tensor):
    """A view of one tensor of every operand.

    elements: a tensor without memory (device "meta"), whose offset, shape and strides say which elements of the
    contiguous checkpoint tensor these are.
    """

    origin: Origin
    elements: torch.Tensor
    recorder: Recorder

    @staticmethod
    def __new__(cls, origin: Origin, elements: torch.Tensor, recorder: Recorder) -> LazyMerge:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elements.shape,
            strides=elements.stride(),
            dtype=elements.dtype,
            device=torch.device("cpu"),
        )

    def __init__(self, origin: Origin, elements: torch.Tensor, recorder: Recorder) -> None:
        self.origin = origin
        self.elements = elements
        self.recorder = recorder

    @classmethod
    def whole(cls, origin: Origin, recorder: Recorder) -> LazyMerge:
        first = origin.tensors[0]
        elements = torch.empty(first.shape, dtype=TORCH_DTYPES[first.dtype], device="meta")
        return cls(origin, elements, recorder)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        operands = len(self.origin.classes)
        return f"LazyMerge({self.origin.name!r}, {tuple(self.shape)}, {self.dtype}, {operands} operands)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """View operations stay lazy, `copy_` into a plain tensor is recorded, the rest is materialised.

        Raises TypeError for an operation that writes into a lazy tensor: the write would be lost.
        """
        kwargs = dict(kwargs or {})
        if func is aten.copy_.default and not isinstance(args[0], LazyMerge):
            args[1].recorder.copied(args[0], args[1])
            return args[0]
        if _writes_to_lazy(func, args):
            raise TypeError(
                f"{func} writes into a checkpoint tensor while it is loaded, which a merge cannot follow"
            )
        if _is_view(func) and isinstance(args[0], LazyMerge):
            out = func(args[0].elements, *args[1:], **kwargs)
            first = out[0] if isinstance(out, (list, tuple)) else out
            # Not where bits are read as another type: their sum means nothing.
            if first.dtype == args[0].dtype:
                return _rewrap(args[0], out)

        def plain(value: Any) -> Any:
            return value.recorder.materialised(value, str(func)) if isinstance(value, LazyMerge) else value

        return func(*tree_map(plain, tuple(args)), **tree_map(plain, kwargs))


def _rewrap(lazy: LazyMerge, out: Any) -> LazyMerge | list[LazyMerge]:
    if isinstance(out, (list, tuple)):
        return [LazyMerge(lazy.origin, view, lazy.recorder) for view in out]
    return LazyMerge(lazy.origin, out, lazy.recorder)


def _is_view(func: Any) -> bool:
    return any(arg.alias_info is not None and not arg.alias_info.is_write for arg in func._schema.arguments)


def _writes_to_lazy(func: Any, args: Sequence[Any]) -> bool:
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(isinstance(leaf, LazyMerge) for leaf in tree_flatten(written)[0])
