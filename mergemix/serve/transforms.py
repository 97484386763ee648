"""Modules whose weights vLLM transforms after loading: found by what changed, brought back, transformed again.

vLLM may replace a parameter (packed, padded, emptied), keep a packed copy in a closure or an attribute, or rewrite
it in place. Nothing here knows names of layers: the state of every module is compared before and after vLLM's
post-load processing. A module that processing left alone is rewritten in place by the swap plan and needs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mergemix.errors import EngineError

SAMPLED_ELEMENTS = 4096
_TORCH_STATE = frozenset({"_parameters", "_buffers", "_modules"})
_METHOD = "quant_method"
_PROCESS = "process_weights_after_loading"

# ("_parameters" | "_buffers" | "" or the attribute that holds a helper object: "quant_method", "impl" ..., attribute)
Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Mark:
    """What an attribute held. The value is kept alive, so that its address or id cannot be given to another."""

    value: Any
    token: Any


@dataclass(frozen=True, eq=False)
class Raw:
    """A parameter as loaded. data: an alias of its storage, which stays when vLLM replaces or empties it."""

    module: nn.Module
    name: str
    parameter: nn.Parameter
    data: torch.Tensor
    sample: torch.Tensor

    def is_live(self) -> bool:
        """The module still uses this very storage, in this layout."""
        live = self.module._parameters.get(self.name)
        return live is not None and _token(live.data) == _token(self.data)

    def is_unchanged(self) -> bool:
        return torch.equal(_sample(self.data), self.sample)


@dataclass
class Transformed:
    """A module that must be processed again after its raw parameters were rewritten.

    process: vLLM's own processing of it. before: its state as loaded. changed: what processing changed of it.
    raw: all of its own parameters, as loaded.
    """

    name: str
    module: nn.Module
    process: Callable[[], None]
    before: Mapping[Key, Mark]
    changed: frozenset[Key]
    raw: Sequence[Raw]


class Transforms:
    """The state of a model's modules: taken after its weights were loaded, compared after they were processed."""

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: (module, marks(module)) for name, module in model.named_modules()}
        self.raw = [
            Raw(module, name, parameter, parameter.data, _sample(parameter.data))
            for module, _ in self._before.values()
            for name, parameter in module._parameters.items()
            if parameter is not None and not parameter.is_meta
        ]
        self.on_cpu = all(raw.data.device.type == "cpu" for raw in self.raw)
        self.modules: list[Transformed] = []

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every parameter and buffer, as loaded."""
        yield from (raw.data for raw in self.raw)
        for module, _ in self._before.values():
            yield from (buffer for buffer in module._buffers.values() if buffer is not None)

    def settle(self, written: Mapping[int, int], act_dtype: torch.dtype) -> list[str]:
        """Find the modules that a swap must process again; returns why a swap would be wrong, if it would.

        written: bytes that a swap writes, by address of the storage. act_dtype: the model's dtype, which attention
        layers are processed with.
        """
        affected = {raw for raw in self.raw if raw.data.untyped_storage().data_ptr() in written}
        storages = {raw.data.untyped_storage().data_ptr() for raw in self.raw}
        layers, attention = [], []
        for name, (module, before) in self._before.items():
            if not affected.intersection(self._read_by(module)):
                continue
            after = marks(module)
            # A view of raw parameters (MLA's projections) is rewritten with them: nothing was made of the weights.
            changed = frozenset(
                key for key in _differences(before, after) if not _is_view(after.get(key), storages)
            )
            own = [raw for raw in self.raw if raw.module is module]
            if not self._derives(own, changed, after):
                continue
            if callable(getattr(getattr(module, _METHOD, None), _PROCESS, None)):
                layers.append(Transformed(name, module, _layer_process(module), before, changed, own))
            if name and _processes_itself(module):
                process = _attention_process(module, act_dtype)
                attention.append(Transformed(name, module, process, before, changed, own))
        self.modules = layers + attention  # vLLM's order: attention may read what a layer's processing made
        return self._problems(affected, written)

    def _read_by(self, module: nn.Module) -> Iterator[Raw]:
        """Parameters that processing this module reads: its own; an attention layer's (MLA) also those inside."""
        read = {id(child) for child in module.modules()} if _processes_itself(module) else {id(module)}
        return (raw for raw in self.raw if id(raw.module) in read)

    def _derives(self, own: Sequence[Raw], changed: frozenset[Key], after: Mapping[Key, Mark]) -> bool:
        """Whether processing made something of the weights that rewriting the raw parameters leaves stale."""
        if any(not raw.is_live() or not raw.is_unchanged() for raw in own):
            return True
        if any(isinstance(after[key].value, torch.Tensor) for key in changed if key in after):
            return True
        # On CPU packed copies hide in closures and handles. On a GPU such objects refer to the live parameters,
        # and captured graphs hold on to them: vLLM itself keeps them across weight updates.
        return bool(changed) and self.on_cpu

    def _problems(self, affected: set[Raw], written: Mapping[int, int]) -> list[str]:
        again = {id(entry.module) for entry in self.modules}
        problems = []
        for raw in self.raw:
            where = f"{raw.name} of {type(raw.module).__name__}"
            storage = raw.data.untyped_storage()
            if id(raw.module) not in again:
                if raw in affected and not (raw.is_live() and raw.is_unchanged()):
                    problems.append(f"{where}: vLLM transformed it in a way that cannot be repeated")
            elif not raw.is_unchanged() and written.get(storage.data_ptr(), 0) != storage.nbytes():
                problems.append(
                    f"{where}: vLLM transformed it in place, and a swap would not rewrite all of it"
                )
        model = self._before[""][0]
        if _processes_itself(model):
            problems.append(
                f"{type(model).__name__} processes all its weights after loading: that may not be repeatable"
            )
        return problems

    def reprocess(self, modules: Sequence[Transformed] | None = None) -> None:
        """Bring raw parameters back into transformed modules and let vLLM process them again.

        modules: some of `self.modules`, in their order; all of them by default. Those inside an attention layer
        come along with it, since it reads their raw parameters. Raises EngineError when a GPU's captured graphs
        would be left with stale addresses.
        """
        given = self.modules if modules is None else modules
        here = {id(entry.module) for entry in given}
        inside = {
            id(child)
            for entry in given
            if _processes_itself(entry.module)
            for child in entry.module.modules()
        }
        modules = [*(entry for entry in self.modules if id(entry.module) in inside - here), *given]
        previous = {entry.name: marks(entry.module) for entry in modules}
        for entry in modules:
            restore(entry, attributes=self.on_cpu)
        for entry in modules:
            entry.process()
            if not self.on_cpu:
                keep_addresses(entry, previous[entry.name])


