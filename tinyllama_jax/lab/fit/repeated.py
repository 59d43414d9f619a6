"""Three laws of repeated data behind one interface.

U unique tokens seen D/U times; U_D = min(D, U), repeats R_D = D/U_D - 1.

effective   Muennighoff et al. (arXiv 2305.16264): repeats and parameters decay in value,
            L = E + A/N'^alpha + B/D'^beta,   D' = U_D + U_D R_D* (1 - exp(-R_D/R_D*)),
            U_N = min(N, N_opt(U_D)), R_N = N/U_N - 1,   N' = U_N + U_N R_N* (1 - exp(-R_N/R_N*)),
            N_opt(U) = G (U G)^(beta/alpha): the parameters for which U is the compute-optimal number of tokens.
            It can only fall with more tokens or parameters.
penalty     Chinchilla's surface plus  P R_D^rho (N/U_D)^kappa: beyond a point repetition hurts.  After the additive
            overfitting penalty of arXiv 2605.01640, of which only the abstract was at hand; this form is ours.
saturating  arXiv 2605.09189:  L = E + (L0 - E) h / (1 + h),  h = a/N^alpha + b/D^beta + c N^gamma / U^delta;
            L0 is the loss of knowing nothing, ln(vocabulary).

A law maps theta_SP to (ln L)_SN and its derivative_SNP; positive constants are fitted as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tinyllama_jax.lab.fit.points import Points

# C4, as published with natural logarithms: a 6.255414, b 7.3049974, e 0.6254804, alpha = beta.
PUBLISHED = {
    "A": math.exp(6.255414),
    "B": math.exp(7.3049974),
    "E": math.exp(0.6254804),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}
Base = Mapping[str, float]


def unique(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """(unique tokens seen, repeats)."""
    seen = np.minimum(points.D, points.U)
    return seen, points.D / seen - 1


def optimal_parameters(base: Base, tokens) -> np.ndarray:
    """The N for which so many tokens are compute-optimal under Chinchilla's surface."""
    alpha, beta = base["alpha"], base["beta"]
    g = (alpha * base["A"] / (beta * base["B"])) ** (1 / (alpha + beta))
    return g * np.power(np.asarray(tokens, float) * g, beta / alpha)


def effective_epochs(epochs, r_d: float) -> np.ndarray:
    """What so many epochs are worth, in epochs of fresh data: 1 + R* (1 - exp(-(epochs - 1)/R*))."""
    return 1 + r_d * -np.expm1(-(np.asarray(epochs, float) - 1) / r_d)


