"""The whole preflight of a family: its weights, a little text, and scores along the lines between its experts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from mergemix.checkpoints.family import Family, open_family
from mergemix.config import ENGINES
from mergemix.errors import ConfigError, EngineError
from mergemix.evals.benchmark import Context, load_benchmarks
from mergemix.evals.suite import Suite
from mergemix.evaluator import answer
from mergemix.mixture import Mixture
from mergemix.preflight.family import preflight_family
from mergemix.preflight.path_checks import Answers, Barrier, barriers_of, own_domains, path_checks
from mergemix.preflight.routing import num_experts
from mergemix.preflight.text_checks import Findings, check_curvature, check_routing
from mergemix.preflight.texts import Snippet, Texts, read_texts
from mergemix.preflight.verdict import Check, worst
from mergemix.serve import open_engine, resolve_kind
from mergemix.serve.engine import Engine, EngineSpec, Generate, LogLikelihood
from mergemix.serve.tokens import encode_prompt, load_tokenizer

# Where a line from an expert to the uniform merge is looked at, and one between two experts.
TO_UNIFORM = (0.25, 0.5, 0.75)
BETWEEN = (0.5,)
# Documents of each domain, and tokens of each: enough for standard errors of about 0.02 nats. Second derivatives cost
# more, and their norms are not a mean of noise: a few documents tell their size.
DOCUMENTS, TOKENS = 64, 512
CURVED_DOCUMENTS, CURVED_TOKENS = 8, 256

# Nats a token: what a text counts of which a broken model gives no finite likelihood.
NO_LOSS = 1000.0

Stage = Callable[[str], None]
Asked = dict[str, Answers] | str  # by domain or benchmark; or why weights could not be scored


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What `mergemix preflight` is asked to do. Raises ConfigError when that makes no sense."""

    experts: Mapping[str, str]
    """Expert name -> local directory or Hub id."""
    base: str | None = None
    """Where they were trained from; without it less can be told."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """Domain -> JSON Lines file of held-out text, as `mergemix train` takes it. Names of experts are their domains."""
    bench: tuple[str, ...] = ()
    """Benchmarks whose scores are taken along the lines; without any, the loss on `data` is."""
    include_path: tuple[str, ...] = ()
    """Directories with task files for lm-evaluation-harness."""
    allow_code_execution: bool = False
    """Let benchmarks run what models write, in a sandbox."""
    engine: str = "auto"
    max_model_len: int | None = None
    """Tokens of prompt plus answer; the model's own limit when not given."""
    memory: int = 256 << 20
    """Bytes for the buffers of the pass over the weights."""

    def __post_init__(self) -> None:
        if not self.experts:
            raise ConfigError("no expert was given; give --experts NAME=PATH once per expert")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, but is {self.engine!r}")


def preflight(config: PreflightConfig, stage: Stage = lambda text: None) -> dict[str, Any]:
    """Everything that can be told before a search of whether merging these experts stands for training.

    Returns what `preflight_family` does and, where data or benchmarks are given, routing, curvature and paths;
    not_measured says why something is not there. verdict is the worst of all checks. stage: told what is being done.
    Raises MergeMixError for everything that a user can mend.
    """
    stage("reading checkpoints")
    kind = resolve_kind(config.engine)
    family = open_family(config.base, config.experts)
    root = family.template.root
    texts = read_texts(config.data, root, documents=DOCUMENTS, tokens=TOKENS)
    suite = _load_suite(config, root, kind)
    stage("comparing weights")
    result = preflight_family(family, memory_bytes=config.memory)
    if any(check["name"] == "finite" and check["verdict"] != "fine" for check in result["checks"]):
        why = "no model can be made of weights that are NaN or Inf"
        findings = [Findings(missing=dict.fromkeys(("routing", "curvature", "paths"), why))]
    else:
        findings = [
            _routing(family, texts, suite, stage),
            _curvature(family, texts, stage),
            _paths(config, family, kind, texts, suite, stage),
        ]
    for found in findings:
        result |= found.measured
        result["checks"] += [check.as_dict() for check in found.checks]
    result["not_measured"] = {name: why for found in findings for name, why in found.missing.items()}
    result["verdict"] = worst(check["verdict"] for check in result["checks"])
    return result


