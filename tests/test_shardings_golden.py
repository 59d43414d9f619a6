"""How every array of the training state lies on meshes of 1 to 256 chips, compared with tests/golden/shardings.

No device is needed: an AbstractMesh has sizes only.  A file per case has one line per leaf: bytes per device, shape,
spec and path, so that a diff shows what a change to the sharding table moves.  After a change that is meant:
`pytest tests/test_shardings_golden.py --update-golden`.
"""

import math
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from tinyllama_jax import flops, sharding
from tinyllama_jax.config import Data, Run, Stage
from tinyllama_jax.presets import preset
from tinyllama_jax.train import state

FOLDER = Path(__file__).parent / "golden" / "shardings"
PRESETS = ("tinyllama-1.1b", "tinyllama-120m")
# Chips -> sizes of the mesh's axes; an axis that is left out has size 1.
MESHES = {
    "1": {},
    "8-fsdp": {"data": 8},
    "8-hsdp": {"replica": 2, "data": 4},
    "8-tensor": {"data": 4, "tensor": 2},
    "64-fsdp": {"data": 64},
    "64-hsdp": {"replica": 8, "data": 8},
    "64-tensor": {"data": 16, "tensor": 4},
    "64-context": {"data": 8, "context": 8},
    "256-fsdp": {"data": 256},
    "256-hsdp": {"replica": 16, "data": 16},
    "256-tensor": {"replica": 4, "data": 16, "tensor": 4},
    "256-context": {"replica": 2, "data": 16, "context": 4, "tensor": 2},
}
# `tensor` must divide the heads of keys and values.
CASES = [
    (name, mesh)
    for name in PRESETS
    for mesh, sizes in MESHES.items()
    if preset(name).kv_heads % sizes.get("tensor", 1) == 0
]


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    unknown = set(sizes) - set(sharding.AXES)
    assert not unknown, f"the mesh has no axis {unknown}"
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Explicit,) * len(shape))


def run_of(name: str) -> Run:
    stage = Stage(name="all", tokens=1, batch_tokens=2048, mixture={"text": 1.0})
    return Run(name=name, model=preset(name), data=Data(store="none"), curriculum=(stage,))


def leaves(name: str, mesh: str) -> list[tuple[str, jax.ShapeDtypeStruct]]:
    with jax.sharding.use_abstract_mesh(abstract := abstract_mesh(MESHES[mesh])):
        tree = state.abstract(run_of(name), abstract)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]


def local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def described(name: str, mesh: str) -> str:
    sizes = " x ".join(f"{axis}={size}" for axis, size in MESHES[mesh].items()) or "one device"
    rows = [(path, leaf, local_bytes(leaf)) for path, leaf in leaves(name, mesh)]
    lines = [f"{name} on {sizes}: {sum(size for *_, size in rows):,} bytes of state per device", ""]
    for path, leaf, size in rows:
        shape = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        spec = ", ".join("-" if axis is None else str(axis) for axis in leaf.sharding.spec)
        lines.append(f"{size:>14,}  {shape:<26}  ({spec})  {path}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name, mesh", CASES)
def test_every_leaf_lies_as_the_golden_file_says(name, mesh, request):
    path = FOLDER / f"{name}.{mesh}.txt"
    text = described(name, mesh)
    if request.config.getoption("--update-golden"):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize("name, mesh", CASES)
def test_the_state_is_cut_into_equal_parts(name, mesh):
    """Weights and both moments divide by `data` and `tensor`, and by neither `replica` nor `context`; norm scales,
    counts and the guard's window of losses are whole."""
    model = preset(name)
    found = leaves(name, mesh)
    norms = (2 * model.layers + 1) * model.d_model
    ways = math.prod(MESHES[mesh].get(axis, 1) for axis in ("data", "tensor"))
    weights = (flops.parameter_counts(model)["total"] - norms) // ways
    guard = 2 * run_of(name).optimizer.skip_window_steps + 2
    assert sum(local_bytes(leaf) for _, leaf in found) == 3 * 4 * (weights + norms) + 4 * (guard + 1)
    params = {path.removeprefix("params."): leaf for path, leaf in found if path.startswith("params.")}
    moments = [
        (path, leaf, next(p for p in params if path.endswith("." + p)))
        for path, leaf in found
        if ".mu." in path or ".nu." in path
    ]
    assert len(moments) == 2 * len(params)
    for path, leaf, parameter in moments:
        assert leaf.sharding.spec == params[parameter].sharding.spec, path


def test_no_golden_file_is_left_over():
    assert {path.stem for path in FOLDER.glob("*")} == {f"{name}.{mesh}" for name, mesh in CASES}
