"""The streaming pass over task vectors, against a plain fp64 computation on whole tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import CheckpointError, ConfigError
from mergemix.preflight import weights
from mergemix.preflight.geometry import FamilyGeometry, layer_of
from mergemix.preflight.weights import measure_weights
from tests.checkpoints.adapter_files import adapted, factors, stored, write_adapter_files
from tests.merge.families import write_family
from tests.tiny import random_tensors, write_checkpoint

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (37, 24),
    "model.layers.0.q.weight": (24, 24),
    "model.layers.0.norm.weight": (24,),
    "model.layers.10.q.weight": (41, 24),
    "scalar": (),
    "empty": (0, 3),
}


def moved_by(base: dict[str, torch.Tensor], size: float, seed: int) -> dict[str, torch.Tensor]:
    """base plus noise in about half of the elements."""
    noise = random_tensors({name: tuple(tensor.shape) for name, tensor in base.items()}, seed, torch.float32)
    return {
        name: torch.where(noise[name] > 0, tensor.float() + size * noise[name], tensor.float()).to(
            tensor.dtype
        )
        for name, tensor in base.items()
    }


def sample_family(root: Path, dtype: torch.dtype, *, with_base: bool = True) -> Family:
    base = random_tensors(SHAPES, 0, dtype)
    experts = {name: moved_by(base, 0.1 * (seed + 1), seed + 1) for seed, name in enumerate(("a", "b", "c"))}
    return write_family(root, base if with_base else None, experts, shards=(1, 3, 2))


def reference(family: Family) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gram matrix and counts of every tensor, from whole tensors in fp64."""
    found = {}
    for name in family.template.tensors:
        values = [_values(family, member, name) for member in family.experts]
        center = _values(family, family.base, name) if family.base is not None else np.mean(values, axis=0)
        vectors = np.array([center, *(value - center for value in values)])
        found[name] = (vectors @ vectors.T, np.count_nonzero(vectors[1:], axis=1))
    return found


def _values(family: Family, member: object, name: str) -> np.ndarray:
    if hasattr(member, "deltas"):
        assert family.base is not None
        return adapted(family.base, member)[name].numpy().ravel()  # type: ignore[arg-type]
    tensor = member.tensors[name]  # type: ignore[attr-defined]
    return stored(tensor).double().numpy().ravel() if tensor.nbytes else np.zeros(0)


def check(found: FamilyGeometry, family: Family) -> None:
    expected = reference(family)
    assert [tensor.name for tensor in found.tensors] == list(family.template.tensors)
    for tensor in found.tensors:
        gram, moved = expected[tensor.name]
        # Relative to the lengths of the two vectors, as an error of a cosine. Without a base the reference is a mean of
        # K values in fp32, and differences from it are no more exact than that.
        lengths = np.sqrt(np.diag(gram)) + (0 if found.has_base else 0.05 * np.sqrt(gram[0, 0]))
        scale = np.outer(lengths, lengths)
        assert np.all(np.abs(tensor.gram - gram) <= 3e-6 * scale + 1e-30), tensor.name
        if found.has_base:
            assert tensor.moved.tolist() == moved.tolist(), tensor.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("with_base", [True, False])
def test_it_equals_a_plain_computation(tmp_path: Path, dtype: torch.dtype, with_base: bool) -> None:
    family = sample_family(tmp_path, dtype, with_base=with_base)
    found = measure_weights(family)
    check(found, family)
    assert found.has_base is with_base
    assert found.bytes_read == sum(
        tensor.nbytes for member in family.members for tensor in member.tensors.values()
    )


@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(20, 1000), blocks=st.integers(1, 5), workers=st.integers(1, 4))
def test_blocks_chunks_and_threads_do_not_change_it(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, blocks: int, workers: int
) -> None:
    """Of every division each element is counted once. Of one division, threads change no bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CHUNK_ELEMENTS", chunk)
        patch.setattr(weights, "MAX_BLOCK_ELEMENTS", chunk * blocks)
        patch.setattr(weights.cpu, "thread_count", lambda: workers)
        family = sample_family(tmp_path_factory.mktemp("family"), torch.bfloat16)
        found = measure_weights(family)
        check(found, family)
        patch.setattr(weights.cpu, "thread_count", lambda: 1)
        for one, other in zip(found.tensors, measure_weights(family).tensors, strict=True):
            assert one.gram.tobytes() == other.gram.tobytes()


@pytest.mark.parametrize("chunk", [7, 24, 50, 1 << 15])
def test_adapters_count_as_what_they_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Beside a whole expert; one adapter brings a whole tensor too, of another type. Chunks end inside rows."""
    monkeypatch.setattr(weights, "CHUNK_ELEMENTS", chunk)
    base = random_tensors({name: shape for name, shape in SHAPES.items() if name != "empty"}, 0)
    root = write_checkpoint(tmp_path / "base", base)
    whole = write_checkpoint(tmp_path / "whole", moved_by(base, 0.1, 1))
    low = factors("model.layers.0.q", (24, 24), seed=3) | factors("model.layers.10.q", (41, 24), seed=4)
    one = write_adapter_files(tmp_path / "one", low)
    norm = {"model.layers.0.norm.weight": torch.linspace(0, 1, 24)}
    two = write_adapter_files(
        tmp_path / "two", factors("model.layers.0.q", (24, 24), seed=5) | norm, modules_to_save=["norm"]
    )
    family = open_family(str(root), {"whole": str(whole), "one": str(one), "two": str(two)})
    check(measure_weights(family), family)


