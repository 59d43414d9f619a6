"""References of pairs that two processes compute together, and read together when they are there."""

from pathlib import Path

import pytest
from hosts import Hosts, begun_again, program

pytestmark = pytest.mark.faults

COMPUTE_THEN_READ = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tinyllama_jax.distributed import joined, place

with joined(place(), peer_seconds=60) as peers:
    import jax
    import numpy as np
    import pair_store
    from test_preference import EXECUTION, MODEL, RUN, host_weights
    from tinyllama_jax import config, sharding
    from tinyllama_jax.finetune.pairs import PairValidator
    from tinyllama_jax.finetune.reference import references

    mesh = sharding.make_mesh(config.Mesh(data=-1))

    def weights():
        params = host_weights()
        place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
        return jax.tree.map(place, params, sharding.param_shardings(params, mesh))

    with jax.set_mesh(mesh):
        for make in (weights, None):  # None would fail if it were called
            store = references(pair_store.store(), RUN, make, mesh, Path({workdir!r}), base="b", peers=peers)
            peers.barrier("have them", 60)
        windows = {{"good": store.split("validation", "good").read(np.arange(5), pair_store.WINDOW)}}
        measure = PairValidator(windows, MODEL, EXECUTION, mesh, RUN.preference, batch_sequences=4, peers=peers)
        print("FOUND", windows["good"].reference_N2.tolist(), measure(weights())["good"]["loss"], flush=True)
"""


@begun_again
def test_two_processes_share_the_references(tmp_path):
    text = COMPUTE_THEN_READ.format(tests=str(Path(__file__).parent), workdir=str(tmp_path))
    with Hosts(2, program(text), devices=2) as hosts:
        statuses = hosts.wait()
        said = [[line for line in hosts.said(i).splitlines() if line.startswith("FOUND")] for i in range(2)]
        assert statuses == [0, 0], hosts.said(0) + hosts.said(1)
    assert said[0] == said[1] and len(said[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reference.json", "reference.npz"]
