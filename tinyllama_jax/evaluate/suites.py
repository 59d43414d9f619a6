"""Named suites of downstream tasks, by the names of lm-evaluation-harness, and how a result's number is chosen.

The paper (arXiv 2401.02385) took common sense from lm-evaluation-harness, 0-shot, with `acc_norm` where a task has
it, and problem solving from Instruct-Eval.  The harness' tasks for the latter ask and count otherwise than
Instruct-Eval, which took an answer that begins with the right one for right: compare these numbers with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tinyllama_jax.errors import UsageError

SHARES = ("acc_norm", "acc", "exact_match", "pass@1", "em", "f1", "mcc")  # shown in percent
PREFERRED = (*SHARES, "bits_per_byte", "word_perplexity", "perplexity")  # of a task that no suite names


@dataclass(frozen=True)
class Task:
    name: str
    metric: str = ""  # empty: the first of PREFERRED that the task has, else its first
    shots: int | None = None  # None: as the harness' task says
    runs_code: bool = False  # what the model writes is executed


SUITES = {
    "tinyllama": (
        Task("hellaswag", "acc_norm", 0),
        Task("openbookqa", "acc_norm", 0),
        Task("winogrande", "acc", 0),
        Task("arc_challenge", "acc_norm", 0),
        Task("arc_easy", "acc_norm", 0),
        Task("boolq", "acc", 0),
        Task("piqa", "acc_norm", 0),
    ),
    # bbh_fewshot has the three examples without a chain of thought, as Instruct-Eval asked; `bbh` has one.
    "problem-solving": (
        Task("mmlu", "acc", 5),
        Task("bbh_fewshot", "exact_match", 3),
        Task("humaneval", "pass@1", 0, runs_code=True),
        Task("drop", "em", 3),
    ),
    "chinese": (
        Task("xwinograd_zh", "acc", 0),
        Task("xstorycloze_zh", "acc", 0),
        Task("xnli_zh", "acc", 0),
        Task("xcopa_zh", "acc", 0),
    ),
}


def expand(text: str, shots: int | None = None) -> tuple[Task, ...]:
    """The tasks of `tinyllama,my_task`: suites by their members, others by their names; `shots` for all of them.

    Raises UsageError for an empty name and for a task that is named twice.
    """
    tasks: list[Task] = []
    for name in (part.strip() for part in text.split(",")):
        if not name:
            raise UsageError(f"--tasks {text!r} has an empty name; separate tasks and suites by single commas")
        tasks += SUITES.get(name, (Task(name),))
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"--tasks {text!r} names the task {twice} twice; a suite has it already")
    return tuple(task if shots is None else replace(task, shots=shots) for task in tasks)


def suites_in(text: str) -> list[str]:
    return [name for name in (part.strip() for part in text.split(",")) if name in SUITES]


def chosen(task: Task, metrics: Sequence[str]) -> str:
    """Which of a task's metrics stands for it.  Raises UsageError when it lacks the one that its suite asks for."""
    if task.metric:
        if task.metric not in metrics:
            raise UsageError(f"task {task.name} has no metric {task.metric}; it has {', '.join(metrics)}")
        return task.metric
    return next((name for name in PREFERRED if name in metrics), metrics[0])
