"""The paper's figures from our results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DPI = 110


def draw(results: Mapping[str, Any], out: Path) -> list[Path]:
    """One PNG a figure, into `out`."""
    paths = []
    for name, figure in (
        ("dual", _dual(results["dual"])),
        ("ranks", _ranks(results["ranks"])),
        ("landscape", _landscape(results["landscape"])),
        ("matrices", _matrices(results["matrices"])),
    ):
        figure.tight_layout()
        figure.savefig(out / f"{name}.png", dpi=DPI)
        plt.close(figure)
        paths.append(out / f"{name}.png")
    return paths


def _dual(found: Mapping[str, Any]) -> Any:
    """Figures 2 and 3: curves above, ranks below."""
    capabilities = found["capabilities"]
    figure, axes = plt.subplots(2, len(capabilities), figsize=(3 * len(capabilities), 5.6), squeeze=False)
    for (name, each), top, bottom in zip(capabilities.items(), *axes, strict=True):
        trained = np.asarray(each["trained"])
        top.plot(found["share"], each["merged"], "o-", label="merged")
        top.plot(found["share"], trained.mean(axis=1), "s-", label="trained")
        top.fill_between(found["share"], trained.min(axis=1), trained.max(axis=1), alpha=0.25, color="C1")
        top.set_title(f"{name}: rho {each['spearman']:.2f}")
        top.set_xlabel(f"share of {found['pair'][0]} (rest {found['pair'][1]})")
        ranks = [np.argsort(np.argsort(values)) for values in (each["merged"], trained.mean(axis=1))]
        bottom.plot(*ranks, "o")
        bottom.set_xlabel("rank of the merge")
    axes[0][0].set_ylabel("nats an item")
    axes[1][0].set_ylabel("rank when trained")
    axes[0][0].legend()
    return figure


def _ranks(found: Sequence[Mapping[str, Any]]) -> Any:
    """Merged beside trained utility of the held-out mixtures."""
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 4), squeeze=False)
    for study, axis in zip(found, axes[0], strict=True):
        points = study["calibration"]
        axis.plot(
            [each["proxy"]["overall"] for each in points],
            [np.mean(each["trained"]["overall"]) for each in points],
            "o",
        )
        axis.set_title(f"{study['shape']}: rho {study['overall']['spearman']:.2f}")
        axis.set_xlabel("utility of the merge")
        axis.set_ylabel("utility when trained")
    return figure


def _landscape(found: Mapping[str, Any]) -> Any:
    """Figure 8: a triangle a capability."""
    points = np.asarray(found["points"])
    x, y = points[:, 1] + points[:, 2] / 2, points[:, 2] * np.sqrt(3) / 2
    surfaces = found["surfaces"]
    figure, axes = plt.subplots(1, len(surfaces), figsize=(3.2 * len(surfaces), 3.2), squeeze=False)
    for (name, values), axis in zip(surfaces.items(), axes[0], strict=True):
        axis.tricontourf(x, y, values, levels=12)
        best = int(np.argmax(values))
        axis.plot(x[best], y[best], "r*", markersize=12)
        axis.set_title(name)
        for corner, (a, b) in zip(found["triangle"], ((0, 0), (1, 0), (0.5, np.sqrt(3) / 2)), strict=True):
            axis.annotate(corner, (a, b), ha="center", va="top" if b == 0 else "bottom", fontsize=8)
        axis.axis("off")
    return figure


def _matrices(found: Mapping[str, Any]) -> Any:
    """Figure 7: gamma, and the cosines of task vectors."""
    panels = {
        "gamma": found["gamma"],
        **{f"cosines, {name}": values for name, values in found["cosines"].items()},
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4), squeeze=False)
    for (name, values), axis in zip(panels.items(), axes[0], strict=True):
        axis.imshow(values, vmin=0, vmax=1)
        axis.set_title(name)
        axis.set_xticks(range(len(found["domains"])), found["domains"], rotation=45, ha="right")
        axis.set_yticks(range(len(found["domains"])), found["domains"])
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axis.annotate(f"{value:.2f}", (column, row), ha="center", va="center", color="w", fontsize=8)
    return figure
