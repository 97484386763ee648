"""Finding, restoring and repeating what is done to modules after loading, on modules that do what vLLM's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mergemix.errors import EngineError
from mergemix.serve.transforms import Transforms, keep_addresses, marks
from mergemix.serve.vllm_worker import Witness


class Packing:
    """Keeps a packed copy in a closure and empties the parameter, as vLLM's linear layers on CPU; bias to fp32."""

    def process_weights_after_loading(self, layer: Any) -> None:
        packed = layer.weight.data.t().contiguous()
        layer.cpu_linear = lambda x: x @ packed
        if layer.bias is not None:
            layer.bias.data = layer.bias.to(torch.float32)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.cpu_linear(x)


class OnceOnly(Packing):
    """Does nothing the second time, like vLLM's fused experts."""

    def __init__(self) -> None:
        self.kernel: object | None = None

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.kernel is None:
            self.kernel = object()
            layer.weight = nn.Parameter(layer.weight.data.flip(1).contiguous(), requires_grad=False)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ layer.weight.flip(1).t()


class Inplace(Packing):
    """Rearranges the parameter in its own storage."""

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight.data.copy_(layer.weight.data.flip(0).clone())

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ layer.weight.flip(0).t()


class Untouched(Packing):
    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ layer.weight.t()


class Layer(nn.Module):
    def __init__(self, method: Packing, bias: bool = False) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False) if bias else None


class Attention(nn.Module):
    """Keeps a product of the weight of a layer inside it, like MLA."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(Untouched())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.product = (self.inner.weight.data * 2).to(act_dtype)


class Latent(nn.Module):
    """Views of the weight of a layer inside it, and copies into what it made before, like MLA on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(Untouched())

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.view = nn.Parameter(self.inner.weight.data.t(), requires_grad=False)
        wide = self.inner.weight.data.double()
        if hasattr(self, "copied"):
            self.copied.data.copy_(wide)
        else:
            self.copied = nn.Parameter(wide, requires_grad=False)


class Helper:
    """Packs on behalf of an attention layer, which then empties the layer inside it, like MLA with AMX."""

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None: ...

    def pack(self, weight: torch.Tensor) -> None:
        if not hasattr(self, "packed"):
            self.packed = weight.flip(0).contiguous()


class Helped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer(Untouched())
        self.impl = Helper()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.impl.pack(self.inner.weight.data)
        self.inner.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = Layer(Packing(), bias=True)
        self.once = Layer(OnceOnly())
        self.inplace = Layer(Inplace())
        self.untouched = Layer(Untouched())
        self.attention = Attention()
        self.embedding = Layer(Untouched())
        self.head = Layer(Packing())
        self.head.weight = self.embedding.weight  # tied


def load(model: nn.Module) -> tuple[Transforms, list[torch.Tensor], list[str]]:
    """Process as vLLM does after loading; returns the raw storages too."""
    transforms = Transforms(model)
    raw = [entry.data for entry in transforms.raw]
    for module in model.modules():
        if hasattr(module, "quant_method"):
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, (Attention, Latent, Helped)):
            module.process_weights_after_loading(torch.float32)
    written = {data.untyped_storage().data_ptr(): data.untyped_storage().nbytes() for data in raw}
    return transforms, raw, transforms.settle(written, torch.float32)


def test_transformed_modules_are_found_by_what_changed_and_the_others_left_alone() -> None:
    model = Model()
    transforms, _, problems = load(model)
    assert problems == []
    assert [entry.name for entry in transforms.modules] == ["packed", "once", "inplace", "head", "attention"]


def test_after_each_swap_every_layer_computes_with_its_new_weights() -> None:
    model = Model()
    transforms, raw, _ = load(model)
    untouched = model.untouched.weight
    for seed in range(3):
        fresh = torch.Generator().manual_seed(seed)
        values = [torch.randn(data.shape, generator=fresh).to(data.dtype) for data in raw]
        for data, value in zip(raw, values, strict=True):
            data.copy_(value)
        wanted = {id(entry.module): entry.data.clone() for entry in transforms.raw if entry.name == "weight"}
        transforms.reprocess()
        x = torch.randn(2, 3)
        for module in model.modules():
            if isinstance(module, Layer):
                given = module.quant_method.apply(module, x)
                torch.testing.assert_close(given, x @ wanted[id(module)].t())
        assert torch.equal(model.attention.product, model.attention.inner.weight * 2)
        assert model.packed.bias is not None
        assert model.packed.bias.dtype == torch.float32
        assert torch.equal(model.packed.bias, values[1].float())
    assert model.untouched.weight is untouched


