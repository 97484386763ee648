"""Trees of domains, and the search down and up them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search import load_tree, open_search, start_points
from mergemix.search.constraints import Constraints
from mergemix.search.tree import Node, Tree
from tests.search.conformance import drive

NAMES = ("web_math", "qa", "repos", "contests", "sft", "books")
YAML = """
order: {order}
tree:
  math: [web_math, qa]
  code: [repos, contests]
  rest:
    sft: sft
    others: [books]
"""
TARGET = np.array([0.4, 0.1, 0.15, 0.05, 0.2, 0.1])


def write(directory: Path, order: str = "top-down", text: str = YAML) -> Path:
    path = directory / "tree.yaml"
    path.write_text(text.format(order=order))
    return path


def near_target(mixture: Mixture) -> float:
    return -float(((np.array(mixture.weights) - TARGET) ** 2).sum())


def open_tree(tmp_path: Path, order: str, *, budget: int = 120, kind: str = "cma", **options):
    tree = load_tree(write(tmp_path, order), NAMES)
    return open_search(kind, NAMES, budget=budget, tree=tree, **options)


def test_a_tree_is_read_as_it_is_written(tmp_path: Path) -> None:
    tree = load_tree(write(tmp_path), NAMES)
    assert tree.order == "top-down"
    assert tree.root.leaves() == list(NAMES)
    assert [node.name for node in tree.stages()] == ["all domains", "math", "code", "rest"]
    assert [node.name for node in load_tree(write(tmp_path, "bottom-up"), NAMES).stages()] == [
        "rest", "code", "math", "all domains",
    ]  # fmt: skip
    assert tree.root.describe()["rest"] == {"sft": "sft", "others": {"books": "books"}}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("order: sideways\ntree: [web_math]", "order must be one of top-down, bottom-up, but is 'sideways'"),
        ("leaves: [a]", "must hold the keys tree"),
        ("tree: {{math: 3}}", "cluster 'math' must be a list"),
        ("tree: []", "cluster 'all domains' must be a list"),
        ("tree: [web_math, qa, repos, contests, sft, boks]", "no expert is called 'boks'"),
        ("tree: [web_math, web_math, qa, repos, contests, sft, books]", "'web_math' is there twice"),
        ("tree: [web_math, qa, repos, contests, sft]", "'books' is missing"),
        (
            "tree: {{books: [web_math, qa], b: [repos, contests, sft, books]}}",
            "must not be called as an expert is, but 'books'",
        ),
        ("tree: {{b: {{x: [web_math, qa]}}, x: [repos, contests, sft, books]}}", "'x' is used twice"),
        ("tree: [", "not valid YAML"),
    ],
)
def test_what_is_no_tree_of_the_experts_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        load_tree(write(tmp_path, text=text), NAMES)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the tree"):
        load_tree(tmp_path / "none.yaml", NAMES)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6).filter(lambda x: sum(x) > 0.01))
def test_shares_and_shares_inside_clusters_are_the_same_mixture(shares: list[float]) -> None:
    root = Node(
        "all", (Node("m", ("web_math", "qa")), "sft", Node("x", (Node("y", ("repos",)), "contests", "books")))
    )
    given_shares = dict(zip(NAMES, np.array(shares) / sum(shares), strict=True))
    tree = Tree(root, "top-down")
    flat = tree.flat(NAMES, tree.conditional(given_shares))
    np.testing.assert_allclose(flat, list(given_shares.values()), atol=1e-12)


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
@pytest.mark.parametrize("kind", ["cma", "random"])
def test_it_goes_cluster_by_cluster_and_ends_with_a_mixture_of_all(
    tmp_path: Path, order: str, kind: str
) -> None:
    search = open_tree(tmp_path, order, kind=kind)
    proposed = drive(search, near_target)
    starts = start_points(NAMES)
    assert proposed[: len(starts)] == starts
    assert len(set(proposed)) == len(proposed) <= 120
    best = max(proposed, key=near_target)
    assert near_target(best) > max(map(near_target, starts)) + 0.02
    alone = [m for m in proposed[len(starts) :] if sum(m.weights[:2]) == 1 and m.weights[0] != m.weights[1]]
    assert bool(alone) == (order == "bottom-up"), "only bottom-up searches inside a cluster alone"
    assert sum(w > 0 for w in best.weights) >= 4


def test_top_down_keeps_proportions_inside_clusters_until_their_turn(tmp_path: Path) -> None:
    prior = Mixture.of(NAMES, dict(zip(NAMES, (0.3, 0.1, 0.2, 0.2, 0.1, 0.1), strict=True)))
    search = open_tree(tmp_path, "top-down", prior=prior)
    proposed = drive(search, near_target)[len(start_points(NAMES, prior)) :]
    inside = [
        m.weights[0] / (m.weights[0] + m.weights[1]) for m in proposed if m.weights[0] + m.weights[1] > 0.1
    ]
    assert inside[0] == pytest.approx(0.75, abs=1e-3)
    assert inside[5] == pytest.approx(0.75, abs=1e-3)
    assert np.ptp(inside) > 0.1, "then they are searched"


def test_it_needs_a_budget_for_every_cluster(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must cover the 20 start points"):
        open_tree(tmp_path, "top-down", budget=19)
    assert drive(open_tree(tmp_path, "top-down", budget=20), near_target)


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
@pytest.mark.parametrize("kind", ["cma", "random", "grid"])
def test_it_is_resumed_from_what_is_stored(tmp_path: Path, order: str, kind: str) -> None:
    whole = drive(open_tree(tmp_path, order, kind=kind, budget=60), near_target)
    again = open_tree(tmp_path, order, kind=kind, budget=60)
    paid = []
    while not again.stop():
        for mixture in reversed(again.ask()):
            paid.append(mixture)
            again.tell([(mixture, near_target(mixture))])
    assert set(paid) == set(whole)
    assert again.identity != open_tree(tmp_path, order, kind=kind, budget=61).identity


@pytest.mark.parametrize("order", ["top-down", "bottom-up"])
def test_failures_and_constraints(tmp_path: Path, order: str) -> None:
    region = Constraints(max={"web_math": 0.3}, min={"books": 0.05}).region(NAMES)
    search = open_tree(tmp_path, order, region=region, budget=60)
    calls = iter(range(10_000))
    proposed = drive(search, lambda m: None if next(calls) % 4 == 3 else near_target(m))
    assert all(region.contains(mixture) for mixture in proposed)
    assert len(proposed) > 30


@pytest.mark.parametrize("kind", ["bo", "cma", "random"])
def test_a_cluster_without_a_share_ends(tmp_path: Path, kind: str) -> None:
    """All that its search can ask for is one and the same candidate, known already: no budget ever runs out."""
    search = open_tree(tmp_path, "top-down", budget=40, kind=kind)
    drive(search, lambda mixture: -sum(mixture.as_dict()[name] for name in ("web_math", "qa")))
    assert set(search.stop()) & {"hierarchy", "budget"}
    best = max(search.told(), key=lambda pair: pair[1].utility)[0]
    assert best.as_dict()["web_math"] + best.as_dict()["qa"] == 0
