"""The forms a benchmark can have: what is asked for an item, and what the outputs are worth."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergemix.evals import code
from mergemix.evals.choices import NORMALIZED_BY, chosen, most_likely
from mergemix.evals.extract import CodeBlock, Extractor
from mergemix.evals.graders import Choice, Code, TextGrader, grade
from mergemix.evals.items import Item
from mergemix.evals.suite import Score
from mergemix.serve.engine import Generate, Generated, Likelihood, LogLikelihood, Request

REFERENCE_METRICS = ("loglikelihood", "perplexity", "bits_per_byte")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right, when `right` of `samples` are: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021, "Evaluating Large Language Models Trained on Code".
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. samples: of each item. pass_at: k of pass@k, None for the mean.

    temperature: 0 is greedy. seed: of the benchmark, every item and sample gets its own from it.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    pass_at: int | None = None
    seed: int = 0

    def seed_of(self, item: Item, sample: int) -> int:
        """Of 63 bits. 0 where nothing is drawn, so that greedy requests do not depend on the seed."""
        if self.temperature == 0:
            return 0
        digest = hashlib.sha256(json.dumps([self.seed, item.id, sample]).encode()).digest()
        return int.from_bytes(digest[:8]) >> 1


@dataclass(frozen=True)
class Generation:
    """The model writes; what is extracted from its answer is graded: 1 or 0.

    extract: None grades the whole answer (of code: its last code block, where it has one). An answer from which nothing
    can be extracted is wrong.
    """

    grader: TextGrader | Choice | Code
    max_tokens: int
    stop: tuple[str, ...] = ()
    extract: Extractor | None = None
    sampling: Sampling = Sampling()

    higher_is_better = True

    @property
    def metric(self) -> str:
        if self.sampling.pass_at is not None:
            return f"pass@{self.sampling.pass_at}"
        return "accuracy" if self.sampling.samples == 1 else f"mean@{self.sampling.samples}"

    def requests(self, item: Item) -> list[Request]:
        drawn = self.sampling
        return [
            Generate(
                item.prompt,
                self.max_tokens,
                self.stop,
                drawn.temperature,
                drawn.top_p,
                drawn.seed_of(item, n),
            )
            for n in range(drawn.samples)
        ]

    def score(self, item: Item, outputs: Sequence[Generated]) -> Score:
        """The text is the answer, or a JSON list of several."""
        texts = [output.text for output in outputs]
        grades = [self._grade(item, text) for text in texts]
        text = texts[0] if len(texts) == 1 else json.dumps(texts, ensure_ascii=False)
        if self.sampling.pass_at is not None:
            return Score(pass_at_k(len(grades), int(sum(grades)), self.sampling.pass_at), text)
        return Score(math.fsum(grades) / len(grades), text)

    def _grade(self, item: Item, text: str) -> float:
        answer = self._extracted(text)
        if answer is None:
            return 0.0
        if isinstance(self.grader, Code):
            assert item.tests is not None, "the loader gives every item of a code benchmark its tests"
            return float(code.passes(self.grader, answer, item.tests))
        if isinstance(self.grader, Choice):
            return float(chosen(answer, item.choices) == item.choices.index(item.answers[0]))
        return grade(self.grader, answer, item.answers)

    def _extracted(self, text: str) -> str | None:
        if self.extract is not None:
            return self.extract(text)
        block = CodeBlock()(text) if isinstance(self.grader, Code) else None
        return text if block is None else block


@dataclass(frozen=True)
class ChoiceLikelihood:
    """Nothing is written: the likeliest choice is the answer.

    normalize: by what log-likelihoods are divided (NORMALIZED_BY). By the characters of the choice is acc_norm of
    lm-evaluation-harness, by its bytes acc_bytes.
    """

    normalize: str = "none"

    metric = "accuracy"
    higher_is_better = True

    def requests(self, item: Item) -> list[Request]:
        return [LogLikelihood(item.prompt, continuation) for continuation in item.continuations]

    def score(self, item: Item, outputs: Sequence[Likelihood]) -> Score:
        length = NORMALIZED_BY[self.normalize]
        normalized = [
            output.logprob / length(choice, output.num_tokens)
            for choice, output in zip(item.choices, outputs, strict=True)
        ]
        answer = item.choices[most_likely(normalized)]
        return Score(float(answer == item.answers[0]), answer)


@dataclass(frozen=True)
class ReferenceText:
    """The likelihood of the reference text after the prompt, or of a text alone. metric: one of REFERENCE_METRICS.

    loglikelihood: in nats, summed over the tokens. perplexity: exp(-loglikelihood / tokens). bits_per_byte:
    -loglikelihood / ln 2 / bytes of the text in UTF-8.
    """

    metric: str

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "loglikelihood"

    def requests(self, item: Item) -> list[Request]:
        return [LogLikelihood(item.prompt, continuation) for continuation in item.continuations]

    def score(self, item: Item, outputs: Sequence[Likelihood]) -> Score:
        [output] = outputs
        if output.cut and not item.prompt:
            # Part of the text itself was not scored, and which part depends on the model's length.
            return Score(
                None,
                error=f"the text is {output.cut} tokens longer than the model can read: cut it into several items",
            )
        if not output.num_tokens:
            return Score(None, error="the text gives no token to score")
        if self.metric == "perplexity":
            return Score(math.exp(-output.logprob / output.num_tokens))
        if self.metric == "bits_per_byte":
            return Score(-output.logprob / math.log(2) / item.num_bytes)
        return Score(output.logprob)

    def report(self, items: Sequence[Item], scores: Sequence[Score]) -> dict[str, float]:
        """bits_per_byte of all texts together, as the field reports it: long ones count for more than in the mean."""
        pairs = [
            (item.num_bytes, score.value)
            for item, score in zip(items, scores, strict=True)
            if score.value is not None
        ]
        if self.metric != "bits_per_byte" or not pairs:
            return {}
        bits = math.fsum(num_bytes * value for num_bytes, value in pairs)
        return {"bits_per_byte of all text": bits / sum(num_bytes for num_bytes, _ in pairs)}


Form = Generation | ChoiceLikelihood | ReferenceText
