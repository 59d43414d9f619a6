"""How far can data be repeated?  Unique tokens against epochs, after Muennighoff et al. (arXiv 2305.16264).

    tinyllama sweep experiments.repetition:repetition_cpu --workdir runs/repetition
    tinyllama fit repetition --runs runs/repetition --runs runs/isoflop
    tinyllama report runs/repetition

Protocol.  The unique tokens are views of one store, the smaller inside the larger, each with a manifest
(data/views.py).  Held-out text is the store's, disjoint by document, the same for all.  Model, batch and learning rate
are the same throughout; the schedule ends at the end of each run.  Every epoch comes in an order of its own
(`data.epochs`), and `*_replay` repeats the first one exactly.  Weight decay is an axis, because what a repeated token
is worth depends on the regularisation (arXiv 2509.14786).  The loss on the first windows that were trained on is logged
beside the held-out one: their gap is what was memorised.

Most epochs and all budgets are powers of two of each other: there are runs of equal D that differ in unique tokens
alone.  On the CPU 80 k parameters see 50 k to 9 M tokens: enough to see overfitting begin and weight decay delay it;
the constants say nothing about models a thousand times as large.
"""

from collections.abc import Sequence

from experiments.scaling import cpu_base, pod_base, small
from tinyllama_jax.config import Run, replace
from tinyllama_jax.lab import sweep
from tinyllama_jax.presets import preset

SEEDS = (3407, 3408, 3409)


def repetition_cpu() -> list[Run]:
    """3 budgets x 5 epoch counts at weight decay 0.1, and one budget at 1.0: 20 runs, 15 minutes on two cores."""
    base = _watched(replace(cpu_base("repetition"), model=small(40)), 256)
    grid = sweep.repeated(base, (50_000, 100_000, 200_000), (1, 4, 8, 16, 44))
    decayed = sweep.product(_of(grid, 100_000), {"optimizer.weight_decay": [1.0]})
    return sweep.checked(sweep.chain(grid, decayed))


def repetition_cpu_replay() -> list[Run]:
    """One budget with every epoch in the order of the first."""
    base = _watched(replace(cpu_base("repetition"), model=small(40)), 256)
    return sweep.checked(sweep.product(sweep.repeated(base, (100_000,), (4, 8, 16, 44)), {"data.epochs": ["replay"]}))


def repetition_pod() -> list[Run]:
    """331 M parameters on 100 M, 400 M and 1.6 B unique tokens for 1 to 44 epochs, and a 4 times smaller model; four
    weight decays and exact replay at the smallest budget, whose runs have three seeds."""
    epochs, smallest = (1, 2, 4, 8, 16, 44), 100_000_000
    runs = []
    for name in ("t331", "t79"):
        base = _watched(replace(pod_base(f"repetition-{name}"), model=preset(name)), 1024)
        runs += sweep.repeated(base, (smallest, 4 * smallest, 16 * smallest), epochs)
        few = sweep.repeated(base, (smallest,), epochs)
        runs += sweep.product(few, {"optimizer.weight_decay": [0.3, 1.0, 3.0]})
        runs += sweep.product(few[1:], {"data.epochs": ["replay"]})
        runs += sweep.product(few, {"seed": SEEDS[1:]})
    return sweep.checked(runs)


def _watched(run: Run, sequences: int) -> Run:
    """With the loss on so many windows of each source that were trained on beside that on fresh ones."""
    return replace(run, evaluation=replace(run.evaluation, seen_sequences=sequences))


def _of(runs: Sequence[Run], unique: int) -> list[Run]:
    return [run for run in runs if run.data.unique_tokens == unique]
