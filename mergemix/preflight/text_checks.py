"""What a little text tells of a family in transformers itself: routers' choices, and curvature at the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from mergemix.checkpoints.family import Family
from mergemix.merge.resources import free_memory
from mergemix.mixture import Mixture
from mergemix.preflight.curvature import Curvature, measure_curvature, memory_needed
from mergemix.preflight.models import load_model
from mergemix.preflight.routing import agreement, chance_agreement, num_experts, router_choices
from mergemix.preflight.texts import Texts
from mergemix.preflight.verdict import Check, graded
from mergemix.units import size_text

# Share of a token's experts that base and model have in common, above what chance gives (0) and up to all (1).
ROUTING_DOUBTFUL, ROUTING_DISTRUSTED = 0.5, 0.2
# gamma: how much a domain's curvature turns another domain's direction, over its own.
CURVATURE_DOUBTFUL = 1.0

Stage = Callable[[str], None]


@dataclass
class Findings:
    """measured: by name, for programs. missing: by name, why something was not measured."""

    measured: dict[str, Any] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


def check_routing(family: Family, texts: Texts, stage: Stage) -> Findings:
    """Do experts and their uniform merge send tokens where the base (without one: the merge) sends them?

    routing: the agreement with it of each model, by router, and their mean; chance: what unrelated routers would agree.
    Not measured where one model does not fit in memory. Raises EngineError when transformers cannot make the model.
    """
    count = num_experts(family.template.config)
    if count is None:
        return Findings(missing={"routing": "the model has no mixture of experts"})
    if why := _too_little_memory(sum(tensor.nbytes for tensor in family.template.tensors.values())):
        return Findings(missing={"routing": why})
    mixtures = {name: Mixture.one_hot(family.names, name) for name in family.names}
    mixtures["uniform"] = Mixture.uniform(family.names)
    reference = "uniform" if family.base is None else "base"
    if family.base is not None:
        mixtures["base"] = Mixture.base_only(family.names)
    snippets = [snippet for each in texts.values() for snippet in each]

    def choices(name: str) -> Any:
        stage(f"routing: {name}")
        return router_choices(load_model(family, mixtures[name]), snippets)

    first = choices(reference)
    if not first:
        return Findings(missing={"routing": "transformers does not tell what this model's routers choose"})
    agreements = {name: agreement(first, choices(name)) for name in mixtures if name != reference}
    chance = chance_agreement(count, next(iter(first.values())).shape[1])
    means = {name: float(np.mean(list(found.values()))) for name, found in agreements.items()}
    routing = {
        "reference": reference,
        "experts": count,
        "chance": chance,
        "agreement": means,
        "by_router": agreements,
    }
    return Findings({"routing": routing}, [_routing_check(agreements, reference, chance)])


def _routing_check(agreements: Mapping[str, Mapping[str, float]], reference: str, chance: float) -> Check:
    """By the router that agrees least."""
    value, name, router = min(
        ((share - chance) / (1 - chance), name, router)
        for name, found in agreements.items()
        for router, share in found.items()
    )
    share = agreements[name][router]
    why = (
        f"{name} sends tokens to {share:.0%} of the same experts as the {reference} in {router}, the router that "
        f"agrees least (by chance {chance:.0%})"
    )
    verdict = graded(value, ROUTING_DOUBTFUL, ROUTING_DISTRUSTED)
    if verdict != "fine":
        why += ": experts are averaged that do not do the same work any more"
    return Check("routing", verdict, why, value, ROUTING_DOUBTFUL)


def check_curvature(family: Family, texts: Texts, stage: Stage) -> Findings:
    """The paper's gamma at the base. Not measured without a base, of one domain, or where memory does not suffice."""
    if family.base is None:
        return Findings(missing={"curvature": "it is measured at the base: give --base"})
    if len(texts) < 2:
        return Findings(missing={"curvature": "it compares domains: give --data of two or more"})
    if why := _too_little_memory(memory_needed(_num_parameters(family), len(texts))):
        return Findings(missing={"curvature": why})
    stage("curvature: gradients and Hessian-vector products at the base")
    model = load_model(family, Mixture.base_only(family.names), dtype=torch.float32)
    try:
        found = measure_curvature(model, texts)
    except (
        RuntimeError,
        ZeroDivisionError,
    ) as error:  # an operation that has no second derivative; out of memory
        return Findings(missing={"curvature": f"this model cannot be differentiated twice here: {error}"})
    if not np.isfinite([found.gamma, found.cosines]).all():
        return Findings(missing={"curvature": "gradients at the base are not finite"})
    return Findings({"curvature": _described(found)}, [_curvature_check(found)])


def _described(found: Curvature) -> dict[str, Any]:
    """By domain's name."""

    def table(rows: tuple[tuple[float, ...], ...]) -> dict[str, dict[str, float]]:
        return {
            name: dict(zip(found.names, row, strict=True))
            for name, row in zip(found.names, rows, strict=True)
        }

    plain = asdict(found)
    by_name = {key: dict(zip(found.names, plain[key], strict=True)) for key in ("losses", "gradient_norms")}
    return {**by_name, "cosines": table(found.cosines), "gamma": table(found.gamma)}


def _curvature_check(found: Curvature) -> Check:
    gamma = np.array(found.gamma)
    np.fill_diagonal(gamma, -np.inf)
    k, j = np.unravel_index(np.argmax(gamma), gamma.shape)
    value = float(gamma[k, j])
    verdict = graded(value, CURVATURE_DOUBTFUL, math.inf)
    why = f"the curvature of {found.names[k]} acts {value:.2g} times as strongly along {found.names[j]} as along itself"
    why += (
        ": to second order domains mostly disturb themselves"
        if verdict == "fine"
        else ": what training on both does to it, a merge does not show"
    )
    return Check("curvature", verdict, why, value, CURVATURE_DOUBTFUL)


def _num_parameters(family: Family) -> int:
    return sum(int(np.prod(tensor.shape)) for tensor in family.template.tensors.values())


def _too_little_memory(needed: int) -> str | None:
    free_bytes = _free_memory()
    if free_bytes is None or needed <= free_bytes:
        return None
    return f"it needs {size_text(needed)} of memory, and {size_text(free_bytes)} are free"


def _free_memory() -> int | None:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else free_memory()
