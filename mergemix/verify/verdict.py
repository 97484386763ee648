"""What a verification comes to, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FINE, DOUBTFUL, NOT, OPEN = "fine", "doubtful", "do not trust", "too few references"
# Of normal scores, the best by a proxy gains rho times what the best gains: this is where the proxy brings most of it.
TRUSTED = 0.5


def verdict(overall: Mapping[str, Any], capabilities: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """(trust, sentence). Trust is what the lower limit of the overall interval, not the estimate, supports."""
    if not overall["conclusive"]:
        return OPEN, f"It cannot be said whether the proxies can be trusted: {overall['inconclusive']}."
    low, high = overall["interval"]
    ranked = (
        f"The proxies rank {overall['references']} trained mixtures with Spearman {overall['spearman']:.2f} "
        f"(95% interval {low:.2f} to {high:.2f}){_repeated(overall)}."
    )
    choice = _choice(overall)
    if high < TRUSTED or overall["spearman"] <= 0:
        return NOT, f"{ranked} {choice} They cannot stand for training here: do not choose a mixture by them."
    if low < TRUSTED:
        return (
            DOUBTFUL,
            f"{ranked} {choice} They say something about training, but choose by them only what further references "
            "confirm.",
        )
    return FINE, f"{ranked} {choice} They can be trusted to choose a mixture by{_except(capabilities)}."


def _repeated(overall: Mapping[str, Any]) -> str:
    ceiling, corrected = overall["ceiling"], overall["corrected"]
    if ceiling is None:
        return ""
    if ceiling["ceiling"] is None:
        return "; trained again with another seed, they are not ranked alike at all"
    told = f"; a perfect proxy would reach {ceiling['ceiling']:.2f}, as training with other seeds differs too"
    return told + (f", of which this is {min(corrected['spearman'], 1):.2f}" if corrected else "")


def _choice(overall: Mapping[str, Any]) -> str:
    relative, ceiling = overall["relative_regret"], overall["ceiling"]
    if overall["regret"] <= 0:
        return "The mixture that they put first is the best one that was trained."
    share = "" if relative is None else f", {relative:.0%} of what the best is ahead of an average one"
    noise = "" if ceiling is None else f" (another seed moves a score by {ceiling['seed_deviation']:.2g})"
    cost = f"{overall['regret']:.3g} less than the best trained one"
    return f"The mixture that they put first scores {cost}{share}{noise}."


def _except(capabilities: Mapping[str, Mapping[str, Any]]) -> str:
    """Capabilities alone may be ranked worse than all of them together."""
    weak = [
        name for name, each in capabilities.items()
        if each["spearman"] is None or each["interval"] is None or each["interval"][0] < TRUSTED
    ]  # fmt: skip
    return f", but not by {' or '.join(sorted(weak))} alone" if weak else ", also by any one capability"
