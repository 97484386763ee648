"""What runs inside every vLLM worker: swaps, and the evidence that they worked (called with collective_rpc)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch

from mergemix.errors import EngineError
from mergemix.mixture import Mixture
from mergemix.serve.copies import same_bits
from mergemix.serve.transforms import Mark, Transformed, Transforms, marks
from mergemix.serve.turns import in_turn

if TYPE_CHECKING:
    from mergemix.serve.swap_plan import Change, SwapPlan

PROBED_COLUMNS = 16
SAMPLED_MODULES = 4


class MergeWorker:
    """vLLM's `worker_extension_cls`; arguments and results are plain values, since they cross processes."""

    model_runner: Any
    vllm_config: Any
    model_config: Any

    def mergemix_describe(self) -> dict[str, Any]:
        """This rank's plan.

        bytes_written by a swap of everything, transformed modules, those of them of which only answers show whether
        they use new weights ("unseen"), uncovered bytes by name, problems, and "cache": the bytes of operands by the
        tier that they are assigned to, and of adapters' factors, which are always in memory.
        """
        loaded = self._mergemix_loaded()
        return {
            "tensors": len(loaded.plan.copies),
            "bytes_written": loaded.plan.nbytes,
            "transformed": [entry.name for entry in loaded.transforms.modules],
            "unseen": [entry.name for entry in loaded.transforms.modules if not _is_seen(entry)],
            "uncovered": dict(loaded.uncovered),
            "problems": list(loaded.problems),
            "cache": {**loaded.plan.cache.assigned, "factors": loaded.plan.factor_bytes},
        }

    def mergemix_mixture(self) -> str:
        """The key of the mixture that is live; "" where a swap failed or did not give it."""
        mixture = self._mergemix_loaded().mixture
        return "" if mixture is None else mixture.key()

    def mergemix_swap(self, key: str, check: str = "none") -> dict[str, Any]:
        """Make the live weights those of another mixture.

        key: of the mixture (Mixture.key). check: "none", "sample" or "all": how much of the weights is compared with
        the fp32 reference (see SwapPlan.mismatches). Unless "none", every module that is transformed again must have
        been made anew, and each of them, with "sample" a few, must compute with the new weights (see Witness).

        Returns seconds; process_s, the part of them in vLLM's own processing; bytes_read by tier; bytes_written;
        destinations and how many of them were skipped; problems, empty when all is well.
        Raises ConfigError for a mixture that the family cannot give, with nothing changed. Whatever else it raises, the
        weights are then mixed, and it refuses to swap again.
        """
        begin = time.perf_counter()
        loaded = self._mergemix_loaded()
        if loaded.mixed:
            raise EngineError("an earlier swap failed halfway: this engine must be rebuilt")
        plan = loaded.plan
        change = plan.change_to(Mixture.from_key(key))
        loaded.mixture, loaded.mixed = None, True
        loaded.swaps += 1
        with torch.no_grad(), self._mergemix_context():
            read = self.mergemix_write(plan, change)
            _wait_for_device()
            seconds = time.perf_counter() - begin
            problems = []
            modules = loaded.stale(plan.storages(change))
            if check != "none":
                bad = plan.mismatches(sample=check == "sample")
                problems += [f"{name}: the live weights differ from the reference" for name in bad]
            witnesses = _witnesses(modules, check, loaded.swaps)
            begin = time.perf_counter()
            self.mergemix_reprocess(loaded.transforms, modules)
            _wait_for_device()
            process_s = time.perf_counter() - begin
            problems += [problem for witness in witnesses for problem in witness.problems()]
        loaded.mixed = False
        if problems:
            plan.forget()
        else:
            loaded.mixture = change.mixture
        return {
            "seconds": seconds + process_s,
            "process_s": process_s,
            "bytes_read": read,
            "bytes_written": plan.bytes_written(change),
            "destinations": len(plan.moving),
            "skipped": change.skipped,
            "problems": problems,
        }

    def mergemix_close(self) -> None:
        """Free what outlives this process, the shared memory of the cache. The engine is not used any more."""
        loaded = self._mergemix_loaded()
        loaded.mixture, loaded.mixed = None, True
        loaded.plan.close()

    def mergemix_compile_nothing(self) -> None:
        """vLLM compiles helpers of its sampler even with enforce_eager: 5 s at the first request, no gain on a CPU."""
        torch.compiler.set_stance("force_eager")

    def mergemix_write(self, plan: SwapPlan, change: Change) -> dict[str, int]:
        return plan.write(change)

    def mergemix_reprocess(self, transforms: Transforms, modules: Sequence[Transformed]) -> None:
        transforms.reprocess(modules)

    def _mergemix_loaded(self) -> Any:
        loaded = getattr(self.model_runner.get_model(), "mergemix", None)
        if loaded is None:
            raise EngineError("this engine was not loaded with load_format mergemix")
        return loaded

    @contextmanager
    def _mergemix_context(self) -> Iterator[None]:
        """What vLLM processes weights under when it loads."""
        from vllm.config import set_current_vllm_config

        from mergemix.serve.vllm_loader import default_dtype

        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(self.vllm_config))
            stack.enter_context(default_dtype(self.model_config.dtype))
            stack.enter_context(torch.device(self.vllm_config.device_config.device))
            yield