def _load_suite(config: PreflightConfig, root: Path, kind: Literal["vllm", "hf"]) -> Suite | None:
    if not config.bench:
        return None
    context = Context(
        root=root,
        include_paths=tuple(Path(path) for path in config.include_path),
        allow_code=config.allow_code_execution,
        max_model_len=config.max_model_len,
        seed=0,
        engine=kind,
    )
    return Suite(load_benchmarks(config.bench, context))


def _routing(family: Family, texts: Texts, suite: Suite | None, stage: Stage) -> Findings:
    if texts or num_experts(family.template.config) is None:
        return check_routing(family, texts, stage)
    if suite is not None:
        return check_routing(family, {"prompts": prompts_of(suite, family.template.root)}, stage)
    return Findings(missing={"routing": "it needs a little text: give --data, or --bench"})


def _curvature(family: Family, texts: Texts, stage: Stage) -> Findings:
    if not texts:
        return Findings(missing={"curvature": "it needs a little text of each domain: give --data"})
    short = {
        domain: [
            Snippet(snippet.ids[:CURVED_TOKENS], snippet.num_read)
            for snippet in snippets
            if snippet.num_read < CURVED_TOKENS
        ]
        for domain, snippets in texts.items()
    }
    few = {domain: tuple(snippets[:CURVED_DOCUMENTS]) for domain, snippets in short.items() if snippets}
    found = check_curvature(family, few, stage)
    why = f"its prompts leave nothing to score within {CURVED_TOKENS} tokens"
    found.missing |= {f"curvature of {domain}": why for domain in texts if domain not in few}
    return found


def _paths(
    config: PreflightConfig,
    family: Family,
    kind: Literal["vllm", "hf"],
    texts: Texts,
    suite: Suite | None,
    stage: Stage,
) -> Findings:
    questions: list[Questions] = [TextQuestions(texts)] if texts else []
    if suite is not None:
        questions.append(SuiteQuestions(suite))
    if not questions:
        return Findings(missing={"paths": "they need something to score: give --data, or --bench"})
    with tempfile.TemporaryDirectory(prefix="mergemix-preflight-") as folder:
        spec = EngineSpec(family, kind, max_model_len=config.max_model_len, log=Path(folder) / "engine.log")
        stage(f"starting {kind}")
        with open_engine(spec, Mixture.uniform(family.names)) as engine:
            return measure_paths(engine, family, questions, stage)


class Questions(Protocol):
    """What every model on the lines is asked. name: of the answers. unit: of their values. losses: lower is better."""

    name: str
    unit: str
    losses: bool

    def ask(self, engine: Engine) -> dict[str, Answers]:
        """By domain or benchmark, of the weights that the engine holds. Raises EngineError."""


class TextQuestions:
    """Loss on a little text of each domain."""

    name, unit, losses = "loss", "nats a token", True

    def __init__(self, texts: Texts) -> None:
        self._texts = texts

    def ask(self, engine: Engine) -> dict[str, Answers]:
        asked = [snippet for snippets in self._texts.values() for snippet in snippets]
        requests = [LogLikelihood(each.ids[: each.num_read], each.ids[each.num_read :]) for each in asked]
        outputs = iter(engine.loglikelihood(requests))
        found = {}
        for domain, snippets in self._texts.items():
            answered = [next(outputs) for _ in snippets]
            tokens = np.array([max(output.num_tokens, 1) for output in answered], float)
            losses = np.array([-output.logprob for output in answered]) / tokens
            found[domain] = Answers(np.minimum(np.nan_to_num(losses, nan=NO_LOSS), NO_LOSS), tokens)
        return found


class SuiteQuestions:
    """Scores on benchmarks, with their sign changed where higher is better."""

    name, unit, losses = "score", "of the score", False

    def __init__(self, suite: Suite) -> None:
        self._suite = suite

    def ask(self, engine: Engine) -> dict[str, Answers]:
        results, _ = answer(engine, self._suite.batch())
        self._suite.check_scored(results)
        scores = self._suite.item_scores(results)
        better = self._suite.directions  # 1, or -1 where lower is better
        return {
            name: Answers(-better[name] * values, np.ones(len(values))) for name, values in scores.items()
        }


def prompts_of(suite: Suite, root: Path) -> tuple[Snippet, ...]:
    """The beginnings of the suite's first prompts, as the engines read them. root: of the tokenizer."""
    tokenizer = load_tokenizer(root)
    requests = suite.batch().requests[:DOCUMENTS]
    texts = [request.prompt if isinstance(request, Generate) else request.context for request in requests]
    encoded = [tuple(encode_prompt(tokenizer, text)[:TOKENS]) for text in texts]
    return tuple(Snippet(ids, len(ids)) for ids in encoded)


