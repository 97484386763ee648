"""Several mixtures of LoRA adapters in flight in one real vLLM, against merges on disk; and what is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergemix.checkpoints.adapter import Adapter
from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, EngineError, NonFiniteError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve import multi_lora, multi_lora_adapter
from mergemix.serve.engine import EngineSpec, Generate, Generated, Likelihood, LogLikelihood, Output, Request
from mergemix.serve.multi_lora import MultiLoraEngine
from tests.checkpoints.adapter_files import change_tensors, factors, product, write_adapter_files
from tests.checkpoints.peft_adapters import write_adapter
from tests.serve.conformance import PAIRS, PROMPTS, Reference, check_answers, check_likelihoods
from tests.serve.tiny_models import MAX_POSITIONS, make_family, tiny_llama

# Adapters of different ranks, scales and modules. Those of `web` differ from module to module.
SETTINGS: dict[str, dict[str, object]] = {
    "math": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "code": {"target_modules": ["gate_proj", "down_proj", "o_proj"], "r": 6, "lora_alpha": 3, "use_rslora": True},
    "web": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj", "embed_tokens"],
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.k_proj": 3},
        "alpha_pattern": {"q_proj": 1},
    },
}  # fmt: skip
IN_FLIGHT = 4
MAX_TOKENS = 8
# Longer than two blocks of the cache: candidates that shared a prefix would show.
LONG_PROMPT = "the cat 12 in the hat " * 8


def write_family(
    directory: Path, settings: dict[str, dict[str, object]] = SETTINGS, **save: object
) -> Family:
    base = tiny_llama(directory / "base", 0, tied=False)
    paths = {}
    for name, options in settings.items():
        write_adapter(base, directory / name, size=0.1, **{**options, **save})
        paths[name] = str(directory / name)
    return open_family(str(base), paths)


def mixtures_of(names: tuple[str, ...]) -> list[Mixture]:
    """A corner, inside, the base, a sum other than one, outside the simplex, another corner."""
    weights = [(1, 0, 0), (0.2, 0.5, 0.3), (0, 0, 0), (0.9, 0.6, 0.2), (1.2, -0.4, 0.5), (0, 0, 1)]
    return [Mixture(names, tuple(map(float, each))) for each in weights]


class Given:
    """Likelihoods that were given already, as check_likelihoods asks an engine for them."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs

    def loglikelihood(self, requests: Sequence[Request]) -> Sequence[Output]:
        assert len(requests) == len(self._outputs)
        return self._outputs


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def engine(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MultiLoraEngine]:
    log = tmp_path_factory.mktemp("logs") / "engine.log"
    spec = EngineSpec(family, max_model_len=MAX_POSITIONS, log=log, lora_in_flight=IN_FLIGHT)
    with MultiLoraEngine(spec, Mixture.uniform(family.names)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mixture], Reference]:
    """The mixture merged to disk, and loaded by plain transformers."""
    known: dict[Mixture, Reference] = {}

    def reference(mixture: Mixture) -> Reference:
        if mixture not in known:
            out = tmp_path_factory.mktemp("merged") / "merged"
            merge_to_directory(family, mixture, out)
            known[mixture] = Reference(out)
        return known[mixture]

    return reference


