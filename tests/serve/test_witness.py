"""What a worker can see of a module after a swap, where the module's weight went into another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mergemix.serve.transforms import Transforms
from mergemix.serve.vllm_worker import Witness


class Plain:
    """As vLLM's method of a latent attention's projection on CPU: computes with the parameter, packs nothing."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.cpu_linear(x, layer.weight, bias)


class Projection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant_method = Plain()
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)


class PackingAttention(nn.Module):
    """Packs its projection's weight for itself and empties it, as vLLM's latent attention with AMX."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Projection()
        self.packed: torch.Tensor | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.packed = self.inner.weight.data.t().to(act_dtype).contiguous()
        self.inner.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def swapped(forget: str = "") -> list[str]:
    """Problems of a model whose projection was rewritten and processed again. forget: a module that is left out."""
    model = nn.Module()
    model.attention = PackingAttention()
    raw = model.attention.inner.weight.data
    transforms = Transforms(model)
    model.attention.inner.quant_method.process_weights_after_loading(model.attention.inner)
    model.attention.process_weights_after_loading(torch.float32)
    written = {raw.untyped_storage().data_ptr(): raw.untyped_storage().nbytes()}
    assert transforms.settle(written, torch.float32) == []
    assert [entry.name for entry in transforms.modules] == ["attention.inner", "attention"]
    raw.copy_(torch.randn(4, 3))
    witnesses = [Witness(entry) for entry in transforms.modules]
    if forget != "attention":
        transforms.reprocess()
        assert torch.equal(model.attention.packed, raw.t())
    return [problem for witness in witnesses for problem in witness.problems()]


def test_a_projection_whose_weight_went_into_the_attention_layer_is_not_asked_to_compute() -> None:
    assert swapped() == []


def test_an_attention_layer_that_kept_its_old_copy_is_still_noticed() -> None:
    assert swapped(forget="attention") == ["attention.packed: it was not made anew from the new weights"]


class Broken(Plain):
    """Packs the weight for the layer itself, where `packs`, and then cannot compute."""

    def __init__(self, packs: bool) -> None:
        self.packs = packs

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.packs:
            layer.packed = layer.weight.data.t().contiguous()
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            layer.weight.data.neg_()

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("no kernel")


@pytest.mark.parametrize("packs", [True, False])
def test_a_module_with_weights_of_its_own_must_compute(packs: bool) -> None:
    layer = Projection()
    layer.quant_method = Broken(packs)
    raw = layer.weight.data
    transforms = Transforms(layer)
    layer.quant_method.process_weights_after_loading(layer)
    transforms.settle({raw.untyped_storage().data_ptr(): raw.untyped_storage().nbytes()}, torch.float32)
    [entry] = transforms.modules
    raw.copy_(torch.randn(4, 3))
    witness = Witness(entry)
    transforms.reprocess()
    with pytest.raises(RuntimeError, match="no kernel"):
        witness.problems()