class Effective:
    """Constants R_D and R_N; Chinchilla's five are given."""

    names = ("R_D", "R_N")
    logarithms = (0, 1)
    lower_P, upper_P = np.log([1e-2, 1e-2]), np.log([1e5, 1e5])

    def __init__(self, base: Base):
        self.base = base

    def starts(self, points: Points) -> np.ndarray:
        axis = np.log([0.3, 1, 3, 10, 30, 100, 1000])
        return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)

    def at(self, points: Points):
        base = self.base
        seen_N, r_d_N = unique(points)
        u_n_N = np.minimum(points.N, optimal_parameters(base, seen_N))
        r_n_N = points.N / u_n_N - 1

        def worth(r_N: np.ndarray, star_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """1 + R* (1 - exp(-r/R*)) and its derivative by ln R*."""
            x_SN = r_N / star_S[:, None]
            gone_SN = -np.expm1(-x_SN)
            return 1 + star_S[:, None] * gone_SN, star_S[:, None] * (gone_SN - x_SN * np.exp(-x_SN))

        def law(theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            star_SP = np.exp(theta_SP)
            d_SN, d_by_SN = worth(r_d_N, star_SP[:, 0])
            n_SN, n_by_SN = worth(r_n_N, star_SP[:, 1])
            of_n_SN = base["A"] * (u_n_N * n_SN) ** -base["alpha"]
            of_d_SN = base["B"] * (seen_N * d_SN) ** -base["beta"]
            loss_SN = base["E"] + of_n_SN + of_d_SN
            by_SNP = np.stack([-base["beta"] * of_d_SN * d_by_SN / d_SN, -base["alpha"] * of_n_SN * n_by_SN / n_SN], -1)
            return np.log(loss_SN), by_SNP / loss_SN[..., None]

        return law


class Penalty:
    """Constants P, rho, kappa on top of Chinchilla's five, which are given."""

    names = ("P", "rho", "kappa")
    logarithms = (0,)
    lower_P, upper_P = np.array([-60.0, 0.05, 0.0]), np.array([20.0, 5.0, 3.0])

    def __init__(self, base: Base):
        self.base = base

    def starts(self, points: Points) -> np.ndarray:
        axes = (np.array([-12.0, -8, -5, -2]), np.array([0.5, 1, 2]), np.array([0.2, 0.5, 1]))
        return np.stack(np.meshgrid(*axes), -1).reshape(-1, 3)

    def at(self, points: Points):
        base = self.base
        seen_N, r_d_N = unique(points)
        surface_N = base["E"] + base["A"] / points.N ** base["alpha"] + base["B"] / points.D ** base["beta"]
        repeated_N = r_d_N > 1e-9
        log_r_N = np.log(np.where(repeated_N, r_d_N, 1.0))
        design_NP = np.stack([np.ones_like(log_r_N), log_r_N, np.log(points.N / seen_N)], -1)

        def law(theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            exponent_SN = np.minimum(theta_SP @ design_NP.T, 50.0)
            penalty_SN = np.where(repeated_N, np.exp(exponent_SN), 0.0)
            loss_SN = surface_N + penalty_SN
            return np.log(loss_SN), (penalty_SN / loss_SN)[..., None] * design_NP

        return law


class Saturating:
    """Constants E, a, b, c, alpha, beta, gamma, delta, all fitted; the base only says where to begin."""

    names = ("E", "a", "b", "c", "alpha", "beta", "gamma", "delta")
    logarithms = (0, 1, 2, 3)
    lower_P = np.array([-10.0, -20, -20, -60, 0.01, 0.01, 0.0, 0.01])
    upper_P = np.array([3.0, 60, 60, 60, 3, 3, 3, 3])

    def __init__(self, base: Base, nothing_known: float = math.log(50257)):
        self.base, self.top = base, nothing_known

    def starts(self, points: Points) -> np.ndarray:
        base, height = self.base, self.top - self.base["E"]
        surface = [math.log(base["E"]), math.log(base["A"] / height), math.log(base["B"] / height)]
        typical = float(np.log(points.U).mean())
        found = []
        for gamma in (0.1, 0.4, 1.0):
            for delta in (0.3, 0.6, 1.2):
                for size in (-4.0, -2.0):
                    c = size - gamma * float(np.log(points.N).mean()) + delta * typical
                    found.append([*surface, c, base["alpha"], base["beta"], gamma, delta])
        return np.array(found)

    def at(self, points: Points):
        n, d, u, one, zero = np.log(points.N), np.log(points.D), np.log(points.U), np.ones(len(points)), 0.0
        design_NKP = np.zeros((len(points), 3, 7))  # of ln h: columns a, b, c, alpha, beta, gamma, delta
        design_NKP[:, 0, 0], design_NKP[:, 0, 3] = one, -n
        design_NKP[:, 1, 1], design_NKP[:, 1, 4] = one, -d
        design_NKP[:, 2, 2], design_NKP[:, 2, 5], design_NKP[:, 2, 6] = one, n, -u
        top = self.top

        def law(theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            e_S1 = np.exp(theta_SP[:, :1])
            k, p = 3, 7
            terms_SNK = (theta_SP[:, 1:] @ design_NKP.reshape(-1, p).T).reshape(len(theta_SP), -1, k)
            share_SNK = np.exp(np.minimum(terms_SNK, 50.0))
            h_SN = share_SNK.sum(-1)
            level_SN = h_SN / (1 + h_SN)
            loss_SN = e_S1 + (top - e_S1) * level_SN
            by_h_SN = (top - e_S1) / (1 + h_SN) ** 2
            by_SNP = sum(share_SNK[:, :, i, None] * design_NKP[:, i] for i in range(k)) * by_h_SN[..., None]
            by_e_SN1 = (e_S1 * (1 - level_SN))[..., None]
            return np.log(loss_SN), np.concatenate([by_e_SN1, by_SNP], -1) / loss_SN[..., None] + zero

        return law


LAWS = {"effective": Effective, "penalty": Penalty, "saturating": Saturating}
