"""What every engine promises, as tests: subclass EngineConformance and give it an engine."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
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
    *(
        "the cat 12",
        "a",
        "In the beginning",
        "x = 3 + 4;",
        "hello world, how are you",
        "QQ",
        "abc the end of",
    ),
    *(
        "12 12 12",
        "def f(x): return",
        "Once upon a time there was a",
        "",
        "one two three four five six seven",
    ),
    *("Zürich?", "in in in\n", "The capital of France is", "9 * 9 = ", "<s>begin", "##", "why not the other"),
)
PAIRS = (
    *(("the cat", " sat in the hat"), ("the cat ", "sat"), ("", "the end"), ("1 + 1 =", " 2"), ("a", "b")),
    *(("Q: why?\nA:", " abc"), ("In the beginning there was a long context", "."), ("   ", "spaces")),
    ("x", "y z w the in er 12"),
)
MAX_TOKENS = 8
# A greedy answer is compared only as far as no runner-up comes this close, in fp32 logits of standard
# deviation 2.4: bf16 rounds logits of this size to steps of 1/32, and roundings add up.
MARGIN = 0.15

StartEngine = Callable[[Family, Mixture], Engine]


@dataclass(frozen=True)
class Answer:
    """Greedy ids (the end token included) and their text without special tokens."""

    ids: tuple[int, ...]
    text: str


class Reference:
    """A checkpoint on disk, loaded by plain transformers.

    Sequences are padded on the right and nothing is masked or cached: a causal model needs neither.
    """

    def __init__(self, directory: Path) -> None:
        self.tokenizer = load_tokenizer(directory)
        self.ends = end_tokens(directory, self.tokenizer)
        self.exact = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.rounded = AutoModelForCausalLM.from_pretrained(directory)

    def stable(self, prompts: Sequence[str] = PROMPTS, max_tokens: int = MAX_TOKENS) -> dict[str, Answer]:
        """Greedy answers up to the first token that rounding could change; prompts with none are left out."""
        starts = [
            encode_prompt(self.tokenizer, prompt)[-(MAX_POSITIONS - max_tokens) :] for prompt in prompts
        ]
        sequences = [list(start) for start in starts]
        for _ in range(max_tokens):
            for sequence, logits in zip(sequences, self._logits(self.exact, sequences), strict=True):
                sequence.append(int(logits[-1].argmax()))
        exact, rounded = self._logits(self.exact, sequences), self._logits(self.rounded, sequences)
        found = {}
        for prompt, start, sequence, truth, noisy in zip(
            prompts, starts, sequences, exact, rounded, strict=True
        ):
            ids: list[int] = []
            for place in range(len(start), len(sequence)):
                top = truth[place - 1].topk(2).values
                doubtful = top[0] - top[1] < MARGIN or noisy[place - 1].argmax() != sequence[place]
                if doubtful or (ids and ids[-1] in self.ends):
                    break
                ids.append(sequence[place])
            if ids:
                found[prompt] = Answer(tuple(ids), self.tokenizer.decode(ids, skip_special_tokens=True))
        assert len(found) > len(prompts) / 2
        return found

    def likelihoods(self, model: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[Likelihood, float]]:
        """Each pair's likelihood, and the smallest lead of a most probable token over its runner-up."""
        encoded = [encode_pair(self.tokenizer, *pair) for pair in pairs]
        found = []
        batch = self._logits(model, [before + scored for before, scored in encoded])
        for (before, scored), whole in zip(encoded, batch, strict=True):
            logits = whole[len(before) - 1 : -1]
            top = logits.topk(2).values
            logprobs = logits.log_softmax(-1)[range(len(scored)), scored]
            is_greedy = logits.argmax(-1).tolist() == scored
            likelihood = Likelihood(float(logprobs.sum()), len(scored), is_greedy)
            found.append((likelihood, float((top[:, 0] - top[:, 1]).min())))
        return found

    def greedy_pairs(self) -> list[tuple[str, str]]:
        """Contexts with their clearly most probable next token, where the pair is encoded as that token."""
        pairs = []
        for prompt, answer in self.stable(max_tokens=1).items():
            ids = encode_prompt(self.tokenizer, prompt)
            if prompt and encode_pair(self.tokenizer, prompt, answer.text) == (ids, [*answer.ids]):
                pairs.append((prompt, answer.text))
        assert len(pairs) >= 3
        return pairs

    @staticmethod
    @torch.inference_mode()
    def _logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Per sequence, fp32 (length, vocabulary)."""
        longest = max(map(len, sequences))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
        logits = model(input_ids=padded, use_cache=False).logits.float()
        return [row[: len(ids)] for row, ids in zip(logits, sequences, strict=True)]


def mixtures_in_mixed_order(names: tuple[str, ...]) -> list[Mixture]:
    """For three experts: corner, inside, corner, part base, base, outside the simplex, first again."""
    weights = [(1, 0, 0), (0.2, 0.5, 0.3), (0, 0, 1), (0.5, 0.1, 0.1), (0, 0, 0), (1.2, -0.3, 0.1), (1, 0, 0)]
    return [Mixture(names, tuple(map(float, each))) for each in weights]


class EngineConformance:
    """Subclasses set `arch`, define the fixture `make_engine`, and override `break_swap` if it must differ.

    The engine is shared by the tests of a class, so every test first applies the weights it needs.
    """

    arch: Arch

    @pytest.fixture(scope="class")
    @classmethod
    def make_engine(cls) -> StartEngine:
        raise NotImplementedError("a subclass says how its engine is started")

    def break_swap(self, engine: Engine, paths: dict[str, Path]) -> None:
        """Make the engine's next apply() fail halfway. Here: the last expert's file loses its second half."""
        shard = list(paths.values())[-1] / "model.safetensors"
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)

    @pytest.fixture(scope="class")
    @classmethod
    def paths(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
        return make_family(tmp_path_factory.mktemp(cls.arch), cls.arch)

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, paths: dict[str, Path]) -> Family:
        experts = {name: str(path) for name, path in paths.items() if name != "base"}
        return open_family(str(paths["base"]), experts)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, family: Family, make_engine: StartEngine) -> Iterator[Engine]:
        with make_engine(family, Mixture.uniform(family.names)) as engine:
            yield engine

    @pytest.fixture(scope="class")
    @classmethod
    def reference(
        cls, family: Family, tmp_path_factory: pytest.TempPathFactory
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
        """Uniform weights, applied to the engine, and the reference that holds them."""
        mixture = Mixture.uniform(family.names)
        engine.apply(mixture)
        return reference(mixture)

    def test_a_one_hot_mixture_answers_as_the_expert_loaded_alone(
        self, engine: Engine, family: Family, paths: dict[str, Path]
    ) -> None:
        answers = set()
        for name in family.names:
            engine.apply(Mixture.one_hot(family.names, name))
            check_answers(engine, Reference(paths[name]).stable())
            outputs = engine.generate([Generate(prompt, MAX_TOKENS) for prompt in PROMPTS])
            answers.add(tuple(output.text for output in outputs))
        assert len(answers) == len(family.names)

    def test_every_swap_in_mixed_order_answers_as_a_fresh_load_of_the_merge_on_disk(
        self, engine: Engine, family: Family, reference: Callable[[Mixture], Reference]
    ) -> None:
        for mixture in mixtures_in_mixed_order(family.names):
            swap = engine.apply(mixture)
            assert swap.seconds > 0
            assert swap.bytes_written > 0
            fresh = reference(mixture)
            check_answers(engine, fresh.stable(), mixture)
            check_likelihoods(engine, fresh, PAIRS)

    def test_loglikelihoods_are_sums_over_the_continuation_and_say_whether_it_is_greedy(
        self, engine: Engine, uniform: Reference
    ) -> None:
        outputs = check_likelihoods(engine, uniform, [*PAIRS, *uniform.greedy_pairs()])
        assert all(output.is_greedy for output in outputs[len(PAIRS) :])
        assert not all(output.is_greedy for output in outputs)

    def test_answers_are_deterministic_and_do_not_depend_on_order(
        self, engine: Engine, uniform: Reference
    ) -> None:
        stable = uniform.stable()
        prompts = list(stable)
        check_answers(engine, stable)
        check_answers(engine, stable)
        random.Random(0).shuffle(prompts)
        check_answers(engine, {prompt: stable[prompt] for prompt in prompts})
        check_answers(engine, {prompts[0]: stable[prompts[0]]})

    def test_a_mixed_batch_is_answered_in_its_order(self, engine: Engine, uniform: Reference) -> None:
        stable = uniform.stable()
        exact = dict(zip(PAIRS, uniform.likelihoods(uniform.exact, PAIRS), strict=True))
        requests: list[Any] = [Generate(prompt, len(answer.ids)) for prompt, answer in stable.items()]
        requests += [LogLikelihood(*pair) for pair in PAIRS]
        random.Random(1).shuffle(requests)
        for request, output in zip(requests, engine.submit(requests), strict=True):
            if isinstance(request, Generate):
                assert isinstance(output, Generated)
                assert output.text == stable[request.prompt].text
            else:
                assert isinstance(output, Likelihood)
                truth, _ = exact[request.context, request.continuation]
                assert output.num_tokens == truth.num_tokens
                assert output.logprob == pytest.approx(truth.logprob, abs=0.3 * truth.num_tokens)

    def test_stop_strings_cut_the_answer(self, engine: Engine, uniform: Reference) -> None:
        stable = {prompt: answer for prompt, answer in uniform.stable().items() if len(answer.text) >= 3}
        requests = [
            Generate(prompt, len(answer.ids), ("@@@", answer.text[i % 3 :][:2]))
            for i, (prompt, answer) in enumerate(stable.items())
        ]
        assert len(requests) >= 5
        for request, output in zip(requests, engine.generate(requests), strict=True):
            whole = stable[request.prompt]
            assert output.text == cut_at_stop(whole.text, request.stop) != whole.text
            assert 0 < output.num_tokens <= len(whole.ids)

    def test_max_tokens_is_respected_request_by_request(self, engine: Engine, uniform: Reference) -> None:
        stable = uniform.stable()
        requests = [Generate(p, 1 + i % len(answer.ids)) for i, (p, answer) in enumerate(stable.items())]
        assert len({request.max_tokens for request in requests}) > 2
        for request, output in zip(requests, engine.generate(requests), strict=True):
            ids = stable[request.prompt].ids[: request.max_tokens]
            assert output.text == uniform.tokenizer.decode(ids, skip_special_tokens=True)
            assert output.num_tokens == len(ids)

    def test_a_prompt_longer_than_the_model_keeps_its_end(self, engine: Engine, uniform: Reference) -> None:
        prompts = [f"{prompt} xyz" * MAX_POSITIONS + prompt for prompt in PROMPTS]
        check_answers(engine, uniform.stable(prompts, max_tokens=1))

    def test_no_requests_give_no_outputs(self, engine: Engine) -> None:
        assert engine.submit([]) == []

    def test_it_refuses_a_base_it_lacks_and_answers_nothing_once_poisoned(
        self, tmp_path: Path, make_engine: StartEngine
    ) -> None:
        paths = make_family(tmp_path, self.arch, experts=2)
        del paths["base"]
        family = open_family(None, {name: str(path) for name, path in paths.items()})
        math = Mixture.one_hot(family.names, "math")
        engine = make_engine(family, math)
        with pytest.raises(ConfigError, match="base"):
            engine.apply(Mixture.base_only(family.names))
        assert not engine.poisoned
        check_answers(engine, Reference(paths["math"]).stable())

        self.break_swap(engine, paths)
        with pytest.raises(PoisonedEngineError):
            engine.apply(Mixture.uniform(family.names))
        assert engine.poisoned
        with pytest.raises(PoisonedEngineError):
            engine.submit([Generate("a", 1)])
        with pytest.raises(PoisonedEngineError):
            engine.apply(math)
        engine.close()
        engine.close()


def check_answers(engine: Engine, expected: dict[str, Answer], note: object = None) -> None:
    """Every prompt's greedy answer, as long as the expected one, is the expected one."""
    outputs = engine.generate([Generate(prompt, len(answer.ids)) for prompt, answer in expected.items()])
    texts = {prompt: output.text for prompt, output in zip(expected, outputs, strict=True)}
    assert texts == {prompt: answer.text for prompt, answer in expected.items()}, note


def check_likelihoods(
    engine: Engine, reference: Reference, pairs: Sequence[tuple[str, str]]
) -> list[Likelihood]:
    """Each log-probability is as near to fp32 truth, per token, as 3 times what bf16 transformers reaches."""
    outputs = engine.loglikelihood([LogLikelihood(*pair) for pair in pairs])
    exact = reference.likelihoods(reference.exact, pairs)
    rounded = reference.likelihoods(reference.rounded, pairs)
    noise = max(
        abs(noisy.logprob - truth.logprob) / truth.num_tokens
        for (noisy, _), (truth, _) in zip(rounded, exact, strict=True)
    )
    for output, (truth, margin) in zip(outputs, exact, strict=True):
        assert output.num_tokens == truth.num_tokens
        assert abs(output.logprob - truth.logprob) <= truth.num_tokens * (3 * noise + 0.01)
        if margin > MARGIN:
            assert output.is_greedy == truth.is_greedy
    return outputs
