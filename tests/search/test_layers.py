"""Layer groups from what a user writes and the tensors that a model has."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.mixture import LayerGroup
from mergemix.search.layers import layer_groups

MODEL = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
PARTS = ("self_attn.q_proj.weight", "mlp.experts.0.up.weight", "mlp.experts.11.up.weight", "norm.weight")


def tensors(layers: int, prefix: str = "model.layers.") -> list[str]:
    return [*MODEL, *(f"{prefix}{layer}.{part}" for layer in range(layers) for part in PARTS)]


@given(st.integers(1, 40), st.data(), st.sampled_from(["model.layers.", "h.", "gpt_neox.layers.", "a.b.c."]))
def test_a_number_divides_the_layers_evenly(layers: int, data: st.DataObject, prefix: str) -> None:
    count = data.draw(st.integers(1, layers))
    names = tensors(layers, prefix)
    groups = [LayerGroup(patterns, (1.0,)) for patterns in layer_groups(str(count), names)]
    assert len(groups) == count
    held = [[name for name in names if group.holds(name)] for group in groups]
    assert sorted(name for group in held for name in group) == sorted(
        names[len(MODEL) :]
    )  # each in one group
    sizes = {len(group) // len(PARTS) for group in held}
    assert max(sizes) - min(sizes) <= 1
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for group in held for name in group]
    assert numbers == sorted(numbers)


def test_the_larger_of_two_stacks_of_layers_counts() -> None:
    vision = [f"vision.blocks.{layer}.weight" for layer in range(3)]
    assert layer_groups("2", [*vision, *tensors(2)]) == (("model.layers.0.*",), ("model.layers.1.*",))


def test_patterns_make_groups() -> None:
    found = layer_groups("attn = *.self_attn.* , mlp=*.mlp.*|*.norm.*", tensors(2))
    assert found == (("*.self_attn.*",), ("*.mlp.*", "*.norm.*"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("0", "from 1 to the model's 2 numbered layers, but are 0"),
        ("3", "from 1 to the model's 2 numbered layers, but are 3"),
        ("-1", "is neither"),
        ("", "is neither"),
        ("attn", "'attn' is neither"),
        ("attn=", "'attn=' is neither"),
        ("=x", "is neither"),
        ("a=*,a=*", "'a' is given twice"),
        ("a=x|", "is neither"),
        ("²", "is neither"),
        ("attn=*.self_atn.*", "'*.self_atn.*' matches none of 11"),
        ("all=*,mlp=*.mlp.*", "all of 'mlp' are in groups before it"),
    ],
)
def test_mistakes(spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match="layer group") as caught:
        layer_groups(spec, tensors(2))
    assert said in str(caught.value)


def test_a_model_without_numbered_layers() -> None:
    with pytest.raises(ConfigError, match="0 numbered layers"):
        layer_groups("2", MODEL)
