"""Many mixtures in one pass: each output is what a merge of its own would be, whatever the division of the work."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergemix.checkpoints.checkpoint import open_checkpoint
from mergemix.checkpoints.family import open_family
from mergemix.errors import ConfigError, NonFiniteError
from mergemix.merge import merge_many, merge_to_directory
from mergemix.merge import stream as stream_module
from mergemix.merge.buffers import Buffers
from mergemix.mixture import LayerGroup, Mixture
from tests.merge.families import NAMES, Tensors, bits, expected, tiny_family, write_family
from tests.merge.test_stream import families
from tests.tiny import random_tensors, write_checkpoint


def loaded(root: Path) -> Tensors:
    tensors: Tensors = {}
    for path in root.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def contents(root: Path) -> dict[str, str]:
    """A digest of every weight file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.glob("*.safetensors"))
    }


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), members=families(), shards=st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_every_output_is_the_reference_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
    members: tuple[Tensors, dict[str, Tensors]],
    shards: list[int],
) -> None:
    base, experts = members
    weights = st.lists(
        st.one_of(st.just(0.0), st.floats(-0.5, 1.0)), min_size=len(experts), max_size=len(experts)
    )
    drawn = data.draw(st.lists(weights, min_size=1, max_size=9), label="weights")
    patterns = st.lists(st.sampled_from(sorted(next(iter(experts.values())))), min_size=1, max_size=2)
    groups = [
        tuple(
            LayerGroup(tuple(tensors), tuple(of_group))
            for tensors, of_group in data.draw(
                st.lists(st.tuples(patterns, weights), max_size=2), label="groups"
            )
        )
        for _ in drawn
    ]
    mixtures = {f"m{p}": Mixture(tuple(experts), tuple(given), groups[p]) for p, given in enumerate(drawn)}
    buffers = Buffers(
        workers=data.draw(st.integers(1, 7), label="workers"),
        block_bytes=4096 * data.draw(st.integers(1, 5), label="pages"),
        factor_bytes=0,
        total_bytes=0,
    )
    monkeypatch.setattr(stream_module, "divide_memory", lambda plan, memory_bytes: buffers)
    root = tmp_path_factory.mktemp("family")
    family = write_family(root, base, experts, [min(count, len(base)) for count in shards])
    merge_many(family, mixtures, root / "merged")
    assert sorted(os.listdir(root / "merged")) == sorted(mixtures)
    for name, mixture in mixtures.items():
        reference = expected(base, experts, mixture)
        merged = loaded(root / "merged" / name)
        assert merged.keys() == reference.keys()
        for tensor in reference:
            assert torch.equal(bits(merged[tensor]), bits(reference[tensor])), (name, tensor)


@pytest.mark.parametrize("block_bytes", [4096, 12288, 1 << 20])
@pytest.mark.parametrize("workers", [1, 3, 16])
def test_files_are_the_same_whatever_the_division(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, workers: int
) -> None:
    shapes = {"embed": (700, 64), "a": (64,), "b": (96, 64), "c": (3,), "d": (64, 96)}
    experts = {name: random_tensors(shapes, seed) for seed, name in enumerate(NAMES)}
    family = write_family(tmp_path, None, experts, (2, 1, 3))
    mixtures = {"x": Mixture.uniform(NAMES), "y": Mixture.of(NAMES, {"math": 2, "web": 1})}
    for name, mixture in mixtures.items():
        merge_to_directory(family, mixture, tmp_path / f"alone-{name}")
    buffers = Buffers(workers, block_bytes, 0, 0)
    monkeypatch.setattr(stream_module, "divide_memory", lambda plan, memory_bytes: buffers)
    stats = merge_many(family, mixtures, tmp_path / "both")
    for name in mixtures:
        assert contents(tmp_path / "both" / name) == contents(tmp_path / f"alone-{name}")
    tensor_bytes = sum(tensor.nbytes for tensor in family.template.tensors.values())
    assert stats.bytes_read == 3 * tensor_bytes
    assert stats.bytes_written == 2 * tensor_bytes