def test_layers_add_up(tmp_path: Path) -> None:
    found = measure_weights(sample_family(tmp_path, torch.bfloat16))
    assert [layer.name for layer in found.layers] == ["0", "10", "empty", "model.embed_tokens", "scalar"]
    assert [layer.elements for layer in found.layers] == [24 * 24 + 24, 41 * 24, 0, 37 * 24, 1]
    np.testing.assert_allclose(sum(layer.gram for layer in found.layers), found.whole.gram)
    assert found.whole.elements == sum(tensor.elements for tensor in found.tensors)
    assert layer_of("transformer.h.7.mlp.experts.3.w1.weight") == "7"


def test_large_finite_values_are_no_infinity(tmp_path: Path) -> None:
    """Squares beyond fp32 are summed in fp64."""
    base = {"w": torch.full((100,), 1e30)}
    family = write_family(tmp_path, base, {"a": {"w": torch.full((100,), 3e30)}})
    [tensor] = measure_weights(family).tensors
    np.testing.assert_allclose(tensor.gram, 100e60 * np.array([[1, 2], [2, 4]]), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(tmp_path: Path, bad: float) -> None:
    base = random_tensors(SHAPES, 0)
    broken = moved_by(base, 0.1, 1)
    broken["model.layers.10.q.weight"][3, 3] = bad
    family = write_family(tmp_path, base, {"good": moved_by(base, 0.1, 2), "broken": broken})
    for tensor in measure_weights(family).tensors:
        is_finite = np.isfinite(tensor.gram)
        if tensor.name == "model.layers.10.q.weight":
            assert is_finite[:2, :2].all()
            assert not is_finite[2].any()
        else:
            assert is_finite.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_without_a_base_it_shows_in_its_expert_alone(tmp_path: Path, bad: float) -> None:
    base = random_tensors(SHAPES, 0)
    experts = {name: moved_by(base, 0.1, seed) for seed, name in enumerate("abc", start=1)}
    sound = measure_weights(write_family(tmp_path / "sound", None, experts))
    experts["b"]["model.layers.10.q.weight"][3, 3] = bad
    found = measure_weights(write_family(tmp_path / "broken", None, experts))
    for tensor, before in zip(found.tensors, sound.tensors, strict=True):
        good = [0, 1, 3] if tensor.name == "model.layers.10.q.weight" else [0, 1, 2, 3]
        assert np.isfinite(np.diag(tensor.gram)).nonzero()[0].tolist() == good
        # One element of a thousand is left out of the mean.
        np.testing.assert_allclose(tensor.gram[good, good], before.gram[good, good], rtol=0.02)


def test_without_a_base_a_mean_of_finite_values_is_finite(tmp_path: Path) -> None:
    experts = {name: {"w": torch.full((9,), size)} for name, size in {"a": 3e38, "b": 2e38}.items()}
    [tensor] = measure_weights(write_family(tmp_path, None, experts)).tensors
    np.testing.assert_allclose(tensor.gram[0, 0], 9 * 2.5e38**2, rtol=1e-6)


def test_memory_is_bounded_and_too_little_is_refused(tmp_path: Path) -> None:
    family = sample_family(tmp_path, torch.bfloat16)
    check(measure_weights(family, memory_bytes=3 << 20), family)
    with pytest.raises(ConfigError, match=r"needs at least \d+ bytes .* --memory"):
        measure_weights(family, memory_bytes=1 << 20)


def test_a_file_that_changed_is_an_error(tmp_path: Path) -> None:
    family = sample_family(tmp_path, torch.bfloat16)
    tensor = next(iter(family.experts[1].tensors.values()))
    tensor.path.write_bytes(tensor.path.read_bytes()[:-2])
    with pytest.raises(CheckpointError):
        measure_weights(family)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    family = sample_family(tmp_path, torch.bfloat16)
    path = next(iter(family.experts[1].tensors.values())).path

    def replace(nbytes: int) -> None:
        copy = path.with_suffix(".new")
        copy.write_bytes(path.read_bytes())
        copy.replace(path)

    with pytest.raises(CheckpointError, match="changed"):
        measure_weights(family, progress=replace)


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    told: list[int] = []
    found = measure_weights(sample_family(tmp_path, torch.bfloat16), progress=told.append)
    assert sum(told) == found.bytes_read