def test_a_module_that_was_not_made_anew_is_reported() -> None:
    model = Model()
    transforms, raw, _ = load(model)
    entries = transforms.modules
    for data in raw:
        data.mul_(3)
    transforms.modules = [entry for entry in entries if entry.name != "packed"]
    witnesses = {entry.name: Witness(entry) for entry in entries}
    transforms.reprocess()
    problems = {name: witness.problems() for name, witness in witnesses.items()}
    assert len(problems.pop("packed")) == 3  # the old closure, the old bias, and the old columns
    assert not any(problems.values())


@pytest.mark.parametrize("kind", [Latent, Helped])
def test_what_an_attention_layer_made_of_weights_inside_it_is_made_anew(kind: type[nn.Module]) -> None:
    model: Any = nn.Module()
    model.attention = kind()
    transforms, raw, problems = load(model)
    assert problems == []
    for seed in range(3):
        value = torch.randn(raw[0].shape, generator=torch.Generator().manual_seed(seed))
        raw[0].copy_(value)
        witnesses = [Witness(entry) for entry in transforms.modules if entry.name == "attention"]
        assert len(witnesses) == 1
        transforms.reprocess([entry for entry in transforms.modules if entry.name == "attention"])
        assert [problem for witness in witnesses for problem in witness.problems()] == []
        if kind is Latent:
            assert torch.equal(model.attention.view, value.t())
            assert torch.equal(model.attention.copied, value.double())
        else:
            assert torch.equal(model.attention.impl.packed, value.flip(0))
            assert model.attention.inner.weight.numel() == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda model: setattr(model.untouched, "weight", nn.Parameter(torch.ones(4, 3))), None),
        (lambda model: delattr(model.untouched, "quant_method"), "cannot be repeated"),
    ],
)
def test_a_change_that_cannot_be_repeated_is_a_problem(
    spoil: Callable[[Any], None], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    original = Attention.process_weights_after_loading

    def also_spoil(self: Attention, act_dtype: torch.dtype) -> None:
        original(self, act_dtype)
        spoil(model)
        model.untouched.weight = nn.Parameter(model.untouched.weight.data * 2, requires_grad=False)

    monkeypatch.setattr(Attention, "process_weights_after_loading", also_spoil)
    _, _, problems = load(model)
    assert (reason is None) == (problems == [])
    assert all(reason and reason in problem for problem in problems)


def test_a_model_that_processes_all_its_weights_is_a_problem() -> None:
    class Whole(Model):
        def process_weights_after_loading(self) -> None:
            pass

    _, _, problems = load(Whole())
    assert any("Whole" in problem for problem in problems)


def test_addresses_that_graphs_captured_are_kept() -> None:
    model = Model()
    transforms, raw, _ = load(model)
    entry = next(entry for entry in transforms.modules if entry.name == "once")
    product = next(entry for entry in transforms.modules if entry.name == "attention")
    live, held = model.once.weight.data_ptr(), model.attention.product.data_ptr()
    previous = {each.name: marks(each.module) for each in transforms.modules}
    for data in raw:
        data.mul_(3)
    transforms.reprocess()
    assert model.once.weight.data_ptr() != live
    keep_addresses(entry, previous["once"])
    keep_addresses(product, previous["attention"])
    assert (model.once.weight.data_ptr(), model.attention.product.data_ptr()) == (live, held)
    torch.testing.assert_close(model.once.weight.flip(1), entry.raw[0].data)
    torch.testing.assert_close(model.attention.product, model.attention.inner.weight * 2)

    model.attention.product = torch.ones(5)
    with pytest.raises(EngineError, match="another shape"):
        keep_addresses(product, previous["attention"])
