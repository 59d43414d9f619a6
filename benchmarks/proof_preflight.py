"""The 1.1B step of v1_0, as the experiment is written, compiled for every machine that it is meant for.

    make proof-preflight        about 15 minutes on two cores; needs the extra `preflight`, and no device

Writes one line per machine to results/preflight_v1_0.jsonl and ends with 1 when one of them does not hold it.
"""

import json
import subprocess
import sys

from lines import RESULTS, ROOT, emit, origin

MACHINES = ("a100-40g:2x8", "h200:8", "v4:2x2x4", "v5p:2x2x4", "v6e:4x4", "v5e:4x4")


def main() -> int:
    held = True
    with open(RESULTS / "preflight_v1_0.jsonl", "w") as file:
        for machine in MACHINES:
            ask = ["-m", "tinyllama_jax", "preflight", "experiments.tinyllama:v1_0", "--target", machine, "--json"]
            done = subprocess.run([sys.executable, *ask], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if not done.stdout:
                return done.returncode
            value = json.loads(done.stdout)
            held &= value["fits"]
            emit(value | origin(), file)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