def marks(module: nn.Module) -> dict[Key, Mark]:
    """The state of a module: its parameters, buffers and plain attributes, and those of its helpers."""
    state: dict[Key, Mark] = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in getattr(module, kind).items():
            state[kind, name] = _mark(None if tensor is None else tensor.data)
    for name, value in vars(module).items():
        if name not in _TORCH_STATE:
            state["", name] = _mark(value)
    for kind, helper in _helpers(module):
        for name, value in {**vars(helper), **vars(helper).get("_modules", {})}.items():
            if name not in _TORCH_STATE:
                state[kind, name] = _mark(value)
    return state


def restore(entry: Transformed, *, attributes: bool) -> None:
    """Give a module its raw parameters again and, with `attributes`, whatever else processing had changed."""
    module = entry.module
    for raw in entry.raw:
        raw.parameter.data = raw.data
        module._parameters[raw.name] = raw.parameter
    # Sorted: the module's own attributes, its helpers among them, come before those of the helpers.
    for kind, name in sorted(entry.changed) if attributes else ():
        if kind in ("_parameters", "_buffers"):
            # Processing copies into what it made the last time: then nobody could see that it was made anew.
            if (kind, name) not in entry.before:
                getattr(module, kind).pop(name, None)
            continue
        owner = getattr(module, kind) if kind else module
        if (kind, name) in entry.before:
            setattr(owner, name, entry.before[kind, name].value)
        elif hasattr(owner, name):
            delattr(owner, name)


def keep_addresses(entry: Transformed, previous: Mapping[Key, Mark]) -> None:
    """Copy what processing made into the tensors that were live before it, and put those back.

    Captured CUDA graphs read from their addresses. Raises EngineError where shape, dtype or strides differ.
    """
    module = entry.module
    for key, mark in marks(module).items():
        old = previous.get(key)
        if old is None or not isinstance(mark.value, torch.Tensor) or not isinstance(old.value, torch.Tensor):
            continue
        if mark.token == old.token:
            continue
        if mark.token[1:] != old.token[1:]:
            raise EngineError(
                f"{entry.name}.{key[1]}: processing the new weights gave another shape or layout"
            )
        old.value.copy_(mark.value)
        kind, name = key
        if kind == "_parameters":
            parameter = module._parameters[name]
            assert parameter is not None
            parameter.data = old.value
        elif kind == "_buffers":
            module._buffers[name] = old.value
        else:
            setattr(getattr(module, kind) if kind else module, name, old.value)


def _layer_process(module: nn.Module) -> Callable[[], None]:
    def process() -> None:
        module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
        # vLLM does the same after its own processing: new parameters are stamped with the global rank.
        update = getattr(module, "update_param_tp_status", None)
        if callable(update):
            update()

    return process


def _attention_process(module: nn.Module, act_dtype: torch.dtype) -> Callable[[], None]:
    return lambda: module.process_weights_after_loading(act_dtype)  # type: ignore[operator]


def _helpers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Objects that process a module's weights on its behalf, by attribute: quant_method, an attention's impl."""
    method = getattr(module, _METHOD, None)
    if hasattr(method, "__dict__"):
        yield _METHOD, method
    for name, value in vars(module).items():
        if value is not method and not isinstance(value, type) and _processes_itself(value):
            yield name, value


def _processes_itself(module: Any) -> bool:
    return callable(getattr(module, _PROCESS, None))


def _differences(before: Mapping[Key, Mark], after: Mapping[Key, Mark]) -> Iterator[Key]:
    for key in before.keys() | after.keys():
        if key not in before or key not in after or before[key].token != after[key].token:
            yield key


def _is_view(mark: Mark | None, storages: set[int]) -> bool:
    value = None if mark is None else mark.value
    if not isinstance(value, torch.Tensor) or value.numel() == 0 or value.is_meta:
        return False
    return value.untyped_storage().data_ptr() in storages


def _mark(value: Any) -> Mark:
    return Mark(value, _token(value))


def _token(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.data_ptr(), value.shape, value.stride(), value.dtype)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return (type(value), value)
    return id(value)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced elements; the odd step meets every column of a power-of-two layout."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS) | 1].clone()
