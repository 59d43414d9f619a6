"""The number for an array's content: the same wherever it lies, another one for any other content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax.train import fingerprint

RNG = np.random.default_rng(0)
WORDS = RNG.integers(0, 256, (8, 16, 24, 8), np.uint8)  # any bits, NaNs among them
DTYPES = (np.uint8, np.int8, np.bool_, jnp.bfloat16, np.float16, np.float32, np.int32, np.uint32)
WIDE = (np.float64, np.int64)


def sample(dtype) -> np.ndarray:
    if dtype is np.bool_:
        return WORDS[..., 0] > 99
    return np.ascontiguousarray(WORDS[..., : np.dtype(dtype).itemsize]).view(dtype)[..., 0]


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1)])
def test_devices_on_any_mesh_and_the_host_find_the_same(shape, kind):
    arrays = {np.dtype(dtype).name: sample(dtype) for dtype in DTYPES}
    expected = {name: fingerprint.of_host(array) for name, array in arrays.items()}
    assert fingerprint.fingerprints(arrays) == expected
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("replica", "data"), devices=devices, axis_types=(kind,) * 2)
    for spec in (P(), P("data"), P("replica", "data"), P(None, None, ("replica", "data"))):
        placed = {name: jax.device_put(array, NamedSharding(mesh, spec)) for name, array in arrays.items()}
        assert fingerprint.fingerprints(placed) == expected, spec


def test_elements_of_eight_bytes():
    with jax.enable_x64(True):
        for dtype in WIDE:
            array = sample(dtype)
            assert fingerprint.fingerprints({"x": jnp.asarray(array)}) == {"x": fingerprint.of_host(array)}


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (1, 1, 1)])
def test_scalars_and_empty_arrays(shape):
    array = np.ones(shape, np.float32)
    found = fingerprint.fingerprints({"host": array, "device": jnp.asarray(array)})
    assert found["host"] == found["device"] == fingerprint.of_host(array)
    assert (found["host"] == "0" * 16) == (array.size == 0)


def test_blocks_of_the_host_and_views_make_no_difference(monkeypatch):
    array = RNG.integers(0, 2**31, (6, 50, 70), np.int32)
    whole = fingerprint.of_host(array)
    for size in (4, 64, 1000, 30_000):  # bytes: within a row, of some rows, of some planes
        monkeypatch.setattr(fingerprint, "_BLOCK_BYTES", size)
        assert fingerprint.of_host(array) == whole
        assert fingerprint.of_host(np.asfortranarray(array)) == whole
    assert fingerprint.of_host(array[::-1]) != whole


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(DTYPES + WIDE), st.integers(0, 3071), st.integers(0, 63))
def test_any_flipped_bit_changes_both_halves(dtype, element, bit):
    array = sample(dtype).copy()
    before = fingerprint.of_host(array)
    if dtype is np.bool_:
        array.reshape(-1)[element] ^= True
    else:
        size = array.dtype.itemsize
        array.reshape(-1).view(f"u{size}")[element] ^= np.array(1 << (bit % (8 * size)), f"u{size}")
    after = fingerprint.of_host(array)
    assert before[:8] != after[:8]
    # The second half is a bijection of what the first adds up, so it changes as well; of two words, only one changed.
    assert before[8:] != after[8:]


def test_the_mix_is_a_bijection_of_the_bits_for_a_fixed_place():
    """All 65,536 values of one element of two bytes, at some places: 65,536 different fingerprints, in each half."""
    key = fingerprint._host_key(6, 0)[5:]
    found = [fingerprint._host_block(np.array([v], np.uint16), [key], np.uint32(1)) for v in range(1 << 16)]
    assert len({first for first, _ in found}) == len({second for _, second in found}) == 1 << 16


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 3071), st.integers(0, 3071))
def test_two_elements_that_change_places(a, b):
    array = sample(np.float32).copy()
    flat = array.reshape(-1).view(np.uint32)
    before = fingerprint.of_host(array)
    flat[a], flat[b] = int(flat[b]), int(flat[a])
    assert (fingerprint.of_host(array) == before) == (flat[a] == flat[b])


def test_no_device_gathers_an_array():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    array = jax.device_put(np.ones((64, 256), np.float32), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        text = jax.jit(fingerprint._sums).lower((array,)).compile().as_text()
    assert "f32[8,256]" in text and "all-" in text  # its own rows; then partial sums travel
    assert "[64,256]" not in text
