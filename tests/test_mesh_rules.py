"""Which meshes a run can have: asked without a device, by the launcher, and by the model of time and money."""

import subprocess
import sys

import pytest

from experiments import smoke, tinyllama
from tinyllama_jax import mesh_rules
from tinyllama_jax.config import Mesh, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.launch import machine, plan
from tinyllama_jax.preflight import money
from tinyllama_jax.schedules import Plan

V1_0 = tinyllama.v1_0()
TARGET = "a100-40g:2x8"
EIGHT = "v5e:2x4"


@pytest.mark.parametrize(
    "mesh, devices, got",
    [
        (Mesh(), 1, (1, 1, 1, 1)),
        (Mesh(), 16, (1, 16, 1, 1)),
        (Mesh(replica=-1, data=4, context=2, tensor=2), 64, (4, 4, 2, 2)),
        (Mesh(data=2, context=-1, tensor=4), 16, (1, 2, 2, 4)),
        (Mesh(data=2, tensor=-1), 16, (1, 2, 1, 8)),
    ],
)
def test_one_axis_takes_what_is_left(mesh, devices, got):
    assert tuple(mesh_rules.sizes(mesh, devices).items()) == tuple(zip(mesh_rules.AXES, got, strict=True))


@pytest.mark.parametrize("mesh", [Mesh(data=4), Mesh(tensor=3), Mesh(replica=32), Mesh(data=4, context=2, tensor=4)])
def test_four_sizes_must_multiply_to_the_devices(mesh):
    with pytest.raises(ConfigError, match=r"does not make up the 16 device\(s\) of here; choose sizes") as error:
        mesh_rules.sizes(mesh, 16, "of here")
    assert f"mesh.context={mesh.context} x mesh.tensor={mesh.tensor}" in str(error.value)


def changed(**fields):
    return replace(V1_0, mesh=Mesh(**fields.pop("mesh")), model=replace(V1_0.model, **fields))


REFUSED = [
    (changed(mesh=dict(tensor=8)), "mesh.tensor=8 does not divide model.kv_heads=4"),
    (changed(mesh=dict(tensor=2), heads=3, kv_heads=1), "mesh.tensor=2 does not divide model.heads=3"),
    (changed(mesh=dict(tensor=2), d_ff=5631), "mesh.tensor=2 does not divide model.d_ff=5631"),
    (changed(mesh=dict(tensor=2), vocab_size=32_001), "mesh.tensor=2 does not divide model.vocab_size=32001"),
    (replace(smoke.tiny(), mesh=Mesh(data=2, context=4)), None),
    (
        replace(V1_0, data=replace(V1_0.data, sequence_tokens=1), mesh=Mesh(context=2)),
        "mesh.context=2 does not divide data.sequence_tokens=1",
    ),
    (
        replace(smoke.tiny(), mesh=Mesh(data=16)),
        "stage 'basic': a micro-batch of 8 sequences cannot be spread over 16 devices",
    ),
    (replace(smoke.tiny(), mesh=Mesh(data=4, tensor=2, context=2)), None),  # the batch is cut in four, not in sixteen
    (replace(V1_0, mesh=Mesh(replica=2, data=2, context=2, tensor=2)), None),
    (replace(V1_0, mesh=Mesh(data=2, context=2, tensor=2)), "does not make up the 16 device(s) of"),
]


@pytest.mark.parametrize("run, words", REFUSED, ids=lambda value: getattr(value, "name", value))
def test_launch_and_preflight_refuse_what_training_refuses(run, words):
    target = EIGHT if run.mesh == Mesh(data=2, context=4) else TARGET
    machines = machine.parse(target, None, "tpu" if target == EIGHT else "slurm")
    if words is None:
        sizes = mesh_rules.sizes(run.mesh, machines.devices)
        mesh_rules.check(run, Plan(run.curriculum, run.data.sequence_tokens).stages, sizes)
        plan.check(run, machines)
        assert money.estimate(run, target)["days"] > 0
        return
    for ask in (lambda: plan.check(run, machines), lambda: money.estimate(run, target)):
        with pytest.raises(ConfigError) as error:
            ask()
        assert words in str(error.value) and "\n" not in str(error.value)


def test_the_rules_need_no_jax():
    code = "import sys\nimport tinyllama_jax.mesh_rules\nassert not {'jax', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
