"""Rules of the layout that a reader relies on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Imports point downwards in this list; what stands in one line does not know its neighbours.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"options"},
    {"run", "generate", "fit", "design", "solve", "compare", "verify", "path_scores"},
    {"demo", "report", "doctor"},
    {"preparation"},
    {"evidence", "warm_start", "trained"},
    {"stored"},
    {"course", "identity", "valuation"},
    {"evaluator"},
    {"search"},
    {"study", "evals"},
    {"preflight"},
    {"train"},
    {"serve"},
    {"merge"},
    {"checkpoints"},
    {"config", "mixture", "measured", "rank_stats"},
    {"errors", "units"},
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}
PRODUCT = sorted((ROOT / "mergemix").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def unit(path: Path) -> str:
    """The part of the product that a file belongs to: a package or a module directly in mergemix/."""
    return path.relative_to(ROOT / "mergemix").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.parent.name != "mergemix" or p.name != "__init__.py"],
                         ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_imports_point_downwards(path: Path) -> None:
    own = unit(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "mergemix" and len(parts) > 1 and parts[1] in LAYER_OF and parts[1] != own:
            assert LAYER_OF[parts[1]] > LAYER_OF[own], f"{own} must not import {name}"


def test_every_part_has_a_layer() -> None:
    assert {unit(path) for path in PRODUCT} - {"__init__"} <= set(LAYER_OF)


def test_search_and_study_and_evals_know_engines_only_by_their_protocol() -> None:
    for path in PRODUCT:
        if unit(path) in {"search", "study", "evals"}:
            served = {name for name in imported(path) if name.startswith("mergemix.serve")}
            allowed = {"mergemix.serve", "mergemix.serve.engine"}
            assert all(name in allowed or name.startswith("mergemix.serve.engine.") for name in served), path


def test_kernels_stand_alone() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the Hub's package `kernels`"
    for path in KERNELS:
        assert not any(name.split(".")[0] == "mergemix" for name in imported(path)), path


def test_only_the_command_line_prints_or_exits() -> None:
    for path in PRODUCT:
        if unit(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"print", "exit", "sys.exit", "quit"}, f"{path}:{node.lineno} {called}"


def test_the_search_loop_fits_one_screen() -> None:
    tree = ast.parse((ROOT / "mergemix" / "run.py").read_text())
    [loop] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    assert loop.end_lineno is not None
    assert loop.end_lineno - loop.lineno < 60
