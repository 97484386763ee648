"""The lazy merged tensor: what vLLM's own weight loaders are fed with.

A `LazyMerge` looks like one tensor of a checkpoint. It carries the same tensor of every operand instead, applies
each view operation (slice, narrow, unbind, transpose ...) to all of them, and becomes numbers only when a loader
copies it into a parameter. So the recorder learns which slice of which parameter comes from which slice of the
operands, without a word about architectures, fused layouts or tensor-parallel sharding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint tensor that a lazy tensor is a view of.

    classes: one number per operand; operands with the same number hold bitwise equal tensors.
    """

    name: str
    classes: tuple[int, ...]


class Recorder(Protocol):
    """Who is told when a lazy tensor becomes numbers."""

    def copied(self, destination: torch.Tensor, lazy: LazyMerge) -> None:
        """Write the merge into `destination`, with `copy_`'s broadcasting and conversion, and remember it."""

    def materialised(self, lazy: LazyMerge, operation: str) -> torch.Tensor:
        """The merge as a plain tensor, for an operation that cannot be replayed with other weights."""


class LazyMerge(torch.Tensor):
    """Equal views of one tensor of every operand; shape, strides and dtype are theirs."""

    origin: Origin
    views: tuple[torch.Tensor, ...]
    recorder: Recorder

    @staticmethod
    def __new__(cls, origin: Origin, views: Sequence[torch.Tensor], recorder: Recorder) -> LazyMerge:
        first = views[0]
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, first.shape, strides=first.stride(), dtype=first.dtype, device=first.device
        )

    def __init__(self, origin: Origin, views: Sequence[torch.Tensor], recorder: Recorder) -> None:
        self.origin = origin
        self.views = tuple(views)
        self.recorder = recorder

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"LazyMerge({self.origin.name!r}, {tuple(self.shape)}, {self.dtype}, {len(self.views)} operands)"
        )

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
            outs = [func(view, *args[1:], **kwargs) for view in args[0].views]
            first = outs[0][0] if isinstance(outs[0], (list, tuple)) else outs[0]
            if (
                first.dtype == args[0].dtype
            ):  # not where bits are read as another type: their sum means nothing
                return _rewrap(args[0], outs)

        def plain(value: Any) -> Any:
            return value.recorder.materialised(value, str(func)) if isinstance(value, LazyMerge) else value

        return func(*tree_map(plain, tuple(args)), **tree_map(plain, kwargs))


def _rewrap(lazy: LazyMerge, outs: list[Any]) -> LazyMerge | list[LazyMerge]:
    def wrap(views: Sequence[torch.Tensor]) -> LazyMerge:
        return LazyMerge(lazy.origin, views, lazy.recorder)

    if isinstance(outs[0], (list, tuple)):
        return [wrap(views) for views in zip(*outs, strict=True)]
    return wrap(outs)


def _is_view(func: Any) -> bool:
    return any(arg.alias_info is not None and not arg.alias_info.is_write for arg in func._schema.arguments)


def _writes_to_lazy(func: Any, args: Sequence[Any]) -> bool:
    written = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return any(isinstance(leaf, LazyMerge) for leaf in tree_flatten(written)[0])
