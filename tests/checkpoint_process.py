"""One of several processes that save and restore together: `checkpoint_process.py PORT COUNT INDEX DIRECTORY PLAN`.

PLAN is JSON: a list of actions, done one after another.  What happens is printed, a line each.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = Path(__file__)
DEVICES = 2  # of each process


class Group:
    """`count` processes that follow one plan.  private: below it each has a folder for temporary files."""

    def __init__(
        self, count: int, directory: Path | str, plan: list[dict], *, environment=None, private: Path | None = None
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PJRT_NPROC")}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(PROGRAM.parent.parent), **(environment or {})}
        folders = [private / str(i) for i in range(count)] if private else [Path("/tmp")] * count
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), str(port), str(count), str(i), str(directory), json.dumps(plan)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env | {"TMPDIR": str(folder)},
            )
            for i, folder in enumerate(folders)
        ]

    def wait_for(self, index: int, line: str) -> None:
        for said in self.processes[index].stdout:
            if said.strip() == line:
                return
        raise AssertionError(f"process {index} never said {line!r}: {self.processes[index].stderr.read()}")

    def end(self) -> list[list[str]]:
        """What each said, when all have ended by themselves."""
        said = []
        for process in self.processes:
            out, err = process.communicate(timeout=180)
            assert process.returncode == 0, err
            said.append([line for line in out.splitlines() if not line.startswith("[Gloo]")])
        return said

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


class Peers:
    """Over the coordination service of jax.distributed, as the program has them."""

    def __init__(self, client, index: int, count: int):
        self.client, self.index, self.count = client, index, count
        self.names = tuple(f"process {i} (here)" for i in range(count))
        self.lead = index == 0
        self._turns: dict[str, int] = {}

    def _key(self, kind: str, name: str) -> str:
        name = f"{kind}/{name}"
        self._turns[name] = self._turns.get(name, 0) + 1
        return f"{name}/{self._turns[name]}"

    def barrier(self, name: str, seconds: float) -> None:
        key = self._key("barrier", name)
        self.client.key_value_set(f"{key}/{self.index}", "here")
        try:
            self.client.wait_at_barrier(key, int(seconds * 1000))
        except Exception as error:
            here = {int(k.rpartition("/")[2]) for k, _ in self.client.key_value_dir_get(key)}
            late = ", ".join(self.names[i] for i in range(self.count) if i not in here)
            raise TimeoutError(f"{late} did not come to {name!r} within {seconds:.0f} s") from error

    def tell(self, name: str, value=None):
        key = self._key("tell", name)
        if self.lead:
            self.client.key_value_set(key, json.dumps(value))
        return json.loads(self.client.blocking_key_value_get(key, 60_000))

    def gather(self, name: str, value) -> list:
        key = self._key("gather", name)
        self.client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        return [json.loads(self.client.blocking_key_value_get(f"{key}/{i}", 60_000)) for i in range(self.count)]


def values(step: int) -> dict:
    """What the state of `step` is, whoever holds it: sharded and whole arrays, a scalar, an empty one, bfloat16."""
    import ml_dtypes
    import numpy as np

    rng = np.random.default_rng(step)
    return {
        "params": {
            "q": rng.normal(size=(3, 16, 8)).astype(np.float32),
            "embed": rng.normal(size=(64, 40)).astype(np.float32),
            "scale": rng.normal(size=(5,)).astype(np.float32),
        },
        "optimizer": {
            "half": rng.normal(size=(16, 4)).astype(ml_dtypes.bfloat16),
            "none": np.zeros((0, 4), np.float32),
            "count": np.int32(step),
        },
    }


def specs() -> dict:
    from jax.sharding import PartitionSpec as P

    return {
        "params": {"q": P(None, "data", None), "embed": P("data", None), "scale": P()},
        "optimizer": {"half": P("data"), "none": P(), "count": P()},
    }


def main() -> None:
    port, count, index, directory, plan = sys.argv[1:]
    count, index = int(count), int(index)
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding

    jax.distributed.initialize(f"127.0.0.1:{port}", count, index, cluster_detection_method="deactivate")
    from jax._src import distributed

    from tinyllama_jax.distributed import ALONE
    from tinyllama_jax.errors import CheckpointError
    from tinyllama_jax.train import checkpoint_files
    from tinyllama_jax.train.checkpoint import Checkpoints

    peers = Peers(distributed.global_state.client, index, count) if count > 1 else ALONE
    held, begin = {}, checkpoint_files.begin

    def say(*words) -> None:
        print(*words, flush=True)

    def on_event(kind: str, step: int) -> None:
        say(kind, step)
        if held.get("at") == f"{kind} {step}" and held["process"] == index:
            say("held")
            time.sleep(held.get("seconds", 60))

    checkpoints = Checkpoints(
        directory.format(index=index), keep_temporary=2, on_event=on_event, peers=peers, barrier_seconds=20
    )
    for action in json.loads(plan):
        kind = action["do"]
        mesh = jax.make_mesh(
            tuple(action.get("mesh", (1, count * DEVICES))), ("replica", "data"), axis_types=(AxisType.Explicit,) * 2
        )
        places = jax.tree.map(lambda spec, mesh=mesh: NamedSharding(mesh, spec), specs())
        if kind == "hold":
            held = action
        elif kind == "limit":
            checkpoints._barrier_seconds = action["seconds"]
        elif kind == "sleep" and action["process"] == index:
            time.sleep(action["seconds"])
        elif kind == "fill" and action["process"] == index:  # the disk
            with open(action["path"], "wb") as file:
                room = os.statvfs(action["path"])
                file.write(bytes(room.f_bavail * room.f_bsize - action["but"]))
        elif kind == "obstruct" and action["process"] == index:  # its chunks cannot be written
            checkpoint_files.begin = lambda folder, arrays: begin(folder / "impossible\0", arrays)
        elif kind == "clear":
            checkpoint_files.begin = begin
        elif kind == "save":
            state = jax.tree.map(
                lambda v, s: jax.make_array_from_callback(v.shape, s, lambda i: v[i]), values(action["step"]), places
            )
            try:
                checkpoints.save(
                    action["step"],
                    state,
                    {"at": action["step"]},
                    permanent=action.get("permanent", False),
                    blocking=False,
                    tokenizer_files=action.get("tokenizer", {}).get(str(index), ()),
                )
                # As the next step would: what was given is overwritten at once.
                gone = jax.jit(lambda t: jax.tree.map(lambda x: x * 0, t), donate_argnums=0)(state)
                jax.block_until_ready(gone)
                checkpoints.wait()
                say("saved", action["step"])
            except CheckpointError as error:
                say("failed", error)
        elif kind == "restore":
            targets = jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), values(0), places)
            step, items, _ = checkpoints.restore(targets)
            expected = values(step)
            for found, wanted in zip(jax.tree.leaves(items), jax.tree.leaves(expected), strict=True):
                assert found.dtype == wanted.dtype and found.shape == wanted.shape
                for shard in found.addressable_shards:
                    assert np.asarray(shard.data).tobytes() == np.asarray(wanted[shard.index]).tobytes()
            say("restored", step)
    say("end")
    with contextlib.suppress(Exception):  # the other one may be held for longer
        peers.barrier("end", 20)
    time.sleep(0 if index else 1)  # the meeting point is in process 0
    os._exit(0)


if __name__ == "__main__":
    main()
