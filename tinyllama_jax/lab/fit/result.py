"""What every fit answers with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Fit:
    """Constants with their uncertainty, and what to know before one believes them."""

    law: str
    constants: dict[str, float]
    objective: float  # sum of Huber losses of log-loss residuals
    ci95: dict[str, list[float]]  # of constants and derived quantities
    derived: dict[str, object]
    warnings: list[str]
    quality: dict[str, object] = field(default_factory=dict)
    data: dict[str, object] = field(default_factory=dict)  # what the points cover: Points.span
    draws: dict[str, np.ndarray] = field(default_factory=dict)  # the bootstrap, for whatever is derived of it
    profiles: dict[str, dict] = field(default_factory=dict)

    def as_json(self) -> dict:
        return {
            "law": self.law,
            "constants": self.constants,
            "objective": self.objective,
            "ci95": self.ci95,
            "derived": self.derived,
            "warnings": self.warnings,
            "data": self.data,
            "quality": self.quality,
            "profiles": {
                name: {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in one.items()}
                for name, one in self.profiles.items()
            },
        }

    def lines(self) -> list[str]:
        """For a person: five digits, because two cost a third of D* at 4e25 FLOPs."""
        said = [f"{self.law}: objective {self.objective:.10g}"]
        for name, value in self.constants.items():
            low, high = self.ci95.get(name, (value, value))
            said.append(f"  {name:>6} {value:>14.6g}   95 %: {low:.5g} to {high:.5g}")
        for name, value in self.derived.items():
            if isinstance(value, float):
                low, high = self.ci95.get(name, (value, value))
                said.append(f"  {name:>6} {value:>14.6g}   95 %: {low:.5g} to {high:.5g}")
        if held := self.quality.get("held_out"):
            ratio = f"{held['compute_ratio']:.3g}"
            said.append(f"  left out: the largest budget, {ratio} times the next: {missed(held)}")
        return said + [f"warning: {text}" for text in self.warnings]


def missed(held: dict) -> str:
    """What a fit without the largest budget says of it, beside what was measured."""
    if "N" not in held:
        mean, most = held["mean_relative_error"], held["largest_relative_error"]
        return f"its losses are missed by {mean:.2%} on average, {most:.2%} at most"
    low, high = held["N_ci95"]
    return (
        f"N* {held['N']:.4g} ({low:.4g} to {high:.4g}) instead of {held['measured_N']:.4g}, which would cost "
        f"{held['relative_loss']:.2%} of the loss"
    )


def residual_quality(predicted_N: np.ndarray, measured_N: np.ndarray) -> dict[str, float]:
    """Of losses, not of their logarithms: R², and the root mean square of the log residuals."""
    around = ((measured_N - measured_N.mean()) ** 2).sum()
    return {
        "points": len(measured_N),
        "r2": float(1 - ((predicted_N - measured_N) ** 2).sum() / around) if around > 0 else float("nan"),
        "rms_log_residual": float(np.sqrt((np.log(predicted_N / measured_N) ** 2).mean())),
    }