class Witness:
    """Looks at a transformed module between the rewriting of its raw weights and its processing, then again.

    What processing makes must have been made anew, and a linear layer must give back the very columns of its raw
    weight, which is all that can be seen from outside. computes: the latter, too, which reads all of the layer.
    """

    def __init__(self, entry: Transformed, *, computes: bool = True) -> None:
        self._entry = entry
        self._before = marks(entry.module)
        self._columns: torch.Tensor | None = None
        if not computes:
            return
        weights = _linear_weights(entry)
        if weights:
            generator = torch.Generator(device="cpu").manual_seed(0)  # vLLM's own generator stays as it is
            chosen = torch.randperm(weights[0].shape[1], generator=generator, device="cpu")[:PROBED_COLUMNS]
            self._columns = chosen.to(weights[0].device)
            self._inputs = one_hot(self._columns, weights[0].shape[1], weights[0].dtype)
            self._expected = weights[0][:, self._columns].t().contiguous()

    def problems(self) -> list[str]:
        """Why the module does not use its new weights; empty when it does, as far as can be seen."""
        entry, after = self._entry, marks(self._entry.module)
        on_cpu = all(raw.data.device.type == "cpu" for raw in entry.raw)
        found = [
            f"{entry.name}.{key[1]}: it was not made anew from the new weights"
            for key in entry.changed
            if on_cpu and key in self._before and key in after and _is_stale(self._before[key], after[key])
        ]
        outputs = self._outputs()
        # Adding 0.0 turns -0.0, which a kernel may give or not, into 0.0.
        if outputs is not None and not same_bits(outputs + 0.0, self._expected + 0.0):
            found.append(f"{entry.name}: it does not compute with its new weights")
        return found

    def _outputs(self) -> torch.Tensor | None:
        """What the module makes of the chosen columns' inputs; None where that cannot be asked.

        Its weight may have been packed into another module, an attention layer's for example, and left empty: then
        nobody can compute with it, rightly or wrongly. Where its own processing had made something to compute with,
        or its weight is there, it must compute, and raises what it raises.
        """
        if self._columns is None:
            return None
        module: Any = self._entry.module
        try:
            outputs = module.quant_method.apply(module, self._inputs, bias=None)
        except Exception:
            weight = getattr(module, "weight", None)
            if (weight is not None and weight.numel() > 0) or self._made_something():
                raise
            return None
        return outputs.to(self._expected.dtype)

    def _made_something(self) -> bool:
        """Whether processing had given the module itself anything but an emptied weight."""
        return any(
            key in self._before and _holds_weights(self._before[key].value) for key in self._entry.changed
        )


def _witnesses(modules: Sequence[Transformed], check: str, turn: int) -> list[Witness]:
    """turn: counts the swaps, since a sample looks at other modules each time."""
    if check == "none":
        return []
    chosen = set(range(len(modules)))
    if check == "sample":
        chosen = set(in_turn(len(modules), turn * SAMPLED_MODULES, SAMPLED_MODULES).tolist())
    return [Witness(entry, computes=i in chosen) for i, entry in enumerate(modules)]


def one_hot(columns: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs (len(columns), width) through which a linear layer shows these columns of its weight, exactly."""
    inputs = torch.zeros(len(columns), width, dtype=dtype, device=columns.device)
    inputs[torch.arange(len(columns), device=columns.device), columns] = 1
    return inputs


def _linear_weights(entry: Transformed) -> list[torch.Tensor]:
    """The raw weight of a linear layer that can be asked to compute; of anything else nothing."""
    if not hasattr(getattr(entry.module, "quant_method", None), "apply"):
        return []
    weights = [raw.data for raw in entry.raw if raw.name == "weight" and raw.data.dim() == 2]
    return [weight for weight in weights if weight.is_floating_point()]


def _is_seen(entry: Transformed) -> bool:
    """Whether a Witness can tell if the module was made anew. On a GPU what was made goes to where the old was."""
    return bool(_linear_weights(entry)) or all(raw.data.device.type == "cpu" for raw in entry.raw)


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_stale(before: Mark, after: Mark) -> bool:
    """Whether this is the same product of processing as before: a packed tensor, a closure, a kernel object."""
    value = after.value
    if not _holds_weights(value):
        return False
    return after.token == before.token if isinstance(value, torch.Tensor) else value is before.value


def _holds_weights(value: Any) -> bool:
    """Constants (numbers, classes, functions that close over nothing) hold no weights."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 0
    if value is None or isinstance(value, (bool, int, float, str, type, torch.dtype)):
        return False
    return not isinstance(value, (FunctionType, BuiltinFunctionType)) or bool(
        getattr(value, "__closure__", None)
    )