def test_each_directory_is_a_checkpoint_that_says_what_it_is(tmp_path: Path) -> None:
    family = tiny_family(tmp_path, with_base=True, shards=(2,))
    mixtures = {"even": Mixture.uniform(NAMES), "code": Mixture.one_hot(NAMES, "code")}
    merge_many(family, mixtures, tmp_path / "merged")
    for name, mixture in mixtures.items():
        opened = open_checkpoint(name, str(tmp_path / "merged" / name))
        assert list(opened.tensors) == list(family.template.tensors)
        record = json.loads((tmp_path / "merged" / name / "mergemix.json").read_text())
        assert record["mixture"] == mixture.as_dict()
        assert record["checkpoints"]["code"] == {"source": str(tmp_path / "code"), "revision": None}
        assert "base" not in record["checkpoints"]


def test_one_bad_output_leaves_none_of_them(tmp_path: Path) -> None:
    experts = {name: {"w": torch.ones(900)} for name in NAMES}
    experts["web"]["w"][-1] = float("nan")
    family = write_family(tmp_path, None, experts)
    fine, bad = Mixture.one_hot(NAMES, "math"), Mixture.uniform(NAMES)
    with pytest.raises(NonFiniteError, match=r"'w' holds NaN or Inf in web \("):
        merge_many(family, {"fine": fine, "bad": bad}, tmp_path / "merged")
    assert sorted(os.listdir(tmp_path)) == sorted(NAMES)
    merge_many(family, {"fine": fine, "half": Mixture(NAMES, (0.5, 0.5, 0.0))}, tmp_path / "merged")


def test_narrow_tensors_before_wide_ones_do_not_misalign_them(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        tensors = random_tensors({"w": (3000,)}, seed)
        mask = {"a_mask": torch.ones(7, dtype=torch.bool)}
        write_checkpoint(tmp_path / name, {**tensors, **mask})
        # The format lets a file begin with the mask; the library that wrote it puts wide types first.
        path = tmp_path / name / "model.safetensors"
        rewrite_with_mask_first(path, tensors["w"], mask["a_mask"])
        assert loaded(tmp_path / name).keys() == {"w", "a_mask"}
    family = open_family(None, {name: str(tmp_path / name) for name in NAMES})
    assert family.template.tensors["w"].offset % 2 == 1
    mixture = Mixture.uniform(NAMES)
    merge_to_directory(family, mixture, tmp_path / "merged", memory_bytes=4 * 4096)
    merged = loaded(tmp_path / "merged")
    reference = expected(None, {name: loaded(tmp_path / name) for name in NAMES}, mixture)
    assert all(torch.equal(bits(merged[name]), bits(reference[name])) for name in ("w", "a_mask"))


def rewrite_with_mask_first(path: Path, w: torch.Tensor, mask: torch.Tensor) -> None:
    header = {
        "a_mask": {"dtype": "BOOL", "shape": [7], "data_offsets": [0, 7]},
        "w": {"dtype": "BF16", "shape": [3000], "data_offsets": [7, 6007]},
    }
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2)  # with the mask's seven bytes, w begins at an odd one
    data = bits(mask).numpy().tobytes() + bits(w).numpy().tobytes()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_many_outputs_need_few_open_files(tmp_path: Path) -> None:
    experts = {
        name: random_tensors({f"w{k}": (9,) for k in range(8)}, seed) for seed, name in enumerate(NAMES)
    }
    family = write_family(tmp_path, None, experts, (8,))
    for k in range(5):
        (family.template.root / f"tokenizer{k}.json").write_text("{}")
    mixtures = {f"m{k}": Mixture.one_hot(NAMES, "web") for k in range(20)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, limits[1]))
    try:
        merge_many(family, mixtures, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(list((tmp_path / "merged").glob("*/*"))) == 20 * (8 + 5 + 3)


def test_a_group_that_holds_no_tensor_is_refused(tmp_path: Path) -> None:
    family = tiny_family(tmp_path)
    mixture = Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("nothing.*",), (0.0, 1.0, 0.0)),))
    with pytest.raises(ConfigError, match=r"'nothing.\*' matches none of 3"):
        merge_to_directory(family, mixture, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_merge_says_its_groups(tmp_path: Path) -> None:
    mixture = Mixture(NAMES, (1.0, 0.0, 0.0), (LayerGroup(("layer.*",), (0.0, 0.5, 0.5)),))
    merge_to_directory(tiny_family(tmp_path), mixture, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "mergemix.json").read_text())
    assert record["groups"] == [{"tensors": ["layer.*"], "weights": {"math": 0.0, "code": 0.5, "web": 0.5}}]
    assert set(record["checkpoints"]) == set(NAMES)
