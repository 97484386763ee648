"""Curvature at the base: does one domain's curvature act on another domain's direction?

Training on a mixture and merging experts differ, to second order, by terms H_k g_j (arXiv 2601.17858, section on why
merging works): H_k the Hessian of domain k's loss at the base, g_j domain j's gradient there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergemix.preflight.texts import Snippet, Texts

Tensors = tuple[torch.Tensor, ...]
COPIES = 5  # of the parameters, beside the 2 per domain: the model, a gradient with its graph, a product


@dataclass(frozen=True)
class Curvature:
    """names: K domains. losses: nats a token, at the base. gradient_norms: |g_k|. cosines: [K][K] of the gradients.

    gamma: [K][K], (|H_k g_j| / |g_j|) / (|H_k g_k| / |g_k|) in row k and column j; 1 on the diagonal.
    """

    names: tuple[str, ...]
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]
    gamma: tuple[tuple[float, ...], ...]


def memory_needed(num_parameters: int, num_domains: int) -> int:
    """Bytes for `measure_curvature` in fp32, without activations."""
    return 4 * num_parameters * (2 * num_domains + COPIES)


def measure_curvature(model: Any, texts: Texts) -> Curvature:
    """gamma and the gradients' cosines of all of a causal language model's parameters, from a little text.

    model: as `load_model` gives it, in fp32 at least; its weights are not changed. Every loss is the mean over the
    domain's scored tokens. Costs one gradient and K Hessian-vector products (double backward) per domain.
    """
    parameters = tuple(model.parameters())
    names = tuple(texts)
    model.requires_grad_(True)
    try:
        losses, gradients = zip(*(_gradient(model, parameters, texts[name]) for name in names), strict=True)
        norms = [_norm(gradient) for gradient in gradients]
        # |H_k g_j| / |g_j|
        stretch = [
            [
                _norm(product) / norm
                for product, norm in zip(
                    _products(model, parameters, texts[name], gradients), norms, strict=True
                )
            ]
            for name in names
        ]
    finally:
        model.requires_grad_(False)
    cosines = tuple(
        tuple(_dot(one, other) / (a * b) for other, b in zip(gradients, norms, strict=True))
        for one, a in zip(gradients, norms, strict=True)
    )
    gamma = tuple(tuple(value / row[k] for value in row) for k, row in enumerate(stretch))
    return Curvature(names, tuple(losses), tuple(norms), cosines, gamma)


def _gradient(model: Any, parameters: Tensors, snippets: Sequence[Snippet]) -> tuple[float, Tensors]:
    """The loss of a domain and its gradient."""
    total, gradient = 0.0, tuple(torch.zeros_like(parameter) for parameter in parameters)
    for loss in _losses(model, snippets):
        total += loss.item()
        for sum_, part in zip(gradient, _grad(loss, parameters), strict=True):
            sum_ += part
    return total, gradient


def _products(
    model: Any, parameters: Tensors, snippets: Sequence[Snippet], vectors: Sequence[Tensors]
) -> list[Tensors]:
    """The Hessian of a domain's loss times each of the vectors."""
    products = [tuple(torch.zeros_like(parameter) for parameter in parameters) for _ in vectors]
    for loss in _losses(model, snippets):
        gradient = _grad(loss, parameters, create_graph=True)
        for product, vector in zip(products, vectors, strict=True):
            along = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
            for sum_, part in zip(product, _grad(along, parameters, retain_graph=True), strict=True):
                sum_ += part
    return products


def _losses(model: Any, snippets: Sequence[Snippet]) -> Iterator[torch.Tensor]:
    """Each snippet's part of the mean loss a token."""
    total = sum(snippet.num_scored for snippet in snippets)
    for snippet in snippets:
        ids = torch.tensor([snippet.ids], device=next(model.parameters()).device)
        logits = model(input_ids=ids, use_cache=False).logits[0, snippet.num_read - 1 : -1]
        targets = ids[0, snippet.num_read :]
        yield torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / total


def _grad(
    value: torch.Tensor, parameters: Tensors, *, create_graph: bool = False, retain_graph: bool | None = None
) -> Tensors:
    # Experts of an MoE model that no token of the text was sent to have no gradient.
    return torch.autograd.grad(
        value,
        parameters,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _dot(one: Tensors, other: Tensors) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(one, other, strict=True))


def _norm(vector: Tensors) -> float:
    return _dot(vector, vector) ** 0.5
