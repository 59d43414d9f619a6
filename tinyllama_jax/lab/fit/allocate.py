"""Given a law and a budget: how many parameters, how many tokens, and what the loss will be.

    minimise over N   loss(N, D)   where the budget pays for D tokens of training (and of inference) at this N

With FLOPs the price of a token is 6 N, and 2 N for one of inference (Sardana et al., arXiv 2401.00448); with dollars it
is whatever a roofline says it costs on a machine.  With fewer unique tokens than D the law is that of effective data
(Muennighoff et al., arXiv 2305.16264), or another of repeated.py.

What a choice costs is told as deadweight compute: the share of its budget with which the best choice reaches the same
loss could have been saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.lab.fit import chinchilla, repeated
from tinyllama_jax.lab.fit.points import Points
from tinyllama_jax.lab.fit.resample import interval

SIZES = np.geomspace(1e5, 1e13, 1601)  # 1.16 % apart, refined by a parabola
# The constants by which a law is known, the more specific first.
KINDS = {
    "effective": (*chinchilla.NAMES, *repeated.Effective.names),
    "penalty": (*chinchilla.NAMES, *repeated.Penalty.names),
    "saturating": repeated.Saturating.names,
    "surface": chinchilla.NAMES,
}


@dataclass(frozen=True)
class Law:
    """A surface, with or without the worth of repetition."""

    constants: Mapping[str, float]

    def __post_init__(self):
        if not self.kind:
            missing = [name for name in chinchilla.NAMES if name not in self.constants]
            raise ConfigError(f"the law has no {', '.join(missing)}; a fit of `fit chinchilla` or `fit repetition` has")

    @property
    def kind(self) -> str:
        """A key of KINDS; empty when the constants make up none of them."""
        return next((kind for kind, names in KINDS.items() if set(names) <= set(self.constants)), "")

    @property
    def repeats(self) -> bool:
        return self.kind != "surface"

    def loss(self, N, D, unique: float | None = None) -> np.ndarray:
        """Nats per token of N parameters and D tokens, of which `unique` are different (all where it is None)."""
        N, D = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
        if unique is not None and not self.repeats:
            raise ConfigError(f"{unique:.3g} unique tokens: this law has no R_D and R_N, so it cannot value repetition")
        if self.kind == "surface" or (unique is None and self.kind != "saturating"):
            return chinchilla.loss(self.constants, N, D)
        seen = D if unique is None else np.full(N.shape, float(unique))
        law = repeated.LAWS[self.kind](self.constants)
        values = [self.constants[name] for name in law.names]
        theta_SP = np.array([[math.log(v) if p in law.logarithms else v for p, v in enumerate(values)]])
        points = Points.of(N.ravel(), D.ravel(), np.ones(N.size), U=seen.ravel())
        return np.exp(law.at(points)(theta_SP)[0][0]).reshape(N.shape)


@dataclass(frozen=True)
class Price:
    """What training N parameters on D tokens costs, in FLOPs or in dollars."""

    tokens: Callable[[np.ndarray, float], np.ndarray]  # (N, budget) -> D
    cost: Callable[[float, float], float]  # (N, D) -> budget
    unit: str = "flops"


def flops_price(inference_tokens: float = 0.0) -> Price:
    """6 N D FLOPs, and 2 N for every token of inference."""
    return Price(
        tokens=lambda N, budget: (budget - 2 * N * inference_tokens) / (6 * N),
        cost=lambda N, D: 6 * N * D + 2 * N * inference_tokens,
    )


def best(law: Law, price: Price, budget: float, unique: float | None = None) -> dict[str, float]:
    """{"N", "D", "loss", "tokens_per_parameter"} of least loss within the budget.

    Raises ConfigError when the budget pays for nothing, or is best spent beyond the sizes that are looked at.
    """
    D = price.tokens(SIZES, budget)
    possible = D >= 1
    if not possible.any():
        raise ConfigError(f"a budget of {budget:.3g} {price.unit} pays for no training at all")
    sizes, D = SIZES[possible], D[possible]
    loss = law.loss(sizes, D, unique)
    k = int(np.argmin(loss))
    # The first or the last of all sizes; where the budget ends the sizes, the last of them is an answer.
    if k == 0 or sizes[k] == SIZES[-1]:
        raise ConfigError(
            f"a budget of {budget:.3g} {price.unit} is best spent beyond {sizes[k]:.1g} parameters: no law reaches "
            "that far"
        )
    N = float(sizes[k])
    if k < len(sizes) - 1:
        y0, y1, y2 = loss[k - 1 : k + 2]
        bend = y0 - 2 * y1 + y2
        if bend > 0:
            N *= math.exp(0.5 * (y0 - y2) / bend * math.log(SIZES[1] / SIZES[0]))
    return at(law, N, float(price.tokens(np.array(N), budget)), unique)


def at(law: Law, N: float, D: float, unique: float | None = None) -> dict[str, float]:
    return {"N": N, "D": D, "loss": float(law.loss(N, D, unique)), "tokens_per_parameter": D / N}


def spread(
    laws: Sequence[Law], price: Price, budget: float, chosen: Mapping[str, float], unique: float | None = None
) -> dict[str, list[float]]:
    """95 % intervals over resampled laws: of the best N, D and their ratio, and of the loss at the chosen N and D.

    Laws under which the budget has no best choice count for the loss only.  Empty without laws.
    """
    if len(laws) < 2:
        return {}
    found = []
    for law in laws:
        try:
            found.append(best(law, price, budget, unique))
        except ConfigError:
            continue
    names = ("N", "D", "tokens_per_parameter")
    ends = {name: interval(np.array([one[name] for one in found])) for name in names} if len(found) > 1 else {}
    return ends | {"loss": loss_interval(laws, chosen["N"], chosen["D"], unique)}


def loss_interval(laws: Sequence[Law], N: float, D: float, unique: float | None = None) -> list[float]:
    return interval(np.array([float(law.loss(N, D, unique)) for law in laws]))


def deadweight(law: Law, price: Price, N: float, D: float, unique: float | None = None) -> dict:
    """What the choice of N and D costs: its loss, the best for the same budget, and the budget that reaches its loss.

    deadweight_share: of the budget that the best choice would have saved.
    """
    budget = price.cost(N, D)
    loss = float(law.loss(N, D, unique))
    same_budget = best(law, price, budget, unique)
    low, high = math.log(budget) - 12, math.log(budget)
    for _ in range(50):  # the loss of the best choice falls with the budget
        middle = 0.5 * (low + high)
        try:
            reached = best(law, price, math.exp(middle), unique)["loss"]
        except ConfigError:  # so little that no size is best: too little
            reached = math.inf
        low, high = (middle, high) if reached > loss else (low, middle)
    needed = math.exp(high)
    return {
        "N": N,
        "D": D,
        price.unit: budget,
        "loss": loss,
        "best_for_the_same": same_budget,
        f"{price.unit}_for_the_same_loss": needed,
        "deadweight_share": max(0.0, 1 - needed / budget),
    }
