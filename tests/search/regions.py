"""Random constraints that at least one mixture satisfies, and an independent check of them."""

from fractions import Fraction

import numpy as np

from mergemix.mixture import Mixture
from mergemix.search.constraints import Constraints
from mergemix.search.simplex import UNITS


def names(k: int) -> tuple[str, ...]:
    return tuple(f"d{i}" for i in range(k))


def random_constraints(seed: int, *, groups: int = 3, kl: bool = True) -> tuple[Mixture, Constraints]:
    """(a mixture that satisfies them, constraints): from none to a single point, 2 to 17 domains."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 18))
    units = rng.multinomial(UNITS, rng.dirichlet(np.full(k, rng.choice([0.3, 1.0, 5.0]))))
    tight = int(rng.choice([0, 1, 30, 2000]))
    sums = {name: [i] for i, name in enumerate(names(k))}
    chosen = {f"g{j}": np.flatnonzero(rng.random(k) < 0.4) for j in range(int(rng.integers(0, groups + 1)))}
    members = {group: tuple(names(k)[i] for i in of) for group, of in chosen.items() if len(of)}
    sums |= {group: list(of) for group, of in chosen.items() if len(of)}
    low, high, pin = {}, {}, {}
    for name, of in sums.items():
        total = int(units[of].sum())
        draw = rng.random()
        if draw < 0.25:
            low[name] = max(0, total - int(rng.integers(0, tight + 1))) / UNITS
        if 0.15 < draw < 0.4:
            high[name] = min(UNITS, total + int(rng.integers(0, tight + 1))) / UNITS
        if draw > 0.92:
            pin[name] = total / UNITS
    prior = None
    if kl and rng.random() < 0.4:
        shares = rng.dirichlet(np.full(k, 3.0))
        if rng.random() < 0.3:
            shares = np.where(units > 0, shares, 0.0)
        prior = dict(zip(names(k), shares / shares.sum(), strict=True))
    hidden = Mixture(names(k), tuple(int(n) / UNITS for n in units))
    limit = None if prior is None else divergence(hidden, prior) * float(rng.choice([1.0, 1.1, 3.0])) + 1e-9
    return hidden, Constraints(min=low, max=high, pin=pin, groups=members, prior=prior, kl_limit=limit)


def divergence(mixture: Mixture, prior: dict[str, float]) -> float:
    terms = [(share, prior[name]) for name, share in mixture.as_dict().items() if share > 0]
    return float(
        sum(share * np.log(share / reference) if reference else np.inf for share, reference in terms)
    )


def assert_satisfies(mixture: Mixture, constraints: Constraints) -> None:
    """In exact arithmetic, from the constraints as they were stated."""
    k = len(mixture.names)
    if mixture == Mixture.uniform(mixture.names):
        share = dict.fromkeys(mixture.names, Fraction(1, k))
    else:
        share = {name: Fraction(round(weight * UNITS), UNITS) for name, weight in mixture.as_dict().items()}
        assert mixture.weights == tuple(float(fraction) for fraction in share.values())
    assert sum(share.values()) == 1
    assert min(share.values()) >= 0
    total = share | {group: sum(share[name] for name in of) for group, of in constraints.groups.items()}
    for name, low in constraints.min.items():
        assert float(total[name]) >= low
    for name, high in constraints.max.items():
        assert float(total[name]) <= high
    for name, pinned in constraints.pin.items():
        assert float(total[name]) == pinned
    if constraints.kl_limit is not None:
        assert divergence(mixture, dict(constraints.prior)) <= constraints.kl_limit + 1e-11