def measure_paths(
    engine: Engine, family: Family, questions: list[Questions], stage: Stage = lambda text: None
) -> Findings:
    """Ask every mixture on the lines between experts, and the base.

    engine: of the family. Lines go from each expert to the uniform merge and between each two experts; costs one
    evaluation for each of 1 + K + 1 ends and 3K + K(K - 1)/2 points between them.
    paths: by questions ("loss", "score"), the answers of the ends and the barrier of every line (see `Barrier`). What
    weights could not be scored is left out there, and a check.
    Raises EngineError when the engine fails, or none of the ends could be scored.
    """
    names = family.names
    ends = {name: Mixture.one_hot(names, name) for name in names}
    lines: list[tuple[str, str, tuple[float, ...]]] = []
    if len(names) > 1:
        ends["uniform"] = Mixture.uniform(names)
        lines += [(name, "uniform", TO_UNIFORM) for name in names]
    if len(names) > 2:  # the middle of two alone is their uniform merge
        lines += [(one, other, BETWEEN) for one, other in combinations(names, 2)]
    if family.base is not None:
        ends["base"] = Mixture.base_only(names)
    total, done = len(ends) + sum(len(shares) for *_, shares in lines), 0

    def ask(mixture: Mixture) -> list[Asked]:
        nonlocal done
        done += 1
        stage(f"paths: {done} of {total}, {mixture}")
        engine.apply(mixture)
        return [_answers(each, engine) for each in questions]

    at_ends = {name: ask(mixture) for name, mixture in ends.items()}
    at_points = [
        [(share, ask(between(ends[a], ends[b], share))) for share in shares] for a, b, shares in lines
    ]
    findings = Findings({"paths": {}})
    for q, each in enumerate(questions):
        points = [
            (a, b, [(share, answers[q]) for share, answers in found])
            for (a, b, _), found in zip(lines, at_points, strict=True)
        ]
        own_ends = {name: answers[q] for name, answers in at_ends.items()}
        measured, checks = _along(each, names, own_ends, points)
        findings.measured["paths"][each.name] = measured
        findings.checks += checks
    return findings


def _answers(questions: Questions, engine: Engine) -> Asked:
    try:
        return questions.ask(engine)
    except EngineError as error:  # weights that answer nothing are a finding: an expert that diverged
        return str(error)


def _along(
    questions: Questions,
    experts: tuple[str, ...],
    ends: Mapping[str, Asked],
    lines: list[tuple[str, str, list[tuple[float, Asked]]]],
) -> tuple[dict[str, Any], list[Check]]:
    """What one kind of question gave: for programs, and the verdicts. Raises EngineError when nothing was answered."""
    failed = {name: found for name, found in ends.items() if isinstance(found, str)}
    if len(failed) == len(ends):
        raise EngineError(next(iter(failed.values())))
    answered = {name: found for name, found in ends.items() if not isinstance(found, str)}
    barriers: list[Barrier] = []
    for a, b, points in lines:
        failed |= {f"{a} merged with {b}": found for _, found in points if isinstance(found, str)}
        known = [(share, found) for share, found in points if not isinstance(found, str)]
        if a in answered and b in answered and known:
            barriers += barriers_of(a, b, answered, known)
    sign = 1 if questions.losses else -1
    measured = {
        "unit": questions.unit,
        "ends": {
            end: {name: sign * found.mean for name, found in answers.items()}
            for end, answers in answered.items()
        },
        "barriers": [barrier.as_dict() for barrier in barriers],
    }
    checks = []
    if failed:
        why = f"{', '.join(failed)} cannot be scored: {next(iter(failed.values()))}"
        checks = [Check("answers", "do not trust", why)]
    own = {name: domain for name, domain in own_domains(experts, answered).items() if name in answered}
    return measured, [
        *checks,
        *path_checks(answered, barriers, own, unit=questions.unit, losses=questions.losses),
    ]


def between(begin: Mixture, end: Mixture, share: float) -> Mixture:
    """(1 - share) * begin + share * end."""
    pairs = zip(begin.weights, end.weights, strict=True)
    return Mixture(begin.names, tuple((1 - share) * a + share * b for a, b in pairs))
