"""Constraints as users state them, and the region of mixtures that they leave."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergemix.errors import ConfigError
from mergemix.mixture import Mixture
from mergemix.search.region import KL_SLACK, Bound, Region
from mergemix.search.simplex import UNITS

# Up to 4 epochs of repeated data are worth about as much as fresh data: Muennighoff et al., arXiv 2305.16264.
MAX_EPOCHS = 4.0
ROUNDING = 1e-6  # in units of the grid: 0.29 * 10000 is not quite 2900


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What a mixture must satisfy. Shares from 0 to 1, by domain or by group.

    min, max, pin: lowest, highest, and only share. Minima are rounded up to whole ten-thousandths and maxima down; a
    pin must be a whole number of them. groups: name -> domains whose shares are summed; groups may overlap, nest, or
    leave domains out. tokens: how many a domain has; train_tokens: how many will be trained on; max_epochs: how often
    a token may be seen: share <= max_epochs * tokens / train_tokens. prior: shares by domain, normalised, unnamed
    domains 0. kl_limit: the largest KL(shares || prior), in nats. kl_penalty: utility lost per nat of it.
    """

    min: Mapping[str, float] = field(default_factory=dict)
    max: Mapping[str, float] = field(default_factory=dict)
    pin: Mapping[str, float] = field(default_factory=dict)
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: Mapping[str, float] = field(default_factory=dict)
    train_tokens: float | None = None
    max_epochs: float = MAX_EPOCHS
    prior: Mapping[str, float] | None = None
    kl_limit: float | None = None
    kl_penalty: float = 0.0

    def region(self, names: Sequence[str]) -> Region:
        """The mixtures of `names` that satisfy all of it.

        Raises ConfigError on unknown names, shares or tokens that make no sense, and constraints that no mixture of
        whole ten-thousandths satisfies: it names a smallest set that cannot hold together.
        """
        names = tuple(names)
        self._check_groups(names)
        bounds = [
            bound
            for kind, given in (("min", self.min), ("max", self.max), ("pin", self.pin))
            for name, share in given.items()
            if (bound := self._share_bound(names, kind, name, share)) is not None
        ]
        bounds += self._epoch_bounds(names)
        prior = self._prior(names)
        if self.kl_limit is not None:
            limit = _checked("the KL limit", self.kl_limit)
            bounds.append(Bound("kl", "prior", names, limit, f"KL <= {limit:g}"))
        region = Region(names, tuple(bounds), prior, _checked("the KL penalty", self.kl_penalty))
        _check_feasible(region)
        return region

    def _check_groups(self, names: tuple[str, ...]) -> None:
        for group, members in self.groups.items():
            if group in names:
                raise ConfigError(
                    f"a group must not be called as a domain is, but {group!r} is: rename the group"
                )
            if not members:
                raise ConfigError(f"the group {group!r} must name at least one domain")
            if len(set(members)) < len(members):
                raise ConfigError(f"the group {group!r} names a domain twice: {', '.join(members)}")
            for member in members:
                if member not in names:
                    raise ConfigError(f"the group {group!r} names {_unknown(member, names, 'domain')}")

    def _members(self, names: tuple[str, ...], kind: str, name: str) -> tuple[str, ...]:
        if name in names:
            return (name,)
        if name in self.groups:
            return tuple(self.groups[name])
        raise ConfigError(f"{kind} names {_unknown(name, (*names, *self.groups), 'domain or group')}")

    def _share_bound(self, names: tuple[str, ...], kind: str, name: str, share: float) -> Bound | None:
        """None for what every mixture satisfies."""
        domains = self._members(names, kind, name)
        if not 0 <= share <= 1:
            raise ConfigError(f"{kind} {name}={share:g} must be a share from 0 to 1")
        text = f"{kind} {name}={share:g}" + ("" if domains == (name,) else f" ({' + '.join(domains)})")
        exact = share * UNITS
        if kind == "min":
            units = math.ceil(exact - ROUNDING)
        elif kind == "max":
            units = math.floor(exact + ROUNDING)
        else:
            units = round(exact)
            if abs(exact - units) > ROUNDING:
                below, above = math.floor(exact) / UNITS, math.ceil(exact) / UNITS
                raise ConfigError(
                    f"a pinned share must be a whole number of ten-thousandths, but {name} is pinned to {share!r}: "
                    f"give {below} or {above}"
                )
        if (kind == "min" and units <= 0) or (kind == "max" and units >= UNITS):
            return None
        return Bound(kind, name, domains, units / UNITS, text)

    def _epoch_bounds(self, names: tuple[str, ...]) -> list[Bound]:
        if not 0 < self.max_epochs < math.inf:
            raise ConfigError(f"the epochs must be a number > 0, but are {self.max_epochs:g}")
        if not self.tokens:
            if self.max_epochs != MAX_EPOCHS:
                raise ConfigError(
                    "a number of epochs limits nothing unless it is said how many tokens a domain has and how many are "
                    "trained on"
                )
            if self.train_tokens is not None:
                raise ConfigError(
                    "training tokens limit nothing unless it is said how many tokens a domain has"
                )
            return []
        if self.train_tokens is None:
            raise ConfigError(
                f"tokens of {', '.join(self.tokens)} limit nothing unless it is said how many tokens are trained on"
            )
        if not 0 < self.train_tokens < math.inf:
            raise ConfigError(f"the training tokens must be a number > 0, but are {self.train_tokens:g}")
        bounds = []
        for name, tokens in self.tokens.items():
            if name not in names:
                raise ConfigError(f"tokens are given for {_unknown(name, names, 'domain')}")
            _checked(f"the tokens of {name}", tokens)
            share = self.max_epochs * tokens / self.train_tokens
            if share >= 1:
                continue
            units = math.floor(share * UNITS + ROUNDING)
            text = (
                f"{name}: at most {self.max_epochs:g} epochs of {tokens:.3g} tokens (share {units / UNITS:g})"
            )
            bounds.append(Bound("epochs", name, (name,), units / UNITS, text))
        return bounds

    def _prior(self, names: tuple[str, ...]) -> tuple[float, ...] | None:
        if self.prior is None:
            if self.kl_limit is not None or self.kl_penalty:
                raise ConfigError(
                    "a KL limit or penalty needs a prior: say from which mixture KL is measured"
                )
            return None
        for name in self.prior:
            if name not in names:
                raise ConfigError(f"the prior names {_unknown(name, names, 'domain')}")
        try:
            return Mixture.of(names, self.prior).weights
        except ConfigError as error:
            raise ConfigError(f"the prior: {error}") from None


