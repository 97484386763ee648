"""A tree of domains: which experts belong together, and in which order their shares are decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergemix.errors import ConfigError

Order = Literal["top-down", "bottom-up"]
ORDERS: tuple[Order, ...] = ("top-down", "bottom-up")


@dataclass(frozen=True)
class Node:
    """A cluster of domains. children: clusters, and names of experts."""

    name: str
    children: tuple[Node | str, ...]

    @property
    def child_names(self) -> tuple[str, ...]:
        return tuple(child if isinstance(child, str) else child.name for child in self.children)

    def leaves(self) -> list[str]:
        """Names of the experts below, from left to right."""
        return [
            leaf
            for child in self.children
            for leaf in ([child] if isinstance(child, str) else child.leaves())
        ]

    def clusters(self) -> list[Node]:
        """This node and all clusters below it, parents first."""
        below = [
            cluster for child in self.children if isinstance(child, Node) for cluster in child.clusters()
        ]
        return [self, *below]

    def describe(self) -> dict[str, Any]:
        """The tree as the YAML file has it."""
        return {
            name: child.describe() if isinstance(child, Node) else child
            for name, child in zip(self.child_names, self.children, strict=True)
        }


@dataclass(frozen=True)
class Tree:
    """All experts as leaves of one tree. order: whether shares are decided across clusters first, or inside them."""

    root: Node
    order: Order

    def stages(self) -> list[Node]:
        """The clusters whose inner shares are to be decided, in order: those with two children or more."""
        clusters = self.root.clusters()
        if self.order == "bottom-up":
            clusters = clusters[::-1]
        return [cluster for cluster in clusters if len(cluster.children) > 1]

    def flat(
        self, names: Sequence[str], inner: Mapping[str, np.ndarray], root: Node | None = None
    ) -> np.ndarray:
        """Shares of the experts, float64 (K,) in the order of `names`: products of shares along the path from a root.

        inner: shares among the children, by name of the cluster. root: the cluster that has everything; the tree's by
        default.
        """
        share = dict.fromkeys(names, 0.0)

        def spread(node: Node, whole: float) -> None:
            for child, part in zip(node.children, inner[node.name], strict=True):
                if isinstance(child, str):
                    share[child] = whole * float(part)
                else:
                    spread(child, whole * float(part))

        spread(root or self.root, 1.0)
        return np.array([share[name] for name in names])

    def conditional(self, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Shares among the children of each cluster, by its name, from shares of experts; equal where all are zero."""
        found = {}
        for cluster in self.root.clusters():
            parts = np.array(
                [
                    sum(shares[leaf] for leaf in ([child] if isinstance(child, str) else child.leaves()))
                    for child in cluster.children
                ]
            )
            total = parts.sum()
            found[cluster.name] = parts / total if total > 0 else np.full(len(parts), 1 / len(parts))
        return found


def load_tree(path: Path, names: Sequence[str]) -> Tree:
    """Read a YAML file of `order: top-down | bottom-up` and `tree:`, a mapping of clusters.

    A cluster is a list of experts or a mapping of its children by name; a child that is an expert is its name. Raises
    ConfigError on anything else, and unless every expert is in the tree exactly once.
    """
    import yaml  # no other command needs it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the tree {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or set(content) - {"order", "tree"} or "tree" not in content:
        raise ConfigError(f"{path} must hold the keys tree and, if you like, order; see docs/search.md")
    order = content.get("order", "top-down")
    if order not in ORDERS:
        raise ConfigError(f"{path}: order must be one of {', '.join(ORDERS)}, but is {order!r}")
    root = _node("all domains", content["tree"], str(path))
    _check(root, names, str(path))
    return Tree(root, order)


def _node(name: str, value: Any, where: str) -> Node:
    if isinstance(value, list) and value and all(isinstance(child, str) for child in value):
        return Node(name, tuple(value))
    if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
        children = [
            child if isinstance(child, str) else _node(key, child, where) for key, child in value.items()
        ]
        return Node(name, tuple(children))
    raise ConfigError(
        f"{where}: the cluster {name!r} must be a list of experts or a mapping of its children, but is {value!r}"
    )


def _check(root: Node, names: Sequence[str], where: str) -> None:
    leaves, clusters = root.leaves(), [cluster.name for cluster in root.clusters()]
    for name in leaves:
        if name not in names:
            raise ConfigError(f"{where}: no expert is called {name!r}; the experts are {', '.join(names)}")
        if leaves.count(name) > 1:
            raise ConfigError(f"{where}: every expert must be in the tree once, but {name!r} is there twice")
    for name in names:
        if name not in leaves:
            raise ConfigError(f"{where}: every expert must be in the tree, but {name!r} is missing: add it")
    for name in clusters:
        if name in names:
            raise ConfigError(
                f"{where}: a cluster must not be called as an expert is, but {name!r} is: rename it, or write "
                f"{name}: {name} for the expert alone"
            )
        if clusters.count(name) > 1:
            raise ConfigError(f"{where}: clusters must have names of their own, but {name!r} is used twice")