class TestInFlight:
    def test_every_candidate_of_a_batch_answers_as_its_merge_on_disk(
        self, engine: MultiLoraEngine, family: Family, reference: Callable[[Mixture], Reference]
    ) -> None:
        """More candidates than slots, so that vLLM has to put some off; in two orders."""
        mixtures = mixtures_of(family.names)
        assert len(mixtures) > IN_FLIGHT
        requests: list[Request] = [Generate(prompt, MAX_TOKENS) for prompt in PROMPTS]
        requests += [LogLikelihood(*pair) for pair in PAIRS]
        for seed in range(2):
            order = random.Random(seed).sample(mixtures, len(mixtures))
            answers = engine.submit_each(order, requests)
            texts = [[each.text for each in outputs[: len(PROMPTS)]] for outputs in answers]  # type: ignore[union-attr]
            assert len(set(map(tuple, texts))) == len(mixtures)
            for mixture, of_mixture, outputs in zip(order, texts, answers, strict=True):
                for prompt, answer in reference(mixture).stable().items():
                    assert of_mixture[PROMPTS.index(prompt)].startswith(answer.text), (mixture, prompt)
                check_likelihoods(Given(outputs[len(PROMPTS) :]), reference(mixture), PAIRS)  # type: ignore[arg-type]

    def test_what_is_applied_answers_as_its_merge_on_disk(
        self, engine: MultiLoraEngine, family: Family, reference: Callable[[Mixture], Reference]
    ) -> None:
        for mixture in mixtures_of(family.names)[1:3]:
            engine.apply(mixture)
            check_answers(engine, reference(mixture).stable(), mixture)

    def test_a_mixed_batch_is_answered_in_its_order(self, engine: MultiLoraEngine, family: Family) -> None:
        mixtures = mixtures_of(family.names)[1:4]
        requests = [Generate("the cat 12", 3), LogLikelihood("the cat", " sat in"), Generate("x = 3 + 4;", 5)]
        for mixture, outputs in zip(mixtures, engine.submit_each(mixtures, requests), strict=True):
            assert [type(output) for output in outputs] == [Generated, Likelihood, Generated]
            engine.apply(mixture)
            alone = engine.submit(requests)
            assert [outputs[0], outputs[2]] == [alone[0], alone[2]]
            assert outputs[1].logprob == pytest.approx(alone[1].logprob, abs=0.2)

    def test_candidates_share_no_prefix(
        self, engine: MultiLoraEngine, family: Family, reference: Callable[[Mixture], Reference]
    ) -> None:
        """The same long prompt, one candidate after the other, so that each finds the others' blocks in the cache."""
        prompts = [LONG_PROMPT + prompt for prompt in PROMPTS[:6]]
        mixtures = mixtures_of(family.names)[:4]
        seen = set()
        for mixture in mixtures:
            engine.apply(mixture)
            stable = reference(mixture).stable(prompts, max_tokens=4)
            seen.add(tuple(stable.items()))
            for _ in range(2):
                check_answers(engine, stable, mixture)
        assert len(seen) == len(mixtures)

    def test_apply_selects_and_writes_only_what_is_new(self, engine: MultiLoraEngine, family: Family) -> None:
        fresh, again = Mixture(family.names, (0.7, 0.1, 0.2)), Mixture.uniform(family.names)
        assert engine.apply(fresh).bytes_written > 0
        engine.apply(again)
        assert engine.apply(fresh).bytes_written == 0
        assert engine.apply(again).bytes_written == 0

    def test_adapters_that_were_not_used_for_long_leave_the_disk_and_come_back_under_another_number(
        self, engine: MultiLoraEngine, family: Family
    ) -> None:
        first = Mixture(family.names, (0.31, 0.0, 0.0))
        engine.apply(first)
        before = engine._loaded[first]
        others = [Mixture(family.names, (0.5, share / 10, 0.0)) for share in range(1, IN_FLIGHT + 1)]
        for mixture in others:
            engine.apply(mixture)
        assert first not in engine._loaded
        held = {entry.name for entry in engine._directory.glob("mixture-*")}
        assert held == {f"mixture-{each.number}" for each in engine._loaded.values()}
        assert len(held) == IN_FLIGHT
        assert engine.apply(first).bytes_written > 0
        assert engine._loaded[first].number > before.number

    def test_an_evaluator_may_give_it_as_many_at_once(self, engine: MultiLoraEngine) -> None:
        assert engine.in_flight == IN_FLIGHT

    def test_nothing_to_answer(self, engine: MultiLoraEngine, family: Family) -> None:
        assert engine.submit([]) == []
        assert engine.submit_each([], [Generate("a", 1)]) == []
        assert engine.submit_each(mixtures_of(family.names)[:2], []) == [[], []]

    def test_an_adapter_that_vllm_would_not_apply_as_written_is_not_used(
        self, engine: MultiLoraEngine, family: Family, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        good = Mixture.uniform(family.names)
        engine.apply(good)
        write = multi_lora_adapter.write_mixture

        def lose(change: Callable[[Path], None]) -> None:
            def written(family: Family, mixture: Mixture, directory: Path) -> object:
                result = write(family, mixture, directory)
                change(directory)
                return result

            monkeypatch.setattr(multi_lora.adapters, "write_mixture", written)

        gone = {"model.layers.9.self_attn.q_proj" + key[len("model.layers.0.self_attn.q_proj"):]: value
                for key, value in factors("model.layers.0.self_attn.q_proj", (64, 64), rank=1).items()}  # fmt: skip
        lose(lambda directory: change_tensors(directory, gone))
        bad = Mixture(family.names, (0.11, 0.22, 0.33))
        with pytest.raises(EngineError, match=r"layers\.9\.self_attn.*no place for LoRA"):
            engine.apply(bad)

        def doubled(directory: Path) -> None:
            path = directory / "adapter_config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps(config | {"lora_alpha": 2 * config["r"]}))

        lose(doubled)
        without_embedding = Mixture(family.names, (0.4, 0.6, 0.0))
        with pytest.raises(EngineError, match="copies of lora_B are not those of its file"):
            engine.apply(without_embedding)
        monkeypatch.undo()
        assert not engine.poisoned
        assert good in engine._loaded
        assert engine.apply(bad).bytes_written > 0

    def test_close_removes_the_adapters_and_the_process(self, engine: MultiLoraEngine) -> None:
        """The last one: it closes what the others share."""
        directory, process = engine._directory, engine._process
        assert directory.is_dir()
        assert process is not None
        engine.close()
        engine.close()
        assert not directory.exists()
        assert process._child.poll() is not None
        with pytest.raises(EngineError, match="closed"):
            engine.submit([Generate("a", 1)])


def expected_deltas(family: Family, mixture: Mixture) -> dict[str, torch.Tensor]:
    """sum_k a_k s_k B_k @ A_k in fp64, by tensor."""
    sums: dict[str, torch.Tensor] = {}
    for expert, weight in zip(family.experts, mixture.weights, strict=True):
        assert isinstance(expert, Adapter)
        for name, delta in expert.deltas.items() if weight else ():
            sums[name] = sums.get(name, torch.zeros(delta.shape, dtype=torch.float64)) + weight * product(
                delta
            )
    return sums


class TestWrittenAdapter:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_its_product_is_the_sum_of_the_products(self, tmp_path: Path, dtype: str) -> None:
        family = write_family(tmp_path, autocast=dtype == "float32")
        unit = torch.finfo(getattr(torch, dtype)).eps / 2
        for index, mixture in enumerate(mixtures_of(family.names)):
            written = multi_lora_adapter.write_mixture(family, mixture, tmp_path / f"mixture-{index}")
            config = json.loads((written.directory / "adapter_config.json").read_text())
            assert config["lora_alpha"] == config["r"] == written.rank
            tensors = load_file(written.directory / "adapter_model.safetensors")
            expected = expected_deltas(family, mixture)
            assert len(tensors) == 2 * written.modules == 2 * max(len(expected), 1)
            for name, delta in expected.items():
                module = f"base_model.model.{name.removesuffix('.weight')}"
                embedding = "embed" in name
                a = tensors[f"{module}.lora_{'embedding_A' if embedding else 'A.weight'}"]
                b = tensors[f"{module}.lora_{'embedding_B' if embedding else 'B.weight'}"]
                assert a.dtype == b.dtype == getattr(torch, dtype)
                assert a.shape[0] == b.shape[1] == written.rank
                found = b.double() @ a.double()
                # Each element of B is rounded once, after products that fp32 rounds (scale, weight).
                bound = (unit + 2.0**-23) * (b.double().abs() @ a.double().abs())
                assert (
                    ((found.T if embedding else found) - delta)
                    .abs()
                    .le(bound.T if embedding else bound)
                    .all()
                )

    def test_ranks_add_up_over_the_adapters_that_take_part(self, family: Family, tmp_path: Path) -> None:
        # q_proj 4 + 2, down_proj 6 + 5.
        for weights, rank in (
            ((1, 1, 1), 11),
            ((1, 0, 1), 6),
            ((0, 1, 0), 6),
            ((0, 0, 1), 5),
            ((1, 0, 0), 4),
            ((0, 0, 0), 1),
        ):
            mixture = Mixture(family.names, tuple(map(float, weights)))
            directory = tmp_path / "-".join(map(str, weights))
            assert multi_lora_adapter.write_mixture(family, mixture, directory).rank == rank
        assert multi_lora_adapter.total_rank(family) == 11

    def test_factors_that_are_not_finite(self, tmp_path: Path) -> None:
        family = write_family(tmp_path, {"math": SETTINGS["math"]}, autocast=False)
        name = "model.layers.1.self_attn.v_proj.lora_A.weight"
        path = tmp_path / "math" / "adapter_model.safetensors"
        stored = load_file(path)[f"base_model.model.{name}"].clone()
        with pytest.raises(ConfigError, match="beyond the range"):
            multi_lora_adapter.write_mixture(family, Mixture(("math",), (3e38,)), tmp_path / "large")
        stored[1, 2] = float("nan")
        change_tensors(tmp_path / "math", {name: stored})
        family = open_family(str(tmp_path / "base"), {"math": str(tmp_path / "math")})
        with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.v_proj\.lora_A.*NaN"):
            multi_lora_adapter.write_mixture(family, Mixture(("math",), (1.0,)), tmp_path / "out")


class TestRefuses:
    def test_whole_checkpoints(self, tmp_path: Path) -> None:
        paths = make_family(tmp_path, "llama_untied", experts=1)
        family = open_family(str(paths["base"]), {"math": str(paths["math"])})
        with pytest.raises((ConfigError), match=r"math \(.*is a whole checkpoint: fold the adapters"):
            EngineSpec(family, lora_in_flight=2)

    def test_whole_tensors_in_an_adapter(self, tmp_path: Path) -> None:
        settings = {"math": {**SETTINGS["math"], "modules_to_save": ["norm"]}}
        with pytest.raises(
            ConfigError, match=r"math .* brings 'model\.\S*norm\.weight' and 4 more as a whole: fold"
        ):
            EngineSpec(write_family(tmp_path, settings), lora_in_flight=2)

    def test_the_output_head(self, tmp_path: Path) -> None:
        settings = {"math": {"target_modules": ["lm_head", "q_proj"], "r": 2}}
        with pytest.raises(
            ConfigError, match=r"changes the output head, and math .* 'lm_head\.weight': fold"
        ):
            EngineSpec(write_family(tmp_path, settings), lora_in_flight=2)

    def test_tied_embeddings(self, tmp_path: Path) -> None:
        base = tiny_llama(tmp_path / "base", 0, tied=True)
        parts = {
            "model.embed_tokens.lora_embedding_A": torch.ones(2, 128),
            "model.embed_tokens.lora_embedding_B": torch.ones(64, 2),
        }
        write_adapter_files(tmp_path / "math", parts, ensure_weight_tying=True)
        family = open_family(str(base), {"math": str(tmp_path / "math")})
        with pytest.raises(ConfigError, match=r"embeddings and the output head tied to them.*fold"):
            EngineSpec(family, lora_in_flight=2)

    def test_ranks_beyond_vllms(self, tmp_path: Path) -> None:
        base = tiny_llama(tmp_path / "base", 0, tied=False)
        module = "model.layers.0.mlp.down_proj"
        paths = {}
        for name, rank in (("math", 256), ("code", 257)):
            write_adapter_files(tmp_path / name, factors(module, (64, 128), rank=rank), rank=rank)
            paths[name] = str(tmp_path / name)
        with pytest.raises(ConfigError, match="add up to 513, and vLLM's LoRA takes at most 512: fold"):
            EngineSpec(open_family(str(base), paths), lora_in_flight=2)
        family = open_family(str(base), {"math": paths["math"]})
        EngineSpec(family, lora_in_flight=4)
        with pytest.raises(ConfigError, match=r"lora_in_flight must be at least 1.*but is -1"):
            EngineSpec(family, lora_in_flight=-1)

    def test_what_it_does_not_go_with(self, family: Family) -> None:
        with pytest.raises(ConfigError, match=r"lora_in_flight 2 needs vLLM.*the engine is hf: take"):
            EngineSpec(family, "hf", lora_in_flight=2)
        with pytest.raises(ConfigError, match=r"host_cache keeps weights for swaps.*leave one"):
            EngineSpec(family, host_cache=5, lora_in_flight=2)


def test_ranks_that_vllm_allows() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    assert get_args(MaxLoRARanks) == multi_lora_adapter.RANKS
    assert [multi_lora_adapter.max_lora_rank(rank) for rank in (1, 2, 8, 9, 129, 257, 320, 512)] == [
        1, 8, 8, 16, 256, 320, 320, 512
    ]  # fmt: skip
