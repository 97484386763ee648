"""What every engine promises, as tests: subclass EngineConformance and give it an engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mergemix.checkpoints.family import Family, open_family
from mergemix.errors import ConfigError, PoisonedEngineError
from mergemix.merge import merge_to_directory
from mergemix.mixture import Mixture
from mergemix.serve.engine import Engine, Generate, Generated, Likelihood, LogLikelihood
from mergemix.serve.tokens import cut_at_stop, encode_pair, encode_prompt, end_tokens, load_tokenizer
from tests.serve.tiny_models import MAX_POSITIONS, Arch, make_family

PROMPTS = (
    "the cat 12", "a", "In the beginning", "x = 3 + 4;", "hello world, how are you", "QQ", "abc the end of", "12 12 12",
    "def f(x): return", "Once upon a time there was a", "", "one two three four five six seven", "Zürich?", "in in in\n",
    "The capital of France is", "9 * 9 = ", "<s>begin", "##", "why not the other", "last one",
)  # fmt: skip
PAIRS = (
    ("the cat", " sat in the hat"), ("the cat ", "sat"), ("", "the end"), ("1 + 1 =", " 2"), ("Q: why?\nA:", " abc"),
    ("a", "b"), ("In the beginning there was a long context", "."), ("   ", "spaces"), ("x", "y z w the in er 12"),
)  # fmt: skip
MAX_TOKENS = 6
# A greedy answer is compared token by token only where no runner-up comes this close, in fp32 logits of
# standard deviation 2.4: bf16 rounds logits of this size to steps of 1/32, and roundings add up.
MARGIN = 0.15


@dataclass(frozen=True)
class Answer:
    """Greedy ids, their text without special tokens, and the smallest lead over a runner-up (logits)."""

    ids: tuple[int, ...]
    text: str
    margin: float


class Reference:
    """A checkpoint on disk, loaded by plain transformers and asked one sequence at a time, without cache or padding."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.ends = end_tokens(directory, self.tokenizer)
        self.exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.rounded = AutoModelForCausalLM.from_pretrained(directory)

    def greedy(self, model: Any, ids: Sequence[int], max_tokens: int) -> Answer:
        answer: list[int] = []
        margin = float("inf")
        while len(answer) < max_tokens and not (answer and answer[-1] in self.ends):
            top = self._logits(model, [*ids, *answer])[-1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            answer.append(int(top.indices[0]))
        return Answer(tuple(answer), self.tokenizer.decode(answer, skip_special_tokens=True), margin)

    def stable(self, prompts: Sequence[str] = PROMPTS, max_tokens: int = MAX_TOKENS) -> dict[str, Answer]:
        """Answers to the prompts whose answer rounding cannot change; always enough of them to mean something."""
        found = {}
        for prompt in prompts:
            ids = encode_prompt(self.tokenizer, prompt)[-(MAX_POSITIONS - max_tokens) :]
            exact = self.greedy(self.exact, ids, max_tokens)
            if exact.margin > MARGIN and self.greedy(self.rounded, ids, max_tokens).ids == exact.ids:
                found[prompt] = exact
        assert len(found) >= len(prompts) / 5, f"only {len(found)} of {len(prompts)} answers are stable"
        return found

    def likelihood(self, model: Any, context: str, continuation: str) -> tuple[Likelihood, float]:
        """The likelihood, and the smallest lead of any most probable token over its runner-up (logits)."""
        before, scored = encode_pair(self.tokenizer, context, continuation)
        logits = self._logits(model, before + scored)[len(before) - 1 : -1]
        top = logits.topk(2).values
        logprobs = logits.log_softmax(-1)[range(len(scored)), scored]
        is_greedy = logits.argmax(-1).tolist() == scored
        return Likelihood(float(logprobs.sum()), len(scored), is_greedy), float((top[:, 0] - top[:, 1]).min())

    def greedy_pairs(self, prompts: Sequence[str] = PROMPTS) -> list[tuple[str, str]]:
        """Contexts with their clearly most probable next token, where the pair is encoded as just that token."""
        pairs = []
        for prompt in prompts:
            if prompt and prompt == prompt.rstrip():
                ids = encode_prompt(self.tokenizer, prompt)
                answer = self.greedy(self.exact, ids, 1)
                if answer.margin > MARGIN and encode_pair(self.tokenizer, prompt, answer.text) == (
                    ids,
                    [*answer.ids],
                ):
                    pairs.append((prompt, answer.text))
        assert len(pairs) >= 3
        return pairs

    @staticmethod
    @torch.inference_mode()
    def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def mixtures_in_mixed_order(names: tuple[str, ...]) -> list[Mixture]:
    """For three experts: inside and on the border of the simplex, the base, outside, and the first one again."""
    weights = [
        (1, 0, 0),
        (0.2, 0.5, 0.3),
        (0, 0, 1),
        (0.5, 0.1, 0.1),
        (0, 0, 0),
        (1.2, -0.3, 0.1),
        (0, 1, 0),
        (1, 0, 0),
    ]
    return [Mixture(names, tuple(map(float, each))) for each in weights]


class EngineConformance:
    """Subclasses set `arch` and define the fixture `make_engine`, and override `break_swap` where it must differ.

    The engine is shared by the tests of a class, so every test first applies the weights it needs.
    """

    arch: Arch

    @pytest.fixture(scope="class")
    def make_engine(self) -> Callable[[Family, Mixture], Engine]:
        raise NotImplementedError("a subclass says how its engine is started")

    def break_swap(self, engine: Engine, paths: dict[str, Path]) -> None:
        """See to it that the engine's next apply() fails halfway. Here: the last expert's file loses its end."""
        shard = list(paths.values())[-1] / "model.safetensors"
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)

    @pytest.fixture(scope="class")
    def paths(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        return make_family(tmp_path_factory.mktemp(self.arch), self.arch)

    @pytest.fixture(scope="class")
    def family(self, paths: dict[str, Path]) -> Family:
        experts = {name: str(path) for name, path in paths.items() if name != "base"}
        return open_family(str(paths["base"]), experts)

    @pytest.fixture(scope="class")
    def engine(self, family: Family, make_engine: Callable[[Family, Mixture], Engine]) -> Any:
        with make_engine(family, Mixture.uniform(family.names)) as engine:
            yield engine

    @pytest.fixture(scope="class")
    def reference(
        self, family: Family, tmp_path_factory: pytest.TempPathFactory
    ) -> Callable[[Mixture], Reference]:
        known: dict[Mixture, Reference] = {}

        def reference(mixture: Mixture) -> Reference:
            if mixture not in known:
                out = tmp_path_factory.mktemp("merged") / "merged"
                merge_to_directory(family, mixture, out, memory_bytes=1 << 20)
                known[mixture] = Reference(out)
            return known[mixture]

        return reference

    @pytest.fixture
    def uniform(self, engine: Engine, family: Family, reference: Callable[[Mixture], Reference]) -> Reference:
        mixture = Mixture.uniform(family.names)
        engine.apply(mixture)
        return reference(mixture)

    def test_a_one_hot_mixture_answers_as_the_expert_loaded_alone(
        self, engine: Engine, family: Family, paths: dict[str, Path]
    ) -> None:
        answers = []
        for name in family.names:
            engine.apply(Mixture.one_hot(family.names, name))
            stable = Reference(paths[name]).stable()
            assert texts(engine, stable) == {prompt: answer.text for prompt, answer in stable.items()}
            answers.append(
                tuple(output.text for output in engine.generate([Generate(p, MAX_TOKENS) for p in PROMPTS]))
            )
        assert len(set(answers)) == len(answers)

    def test_every_swap_in_mixed_order_answers_as_a_fresh_load_of_the_merge_on_disk(
        self, engine: Engine, family: Family, reference: Callable[[Mixture], Reference]
    ) -> None:
        for mixture in mixtures_in_mixed_order(family.names):
            swap = engine.apply(mixture)
            assert swap.seconds > 0
            assert swap.bytes_written > 0
            fresh = reference(mixture)
            stable = fresh.stable()
            assert texts(engine, stable) == {prompt: answer.text for prompt, answer in stable.items()}, (
                mixture
            )
            self.check_likelihoods(engine, fresh, PAIRS)

    def test_loglikelihoods_are_sums_over_the_continuation_and_say_whether_it_is_greedy(
        self, engine: Engine, uniform: Reference
    ) -> None:
        greedy = uniform.greedy_pairs()
        outputs = self.check_likelihoods(engine, uniform, [*PAIRS, *greedy])
        assert all(output.is_greedy for output in outputs[len(PAIRS) :])
        assert not all(output.is_greedy for output in outputs)

    def check_likelihoods(
        self, engine: Engine, reference: Reference, pairs: Sequence[tuple[str, str]]
    ) -> list[Likelihood]:
        """Each log-probability is as near to fp32 truth, per token, as bf16 transformers is (times 3)."""
        outputs = engine.loglikelihood([LogLikelihood(*pair) for pair in pairs])
        exact = [reference.likelihood(reference.exact, *pair) for pair in pairs]
        rounded = [reference.likelihood(reference.rounded, *pair)[0] for pair in pairs]
        noise = max(
            abs(r.logprob - e.logprob) / e.num_tokens for r, (e, _) in zip(rounded, exact, strict=True)
        )
        for output, (truth, margin) in zip(outputs, exact, strict=True):
            assert output.num_tokens == truth.num_tokens
            assert abs(output.logprob - truth.logprob) <= truth.num_tokens * (3 * noise + 0.01)
            if margin > MARGIN:
                assert output.is_greedy == truth.is_greedy
        return outputs

    def test_answers_are_deterministic_and_do_not_depend_on_order(
        self, engine: Engine, uniform: Reference
    ) -> None:
        stable = list(uniform.stable())
        expected = texts(engine, stable)
        assert texts(engine, stable) == expected
        random.Random(0).shuffle(stable)
        assert texts(engine, stable) == expected
        assert texts(engine, stable[:1]) == {stable[0]: expected[stable[0]]}

    def test_a_mixed_batch_is_answered_in_its_order(self, engine: Engine, uniform: Reference) -> None:
        stable = uniform.stable()
        requests: list[Any] = [Generate(prompt, MAX_TOKENS) for prompt in stable]
        requests += [LogLikelihood(*pair) for pair in PAIRS]
        random.Random(1).shuffle(requests)
        for request, output in zip(requests, engine.submit(requests), strict=True):
            if isinstance(request, Generate):
                assert isinstance(output, Generated)
                assert output.text == stable[request.prompt].text
            else:
                assert isinstance(output, Likelihood)
                truth, _ = uniform.likelihood(uniform.exact, request.context, request.continuation)
                assert output.num_tokens == truth.num_tokens
                assert output.logprob == pytest.approx(truth.logprob, abs=0.3 * truth.num_tokens)

    def test_stop_strings_cut_the_answer(self, engine: Engine, uniform: Reference) -> None:
        stable = {prompt: answer for prompt, answer in uniform.stable().items() if len(answer.text) >= 3}
        requests = [
            Generate(p, MAX_TOKENS, ("@@@", a.text[i % 3 :][:2])) for i, (p, a) in enumerate(stable.items())
        ]
        for request, output in zip(requests, engine.generate(requests), strict=True):
            whole = stable[request.prompt]
            assert output.text == cut_at_stop(whole.text, request.stop) != whole.text
            assert output.num_tokens <= len(whole.ids)

    def test_max_tokens_is_respected_request_by_request(self, engine: Engine, uniform: Reference) -> None:
        stable = uniform.stable()
        requests = [Generate(prompt, 1 + i % MAX_TOKENS) for i, prompt in enumerate(stable)]
        for request, output in zip(requests, engine.generate(requests), strict=True):
            ids = stable[request.prompt].ids[: request.max_tokens]
            assert output.text == uniform.tokenizer.decode(ids, skip_special_tokens=True)
            assert output.num_tokens == len(ids)

    def test_a_prompt_longer_than_the_model_keeps_its_end(self, engine: Engine, uniform: Reference) -> None:
        stable = uniform.stable([prompt + " xyz" * MAX_POSITIONS + prompt for prompt in PROMPTS])
        assert texts(engine, stable) == {prompt: answer.text for prompt, answer in stable.items()}

    def test_no_requests_give_no_outputs(self, engine: Engine) -> None:
        assert engine.submit([]) == []

    def test_it_refuses_a_base_it_lacks_and_answers_nothing_once_poisoned(
        self, tmp_path: Path, make_engine: Callable[[Family, Mixture], Engine]
    ) -> None:
        paths = make_family(tmp_path, self.arch, experts=2)
        del paths["base"]
        family = open_family(None, {name: str(path) for name, path in paths.items()})
        engine = make_engine(family, Mixture.one_hot(family.names, "math"))
        with pytest.raises(ConfigError, match="base"):
            engine.apply(Mixture.base_only(family.names))
        assert not engine.poisoned
        stable = Reference(paths["math"]).stable()
        assert texts(engine, stable) == {prompt: answer.text for prompt, answer in stable.items()}

        self.break_swap(engine, paths)
        with pytest.raises(PoisonedEngineError):
            engine.apply(Mixture.uniform(family.names))
        assert engine.poisoned
        with pytest.raises(PoisonedEngineError):
            engine.submit([Generate("a", 1)])
        with pytest.raises(PoisonedEngineError):
            engine.apply(Mixture.one_hot(family.names, "math"))
        engine.close()
        engine.close()


def texts(engine: Engine, prompts: Sequence[str] | dict[str, Answer]) -> dict[str, str]:
    """Greedy answers of MAX_TOKENS tokens, by prompt."""
    outputs = engine.generate([Generate(prompt, MAX_TOKENS) for prompt in prompts])
    return {prompt: output.text for prompt, output in zip(prompts, outputs, strict=True)}
