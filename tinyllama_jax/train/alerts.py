"""Alerts: what a person who looks after a run should hear about at once, each said once per episode.

    divergence   the mean loss of the last window is well above the lowest one so far
    stall        one step took many times the median of the recent ones
    slow         the throughput of the last window is well below the run's median
    skips        several steps in a row left the weights as they were

They only tell; what ends a run or takes it back is in health.py.  Thresholds: `config.Health`.  Nothing here outlives
the process: after a start the first window of steps is listened to in silence, skipped steps excepted.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from tinyllama_jax.config import Health

_HISTORY = 1024  # throughputs that stand for the whole run


class Alerts:
    """Reads the lines of metrics.jsonl as they are written."""

    def __init__(self, health: Health, *, max_skips: int = 20):
        """max_skips: `optimizer.max_skips`, at which the run is taken back; a quarter of it is worth an alert."""
        self._health = health
        self._most_skips = max(1, max_skips // 4)
        self._skips = 0
        self._said: set[str] = set()  # the episodes that are going on
        self._stage = self._batch = None
        self._forget_losses()
        self._forget_times()

    def _forget_losses(self) -> None:
        self._losses: deque[float] = deque(maxlen=self._health.alert_window_steps)
        self._lowest = math.inf
        self._said.discard("divergence")

    def _forget_times(self) -> None:
        self._recent: deque[float] = deque(maxlen=self._health.alert_window_steps)  # seconds of each step
        self._window: deque[tuple[int, float]] = deque(maxlen=self._health.alert_window_steps)  # (tokens, seconds)
        self._history: list[float] = []  # tokens per second of every `_stride`-th step
        self._stride, self._steps = 1, 0
        self._said -= {"stall", "slow"}

    def step(self, record: dict) -> list[dict]:
        """The alerts that this line of metrics.jsonl gives rise to: {"alert", "step", "text", ...numbers}, mostly none.

        A loss that is not finite takes part in no mean.  A step whose time includes compilation is left out of all
        that is about time.
        """
        if record.get("stage") != self._stage:  # another mixture has another loss
            self._stage = record.get("stage")
            self._forget_losses()
        if record.get("batch_tokens") != self._batch:
            self._batch = record.get("batch_tokens")
            self._forget_times()
        timing = record.get("timing", {})
        found = [self._divergence(record), self._skipped(record)]
        if not timing.get("compiled") and timing.get("step_s", 0) > 0:
            stalled = self._stall(record["step"], timing["step_s"])
            found += [stalled, self._slow(record, timing)]
        return [alert for alert in found if alert is not None]

    def _divergence(self, record: dict) -> dict | None:
        loss, limit = record.get("loss"), self._health.divergence_nats
        if not limit or loss is None or not math.isfinite(loss):
            return None
        self._losses.append(loss)
        if len(self._losses) < self._losses.maxlen:
            return None
        mean = math.fsum(self._losses) / len(self._losses)
        self._lowest = min(self._lowest, mean)
        above = mean - self._lowest
        return self._once(
            "divergence",
            above > limit,
            above <= limit / 2,
            f"step {record['step']}: the mean loss of {len(self._losses)} steps is {mean:.3f}, {above:.2f} nats above "
            "its lowest so far; look at grad_norm and skipped in metrics.jsonl, and at lr.peak",
            step=record["step"],
            mean_loss=mean,
            lowest_mean_loss=self._lowest,
        )

    def _stall(self, step: int, seconds: float) -> dict | None:
        factor, usual = self._health.stall_factor, self._usual_seconds()
        self._recent.append(seconds)
        if not factor or usual is None:
            return None
        times = seconds / usual
        return self._once(
            "stall",
            times > factor,
            times <= factor,
            f"step {step} took {seconds:.3g} s, {times:.0f} times the usual {usual:.3g} s; look at data_wait_s in "
            "metrics.jsonl, and at the disk and the network of this machine",
            step=step,
            seconds=seconds,
            usual_seconds=usual,
        )

    def _usual_seconds(self) -> float | None:
        """The median of the recent steps; None in the first window."""
        return median(self._recent) if len(self._recent) == self._recent.maxlen else None

    def _slow(self, record: dict, timing: dict) -> dict | None:
        share, tokens = self._health.slow_share, self._batch
        if not share or not tokens or "stall" in self._said:  # a stalled step has had its own alert
            return None
        self._window.append((tokens, timing["step_s"]))
        self._remember(tokens / timing["step_s"])
        if self._steps < 2 * self._window.maxlen:  # a window to compare, and one to compare it with
            return None
        speed = sum(t for t, _ in self._window) / sum(s for _, s in self._window)
        usual = median(self._history)
        return self._once(
            "slow",
            speed < share * usual,
            speed >= (1 + share) / 2 * usual,
            f"step {record['step']}: {speed:,.0f} tokens/s over {len(self._window)} steps, {speed / usual:.0%} of the "
            f"run's median of {usual:,.0f}; look at data_wait_s in metrics.jsonl, and at clocks and neighbours of the "
            "devices",
            step=record["step"],
            tokens_per_s=speed,
            usual_tokens_per_s=usual,
        )

    def _remember(self, speed: float) -> None:
        """Keeps at most `_HISTORY` throughputs, evenly over the whole run."""
        if self._steps % self._stride == 0:
            self._history.append(speed)
            if len(self._history) == _HISTORY:
                self._history = self._history[::2]
                self._stride *= 2
        self._steps += 1

    def _skipped(self, record: dict) -> dict | None:
        self._skips = self._skips + 1 if record.get("skipped") else 0
        return self._once(
            "skips",
            self._skips >= self._most_skips,
            self._skips == 0,
            f"step {record['step']}: the last {self._skips} steps were skipped (loss or gradient not finite, or beyond "
            "optimizer.skip_sigma); look at grad_norm in metrics.jsonl, and at the data of these steps",
            step=record["step"],
            skipped_in_a_row=self._skips,
        )

    def _once(self, alert: str, begins: bool, ends: bool, text: str, **numbers) -> dict | None:
        """The alert if an episode begins here; between the two limits an episode neither begins nor ends."""
        if ends:
            self._said.discard(alert)
        if not begins or alert in self._said:
            return None
        self._said.add(alert)
        return {"alert": alert, "text": text, **numbers}
