"""Hessian-vector products against an explicit Hessian."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergemix.checkpoints.family import open_family
from mergemix.mixture import Mixture
from mergemix.preflight.curvature import measure_curvature
from mergemix.preflight.models import load_model
from mergemix.preflight.texts import Snippet
from tests.serve.tiny_models import make_family

TEXTS = {
    "math": (Snippet((1, 5, 2, 7, 3), 1), Snippet((2, 4, 4), 2)),
    "code": (Snippet((6, 6, 1, 0, 3, 2), 3),),
    "web": (Snippet((3, 1), 1), Snippet((0, 7, 7, 7), 1)),
}


def smallest_llama() -> Any:
    """One layer and tied embeddings, 260 parameters in fp64."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=2, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def explicit(
    model: Any, texts: dict[str, tuple[Snippet, ...]]
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Losses, gradients [K, P] and Hessians [K, P, P], from the loss as a function of one flat vector."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    point = torch.cat([parameter.flatten() for parameter in model.parameters()])

    def loss_of(domain: str) -> Any:
        def loss(flat: torch.Tensor) -> torch.Tensor:
            parts = flat.split([shape.numel() for shape in shapes.values()])
            named = {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts, strict=True)}
            scored = []
            for snippet in texts[domain]:
                ids = torch.tensor([snippet.ids])
                logits = torch.func.functional_call(
                    model, named, kwargs={"input_ids": ids, "use_cache": False}
                ).logits
                logprobs = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                scored.append(logprobs[snippet.num_read - 1 :])
            return -torch.cat(scored).mean()

        return loss

    gradients = [torch.autograd.functional.jacobian(loss_of(name), point) for name in texts]
    hessians = [torch.autograd.functional.hessian(loss_of(name), point, vectorize=True) for name in texts]
    losses = {name: loss_of(name)(point).item() for name in texts}
    return losses, torch.stack(gradients).numpy(), torch.stack(hessians).numpy()


def test_it_equals_an_explicit_hessian() -> None:
    model = smallest_llama()
    before = [parameter.clone() for parameter in model.parameters()]
    found = measure_curvature(model, TEXTS)
    losses, gradients, hessians = explicit(model, TEXTS)
    norms = np.linalg.norm(gradients, axis=1)
    stretch = np.array(
        [[np.linalg.norm(h @ g) / n for g, n in zip(gradients, norms, strict=True)] for h in hessians]
    )

    assert found.names == tuple(TEXTS)
    np.testing.assert_allclose(found.losses, list(losses.values()), rtol=1e-6)
    np.testing.assert_allclose(found.gradient_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(found.cosines, gradients @ gradients.T / np.outer(norms, norms), atol=1e-6)
    # transformers computes norms in fp32 whatever the model is in.
    np.testing.assert_allclose(found.gamma, stretch / np.diag(stretch)[:, None], rtol=1e-6)
    assert np.ptp(found.gamma) > 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_real_checkpoints_can_be_differentiated_twice(tmp_path: Path, arch: Any) -> None:
    """In fp32, from bf16 files; of an MoE model too, whose experts are partly without any token."""
    paths = make_family(tmp_path, arch, experts=1)
    family = open_family(str(paths["base"]), {"math": str(paths["math"])})
    model = load_model(family, Mixture.base_only(family.names), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    found = measure_curvature(model, TEXTS)
    assert np.isfinite(found.gamma).all()
    assert np.diag(found.gamma).tolist() == [1.0] * 3
    assert min(map(min, found.gamma)) > 0
