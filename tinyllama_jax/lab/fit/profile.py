"""How well one constant is determined: the objective as a function of it, all others fitted again.

The objective is a sum of Huber losses, so a likelihood has to be read into it: where most residuals are beyond delta
they are taken as Laplace-distributed, otherwise as normal, their width fitted as well.  With n points the interval is
where  2 n ln(objective / least)  (Laplace; n ln(...) for normal) stays below the 95 % quantile of chi-squared with one
degree of freedom.  A constant whose interval has no end within the bounds is not identified by the points.

A coarse grid from the optimum to both bounds says between which two of its places an end is; the end itself is found
by cutting that stretch again and again, so that it does not depend on the grid.
"""

from __future__ import annotations

import numpy as np

from tinyllama_jax.lab.fit.robust import Problem, minimise

CHI2_95 = 3.841458820694124
STEPS = 12  # of the grid, on each side
NEAREST = 0.2  # the grid's first step, in widths
CUTS = 6  # places looked at, in each round, between two that an end lies between
EXACT = 3e-3  # an end is known to this share of its distance from the optimum
ROUNDS = 10
LONGEST = 40  # steps: places that need more are far outside
FAR = 20  # times CHI2_95: such places are outside, whatever their neighbours found
EXCHANGES = 3  # of what neighbours on the grid have found
VALLEYS = 8  # looked into for the lowest minimum, from the best places of the grid
ENOUGH = 1e-6  # of the objective, still to be gained: nothing beside CHI2_95 / 2n


class _Along:
    """The objective along one column of theta, everything else at its best."""

    def __init__(self, problem: Problem, lower_P: np.ndarray, upper_P: np.ndarray, column: int):
        self.problem, self.lower_P, self.upper_P, self.column = problem, lower_P, upper_P, column

    def at(self, x_S: np.ndarray, start_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(theta_SP, objective_S) below each start, with the column held at x."""
        start_SP = start_SP.copy()
        start_SP[:, self.column] = x_S
        lower_SP, upper_SP = np.tile(self.lower_P, (len(x_S), 1)), np.tile(self.upper_P, (len(x_S), 1))
        lower_SP[:, self.column] = upper_SP[:, self.column] = x_S
        found = minimise(self.problem, start_SP, lower_SP, upper_SP, enough=ENOUGH, max_steps=LONGEST)
        return found.theta_SP, found.objective_S

    def grid(self, x_S: np.ndarray, theta_P: np.ndarray, far: float) -> tuple[np.ndarray, np.ndarray]:
        """The same from one start; then each place tries what its neighbours have found, while some gain by it.

        far: places this many times above the lowest objective are left as they are.
        """
        theta_SP, objective_S = self.at(x_S, np.tile(theta_P, (len(x_S), 1)))
        changed = np.ones(len(x_S), bool)
        for _ in range(EXCHANGES):
            near = objective_S <= far * max(objective_S.min(), 1e-300)
            to = np.concatenate([np.flatnonzero(changed[:-1]) + 1, np.flatnonzero(changed[1:])])
            source = np.concatenate([np.flatnonzero(changed[:-1]), np.flatnonzero(changed[1:]) + 1])
            to, source = to[near[to]], source[near[to]]
            if not to.size:
                break
            again_SP, again_S = self.at(x_S[to], theta_SP[source])
            changed = np.zeros(len(x_S), bool)
            for i in np.argsort(-again_S, kind="stable"):  # the lower of two for one place last
                if again_S[i] < objective_S[to[i]] * (1 - ENOUGH):
                    theta_SP[to[i]], objective_S[to[i]], changed[to[i]] = again_SP[i], again_S[i], True
        return theta_SP, objective_S


def profile(problem: Problem, theta_P: np.ndarray, lower_P, upper_P, column: int, width: float, steps=STEPS) -> dict:
    """{"grid", "excess", "interval"} of one constant, in the scale in which it is fitted.

    width: about its standard error, with which the grid begins.  excess: what is compared with CHI2_95.
    interval: [low, high], on each side the outermost place where the fit is still as good; None where the bound is.
    """
    lower_P, upper_P = np.asarray(lower_P, float), np.asarray(upper_P, float)
    line, here = _Along(problem, lower_P, upper_P, column), theta_P[column]
    first = NEAREST * max(width, 1e-9 * (1 + abs(here)))
    sides = []
    for bound, sign in ((lower_P[column], -1), (upper_P[column], 1)):
        far = abs(bound - here)
        if far > 0:
            sides.append(here + sign * np.geomspace(min(first, far / 2), far, steps))
            sides[-1][-1] = bound
    grid = np.unique(np.concatenate([*sides, [here]]))
    beyond = float((np.abs(problem.law(theta_P[None])[0] - problem.y_N) > problem.delta).mean())
    factor = (2 if beyond > 0.5 else 1) * len(problem.y_N)
    theta_SP, objective_S = line.grid(grid, theta_P, float(np.exp(FAR * CHI2_95 / factor)))
    # A minimum below the one that was given counts, whether or not the grid has a place in it.
    starts_SP = np.concatenate([theta_P[None], theta_SP[np.argsort(objective_S)[:VALLEYS]]])
    lowest = minimise(problem, starts_SP, lower_P, upper_P)
    least = max(float(min(objective_S.min(), lowest.objective_S.min())), 1e-300)

    def excess(objective_S: np.ndarray) -> np.ndarray:
        return factor * np.log(np.maximum(objective_S, 1e-300) / least)

    best_P = lowest.theta_SP[lowest.best]
    found = (grid, excess(objective_S), theta_SP)
    added = np.searchsorted(grid, best_P[column])  # so that there is a place inside, however narrow the valley
    found = (
        np.insert(found[0], added, best_P[column]),
        np.insert(found[1], added, float(excess(lowest.objective_S.min()))),
        np.insert(found[2], added, best_P, axis=0),
    )
    ends = [_end(line, excess, *(x[::sign] for x in found), best_P[column]) for sign in (1, -1)]
    return {"grid": grid, "excess": excess(objective_S), "interval": ends}


def _end(line: _Along, excess, grid: np.ndarray, excess_S: np.ndarray, theta_SP: np.ndarray, best: float):
    """Coming from outside, the first place where the excess is CHI2_95; None where it is less from the start."""
    inside = int(np.argmax(excess_S <= CHI2_95))
    if inside == 0:
        return None
    x, e, theta = (values[inside - 1 : inside + 1] for values in (grid, excess_S, theta_SP))
    for _ in range(ROUNDS):
        if abs(x[1] - x[0]) <= EXACT * abs(x[1] - best):
            break
        between = np.linspace(x[0], x[1], CUTS + 2)[1:-1]
        from_both = np.concatenate([np.tile(theta[0], (CUTS, 1)), np.tile(theta[1], (CUTS, 1))])
        tried_SP, tried_S = line.at(np.tile(between, 2), from_both)
        lower = np.where(tried_S[:CUTS] <= tried_S[CUTS:], np.arange(CUTS), np.arange(CUTS) + CUTS)
        x_all = np.concatenate([x[:1], between, x[1:]])
        e_all = np.concatenate([e[:1], excess(tried_S[lower]), e[1:]])
        theta_all = np.concatenate([theta[:1], tried_SP[lower], theta[1:]])
        inside = int(np.argmax(e_all <= CHI2_95))
        x, e, theta = (values[inside - 1 : inside + 1] for values in (x_all, e_all, theta_all))
    share = (e[0] - CHI2_95) / (e[0] - e[1])
    return float(x[0] + share * (x[1] - x[0]))
