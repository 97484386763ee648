"""Verdicts on the geometry of a family.

Thresholds are calibrated on tiny Llamas trained for it (docs/lab-notes.md): sound families of four domains, with half
of their data general and without any; all learning rates, or one expert's, 3, 10, 30 and 100 times too high; experts of
another base. Where merging fails is known of those; of larger models the same numbers are a warning, no proof.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mergemix.preflight.geometry import FamilyGeometry
from mergemix.preflight.verdict import Check, graded

# |expert - base| / |base|. Sound families had 0.03 to 0.09; at 10 times the rate 0.3 to 0.4, where the merge loses far
# more than the experts gained; at 30 times 1.1, where even the experts are worse than their base.
NORM_DOUBTFUL, NORM_DISTRUSTED = 0.15, 0.6
# Cosine of an expert's matrices with the base's: above 0.9 as long as the norm is below 0.4; about 0 of another model.
STRANGER_ALIGNMENT = 0.3
# Cosine between all task vectors. Experts with half of their data in common had up to 0.5, those of another base 0.99
# and more: the same difference of bases is in all of them. Experts of a base that was trained for half as long again
# had 0.95, at a norm of 0.15; among themselves they are sound. Another model is at 0.9.
COMMON_COSINE, COMMON_FAR = 0.9, 0.3
# Distance of two experts over their mean's norm, without a base: sqrt(2) times a task vector's, at right angles.
DISTANCE_DOUBTFUL, DISTANCE_DISTRUSTED = 0.2, 0.85
# Of the smallest distance to the largest: sums in fp32 leave about 3e-4 of two that are the same.
SAME_DISTANCE = 1e-3
# Of an expert's norm to the others' median: sound families had up to 1.1, one expert at 10 times the rate 8.
APART_DOUBTFUL, APART_DISTRUSTED = 3.0, 10.0
# Opposed experts undo each other in a merge. Experts without any general data had down to -0.25.
OPPOSED_COSINE = -0.4
# One expert given twice, or trained twice on the same data.
SAME_COSINE = 0.98
# Of a layer alone. One layer may move more than the whole model, which is its mean.
LAYER_DOUBTFUL, LAYER_DISTRUSTED = 0.4, 1.0
# Updates below half of a unit in the last place of bf16 are lost: then hardly any element moves.
MOVED_DOUBTFUL = 0.01


def weight_checks(geometry: FamilyGeometry) -> list[Check]:
    """Each with its verdict. What holds a NaN or Inf is one check, and the only one then: nothing else has a value."""
    bad = list(_not_finite(geometry))
    if bad:
        return bad
    checks = [Check("finite", "fine", "no weight is NaN or Inf", 0.0, 0.0)]
    if not geometry.whole.gram[0, 0] > 0:
        reference = "the base's weights are" if geometry.has_base else "the mean of the experts is"
        return [
            *checks,
            Check("same base", "do not trust", f"{reference} all zero: nothing can be told from it"),
        ]
    if geometry.has_base:
        checks += [
            _base_check(geometry),
            _norm_check(geometry),
            _moved_check(geometry),
            _layer_check(geometry),
        ]
    else:
        checks += [_distance_check(geometry)]
    if len(geometry.names) > 2 or (geometry.has_base and len(geometry.names) > 1):
        checks += [_apart_check(geometry)]
    if geometry.has_base and len(geometry.names) > 1 and _lowest_cosine(geometry) <= COMMON_COSINE:
        checks += [_cosine_check(geometry)]  # of what is not common to all, which is another check
    return checks


def _not_finite(geometry: FamilyGeometry) -> Iterator[Check]:
    """One check for each expert, or the base, that holds a NaN or Inf; the first tensor is named."""
    rows = [np.isfinite(tensor.gram) for tensor in geometry.tensors]
    places: dict[str, list[str]] = {}
    for tensor, finite in zip(geometry.tensors, rows, strict=True):
        if not finite[0, 0]:  # the base: the mean of experts leaves out what is not finite
            places.setdefault("the base", []).append(tensor.name)
            continue
        for name, good in zip(geometry.names, np.diag(finite)[1:], strict=True):
            if not good:
                places.setdefault(name, []).append(tensor.name)
    for owner, tensors in places.items():
        rest = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        yield Check(
            "finite", "do not trust", f"{owner} holds NaN or Inf, in {tensors[0]}{rest}: its training diverged",
            float(len(tensors)), 0.0,
        )  # fmt: skip


def _base_check(geometry: FamilyGeometry) -> Check:
    """Were the experts trained from this base? By direction, and by what all differences have in common."""
    names, alignments = geometry.names, geometry.matrices.alignments
    lowest = float(np.nanmin(alignments, initial=1.0))
    strangers = [n for n, a in zip(names, alignments, strict=True) if a < STRANGER_ALIGNMENT]
    common = _lowest_cosine(geometry)
    far = float(np.nanmax(geometry.whole.relative_norms, initial=0.0))
    if common > COMMON_COSINE and (strangers or far > COMMON_FAR):
        return Check(
            "same base", "do not trust",
            f"all experts differ from the base in the same direction (cosines of at least {common:.3f}) and by "
            f"{far:.2g} of its norm: they were trained from another checkpoint than --base",
            common, COMMON_COSINE,
        )  # fmt: skip
    if strangers:
        return Check(
            "same base", "do not trust",
            f"{', '.join(strangers)}: a cosine of {lowest:.2f} with the base, as two models that have nothing in "
            "common: trained from another checkpoint, or diverged",
            lowest, STRANGER_ALIGNMENT,
        )  # fmt: skip
    if common > COMMON_COSINE:
        return Check(
            "same base", "doubtful",
            f"all experts differ from the base in nearly the same direction (cosines of at least {common:.3f}): they "
            "were trained from a later checkpoint than --base, or mostly on the same data",
            common, COMMON_COSINE,
        )  # fmt: skip
    return Check(
        "same base", "fine", f"every expert has a cosine of at least {lowest:.3f} with the base", lowest,
        STRANGER_ALIGNMENT,
    )  # fmt: skip


def _lowest_cosine(geometry: FamilyGeometry) -> float:
    """The smallest between two task vectors; -1 of one alone, which has nothing in common with others."""
    pairs = geometry.whole.cosines[np.triu_indices(len(geometry.names), 1)]
    return float(np.nanmin(pairs)) if np.isfinite(pairs).any() else -1.0


def _norm_check(geometry: FamilyGeometry) -> Check:
    norms = geometry.whole.relative_norms
    value = float(np.nanmax(norms, initial=0.0))
    verdict = graded(value, NORM_DOUBTFUL, NORM_DISTRUSTED)
    why = f"the experts moved by up to {value:.2g} of the base's norm"
    if verdict != "fine":
        limit = NORM_DOUBTFUL if verdict == "doubtful" else NORM_DISTRUSTED
        far = [n for n, norm in zip(geometry.names, norms, strict=True) if norm >= limit]
        why += (
            f" ({', '.join(far)}): beyond the straight stretch in which merging stands for training. A smaller "
            "learning rate or a shorter horizon keeps them nearer"
        )
    return Check("norms", verdict, why, value, NORM_DOUBTFUL)


def _distance_check(geometry: FamilyGeometry) -> Check:
    """Without a base: how far experts are from each other."""
    pairs = np.triu_indices(len(geometry.names), 1)
    distances = geometry.whole.distances[pairs]
    value = float(np.max(distances, initial=0.0))
    verdict = graded(value, DISTANCE_DOUBTFUL, DISTANCE_DISTRUSTED)
    why = f"two experts are apart by up to {value:.2g} of their mean's norm"
    if verdict != "fine":
        a, b = (geometry.names[row[np.argmax(distances)]] for row in pairs)
        why += (
            f" ({a} and {b}): they have different bases, diverged, or were trained at too high a rate; give --base to "
            "tell which"
        )
    elif len(distances) and distances.min() <= SAME_DISTANCE * value:
        a, b = (geometry.names[row[np.argmin(distances)]] for row in pairs)
        verdict, why = "doubtful", f"{a} and {b} are nearly the same expert: no search can part them"
    return Check("distance", verdict, why, value, DISTANCE_DOUBTFUL)


def _apart_check(geometry: FamilyGeometry) -> Check:
    """Does one expert lie much further out than the others, or hardly move at all?"""
    norms = np.nan_to_num(geometry.whole.relative_norms)
    others = np.array([np.median(np.delete(norms, k)) for k in range(len(norms))])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(norms / others, nan=1.0, posinf=np.inf)
    k, least = int(np.argmax(ratios)), int(np.argmin(ratios))
    value = float(ratios[k])
    verdict = graded(value, APART_DOUBTFUL, APART_DISTRUSTED)
    if verdict != "fine":
        shown = (
            "while the others did not move" if np.isinf(value) else f"{value:.2g} times as far as the others"
        )
        why = f"{geometry.names[k]} moved {shown}: it diverged, or was trained at another rate or for longer"
    elif ratios[least] < 1 / APART_DOUBTFUL:
        verdict, value = "doubtful", float(ratios[least])
        why = f"{geometry.names[least]} moved only {value:.2g} times as far as the others: its weight changes little"
    else:
        why = "all experts moved about equally far"
    return Check("equally far", verdict, why, None if np.isinf(value) else value, APART_DOUBTFUL)


def _cosine_check(geometry: FamilyGeometry) -> Check:
    cosines, names = geometry.whole.cosines.copy(), geometry.names
    np.fill_diagonal(cosines, np.nan)
    if not np.isfinite(cosines).any():
        return Check("cosines", "doubtful", "at most one expert moved at all")
    high, low = np.nanargmax(cosines), np.nanargmin(cosines)
    (a, b), (c, d) = (np.unravel_index(place, cosines.shape) for place in (high, low))
    largest, smallest = float(cosines[a, b]), float(cosines[c, d])
    if smallest < OPPOSED_COSINE:
        why = f"{names[c]} and {names[d]} moved in opposed directions (cosine {smallest:.2f}): a merge undoes both"
        return Check("cosines", "doubtful", why, smallest, OPPOSED_COSINE)
    if largest > SAME_COSINE:
        why = f"{names[a]} and {names[b]} are nearly the same expert (cosine {largest:.3f}): no search can part them"
        return Check("cosines", "doubtful", why, largest, SAME_COSINE)
    return Check(
        "cosines",
        "fine",
        f"task vectors have cosines of {smallest:.2f} to {largest:.2f}",
        largest,
        SAME_COSINE,
    )


def _moved_check(geometry: FamilyGeometry) -> Check:
    whole = geometry.whole
    shares = whole.moved / max(whole.elements, 1)
    value = float(shares.min())
    if value >= MOVED_DOUBTFUL:
        why = f"of every expert at least {value:.1%} of all elements moved"
        return Check("moved", "fine", why, value, MOVED_DOUBTFUL)
    still = [n for n, share in zip(geometry.names, shares, strict=True) if share < MOVED_DOUBTFUL]
    why = f"of {', '.join(still)} only {value:.2%} of all elements moved: "
    why += (
        "it is the base itself"
        if value == 0
        else "updates smaller than the type's precision were lost, or most of it was frozen"
    )
    return Check("moved", "doubtful", why, value, MOVED_DOUBTFUL)


def _layer_check(geometry: FamilyGeometry) -> Check:
    """Did one layer move far more than the whole model?"""
    layers = [layer for layer in geometry.layers if layer.is_matrix or layer.name.isdigit()]
    if not layers:
        return Check("layers", "fine", "there is no layer with a matrix")
    norms = np.nan_to_num([layer.relative_norms for layer in layers])
    layer, expert = np.unravel_index(np.argmax(norms), norms.shape)
    value = float(norms[layer, expert])
    verdict = graded(value, LAYER_DOUBTFUL, LAYER_DISTRUSTED)
    where = layers[layer].name
    where = f"layer {where}" if where.isdigit() else where
    why = f"{where} moved most, by {value:.2g} of its norm in {geometry.names[expert]}"
    if verdict != "fine":
        why += ": too far for an average of it, however little the whole model moved"
    return Check("layers", verdict, why, value, LAYER_DOUBTFUL)
