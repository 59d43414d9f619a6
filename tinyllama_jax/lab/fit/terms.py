"""Laws that are sums of powers: the logarithm of a sum of terms, each of which is linear in the constants.

    ln L = ln sum_k exp( offset_NK + design_NKP theta_P )

Chinchilla's E + A/N^alpha + B/D^beta is one, with theta = (ln A, ln B, ln E, alpha, beta): ln A - alpha ln N,
ln B - beta ln D and ln E.  A constant that is given rather than fitted moves from the design into the offset; two that
are tied share a column.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Terms:
    """A law at N points.  Called with theta_SP: (ln L)_SN and its derivative_SNP."""

    design_NKP: np.ndarray
    offset_NK: np.ndarray

    def __call__(self, theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Term by term: arrays of (S, N) are several times faster than reductions over a last axis of three.
        terms = [theta_SP @ self.design_NKP[:, k].T + self.offset_NK[:, k] for k in range(self.offset_NK.shape[1])]
        top_SN = functools.reduce(np.maximum, terms)
        shares = [np.exp(term_SN - top_SN) for term_SN in terms]
        total_SN = functools.reduce(np.add, shares)
        jac_SNP = np.zeros((*total_SN.shape, theta_SP.shape[1]))
        for k, share_SN in enumerate(shares):
            share_SN /= total_SN
            for p in np.flatnonzero(self.design_NKP[:, k].any(0)):
                jac_SNP[..., p] += share_SN * self.design_NKP[:, k, p]
        return top_SN + np.log(total_SN), jac_SNP

    def given(self, values: dict[int, float]) -> Terms:
        """The law of the other constants, with these (by column) held at their values."""
        offset_NK = self.offset_NK + sum((self.design_NKP[..., p] * v for p, v in values.items()), 0.0)
        free = [p for p in range(self.design_NKP.shape[2]) if p not in values]
        return Terms(self.design_NKP[..., free], offset_NK)

    def tied(self, one: int, other: int) -> Terms:
        """Column `other` joins column `one`."""
        design_NKP = self.design_NKP.copy()
        design_NKP[..., one] += design_NKP[..., other]
        return Terms(np.delete(design_NKP, other, axis=2), self.offset_NK)
