"""A process of its own for the compilers: they may end it, and the command that asked must live to say so.

The worker reads one JSON object per line and answers with one: first the run and the target, then one micro-batch
after another.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from typing import Any

from tinyllama_jax import configio
from tinyllama_jax.config import Run
from tinyllama_jax.errors import ConfigError, UsageError
from tinyllama_jax.preflight import targets

INSTALL = "pip install 'tinyllama_jax[preflight]'"
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # nothing runs; JAX must not look for the devices
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu asks the cloud's metadata server where it is otherwise
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no device to itself
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program would not have been compiled
}
PROGRAM = [sys.executable, "-m", "tinyllama_jax.preflight.worker"]


def check_installed(target: targets.Target) -> None:
    """Raises ConfigError, with what to install, when the compilers for the target are not there."""
    if target.platform == "tpu":
        missing = [] if _installed("libtpu") else ["libtpu"]
    else:
        plugin = any(_installed(f"jax_plugins.xla_cuda{n}") for n in (12, 13))
        missing = [] if plugin else ["jax-cuda13-plugin"]
    if missing:
        raise ConfigError(f"compiling for {target.name} needs {', '.join(missing)}; install with: {INSTALL}")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is not there
        return False


class Worker:
    """`with Worker(run, target) as worker`: `worker.description`, then `worker.compile(rows, micro_batches)`.

    Raises ConfigError or UsageError in one line: what the worker answered, or how it died.
    """

    def __init__(self, run: Run, target: targets.Target):
        self.target = target
        # XLA_FLAGS and LIBTPU_INIT_ARGS are the user's, and part of what is compiled.
        path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | ENVIRONMENT | path,
            text=True,
        )
        self.doing = "starting"
        self.description = self._ask({"run": configio.to_dict(run), "target": target.name})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(OSError):
                stream.close()

    def compile(self, rows: int, micro_batches: int) -> dict[str, Any]:
        self.doing = f"compiling {rows} sequences per device"
        return self._ask({"rows": rows, "micro_batches": micro_batches})

    def _ask(self, question: dict) -> dict[str, Any]:
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            death = self._death()
            self.__exit__()
            raise ConfigError(death)
        answer = json.loads(line)
        if "error" in answer:
            self.__exit__()
            raise (UsageError if answer["exit_status"] == UsageError.exit_status else ConfigError)(answer["error"])
        return answer

    def _death(self) -> str:
        status = self.process.wait()
        how = f"exit status {status}"
        if status < 0:
            how = signal.Signals(-status).name
        if status == -signal.SIGKILL:
            how += ", perhaps for want of this machine's own memory"
        self.errors.seek(0)
        said = _telling(self.errors.read().decode(errors="replace"))
        return f"the compiler for {self.target.name} ended ({how}) while {self.doing}" + (f": {said}" if said else "")


def _telling(log: str) -> str:
    """The line of a dead process's stderr that says most: a fatal one, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    fatal = [line for line in lines if re.match(r"(F\d{4}|LLVM ERROR|.*Check failed|\w*(Error|Exception):)", line)]
    return (fatal or lines or [""])[-1][:300]


def main() -> None:
    """The worker's side.  What libraries print goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    compiler = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if compiler is None:
                from tinyllama_jax.preflight.step import Compiler

                compiler = Compiler(configio.from_dict(Run, question["run"]), targets.parse(question["target"]))
                answer(compiler.describe())
            else:
                answer(compiler(question["rows"], question["micro_batches"]))
        except (ConfigError, UsageError) as error:
            answer({"error": str(error), "exit_status": error.exit_status})
        except Exception as error:
            # Whatever the compilers object to: a kernel that asks for too much, a missing tool, a bug of theirs.
            import traceback

            traceback.print_exc()
            first = " ".join(str(error).split())[:400]
            where = question.get("target") or compiler.target.name
            answer(
                {
                    "error": f"the step does not compile for {where}: {type(error).__name__}: {first}",
                    "exit_status": ConfigError.exit_status,
                }
            )


if __name__ == "__main__":
    main()