def _checked(label: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ConfigError(f"{label} must be a number >= 0, but is {value:g}")
    return float(value)


def _unknown(name: str, known: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
    return f"{name!r}, which is no {kind}: {hint}"


def _check_feasible(region: Region) -> None:
    linear = [bound for bound in region.bounds if bound.kind != "kl"]
    if not _sums(region.names, linear, total=1.0):
        conflict = _smallest(linear, lambda kept: not _sums(region.names, kept, total=1.0))
        raise ConfigError(f"no mixture satisfies {_listed(conflict)}: {_reached(region.names, conflict)}")
    # What is left to go wrong: zeros of the prior, sums of shares that only fractions of units satisfy, KL.
    if not _sums(region.names, [*linear, *_zeros(region)], total=1.0):
        conflict = _smallest(
            linear, lambda kept: not _sums(region.names, [*kept, *_zeros(region)], total=1.0)
        )
        zero = [bound.name for bound in _zeros(region)]
        raise ConfigError(
            f"no mixture satisfies {_listed(conflict)} with no share of {', '.join(zero)}, whose prior is 0 "
            "while KL is limited or penalised: give the prior a share of them"
        )
    try:
        region.snap(np.full(len(region.names), 1 / len(region.names)))
    except ValueError:
        raise ConfigError(
            f"no mixture of whole ten-thousandths satisfies {_listed(linear)}, although finer shares do: "
            "loosen one by 0.0001"
        ) from None
    limit = region.kl_limit
    if limit is None or region.least_kl <= limit + KL_SLACK:
        return
    [kl] = [bound for bound in region.bounds if bound.kind == "kl"]
    conflict = _smallest(
        linear, lambda kept: Region(region.names, (*kept, kl), region.prior).least_kl > limit + KL_SLACK
    )
    least = Region(region.names, (*conflict, kl), region.prior).least_kl
    raise ConfigError(
        f"no mixture satisfies {_listed([*conflict, kl])}: the smallest KL that a mixture of whole ten-thousandths "
        f"reaches{' under the others' if conflict else ''} is {least:.4g}"
    )


def _zeros(region: Region) -> list[Bound]:
    if region.prior is None or (region.kl_limit is None and not region.kl_penalty):
        return []
    shares = zip(region.names, region.prior, strict=True)
    return [
        Bound("max", name, (name,), 0.0, f"{name}: no share in the prior")
        for name, share in shares
        if not share
    ]


def _smallest(bounds: Sequence[Bound], conflicts: Callable[[list[Bound]], bool]) -> list[Bound]:
    """Of bounds that conflict a part that conflicts and of which nothing can be left out (deletion filter)."""
    kept = list(bounds)
    for bound in bounds:
        fewer = [other for other in kept if other != bound]
        if conflicts(fewer):
            kept = fewer
    return kept


def _sums(
    names: Sequence[str], bounds: Sequence[Bound], *, total: float | None
) -> tuple[float, float] | None:
    """The least and largest sum of shares >= 0 under bounds; None when no shares satisfy them. total: the sum."""
    from scipy.optimize import linprog

    rows = np.array([[float(name in bound.domains) for name in names] for bound in bounds]).reshape(
        -1, len(names)
    )
    low = np.array([bound.ends[0] for bound in bounds], dtype=np.float64)
    high = np.array(
        [bound.ends[1] if bound.kind != "min" else math.inf for bound in bounds], dtype=np.float64
    )
    capped = np.isfinite(high)
    above, most = np.vstack([-rows, rows[capped]]), np.append(-low, high[capped])
    whole = np.ones((1, len(names)))
    equal = {} if total is None else {"A_eq": whole, "b_eq": [total * UNITS]}
    ends = []
    for sign in (1.0, -1.0):
        found = linprog(sign * whole[0], above, most, **equal)
        if found.status == 2:
            return None
        ends.append(found.fun * sign / UNITS if found.x is not None else math.inf)
    return ends[0], ends[1]


def _listed(bounds: Sequence[Bound]) -> str:
    texts = [bound.text for bound in bounds]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]} together"


def _reached(names: Sequence[str], conflict: Sequence[Bound]) -> str:
    sums = _sums(names, conflict, total=None)
    if sums is None:
        return "they contradict each other, whatever the other domains get"
    least, largest = sums
    if least > 1:
        return f"the shares would sum to at least {least:.4f}, and must sum to 1"
    return f"the shares would sum to at most {largest:.4f}, and must sum to 1"
