"""Prefill and cached decoding give the logits of the whole forward pass; few bits stand for what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_transformer import CFG, ROPES, one_device, weights

from tinyllama_jax import config, sharding
from tinyllama_jax.config import Execution, replace
from tinyllama_jax.errors import ConfigError
from tinyllama_jax.model import cached, quantized, transformer

B, T = 8, 12
TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (B, T)).astype(np.int32)
LENGTHS = np.array([3, 6, 1, 5, 2, 6, 4, 3])
GQA = {f"{heads} over {kv}": (heads, kv) for heads, kv in ((4, 4), (4, 2), (4, 1), (9, 3))}


@pytest.fixture
def mesh():
    with jax.set_mesh(one_device()) as mesh:
        yield mesh


def logits(tokens, cfg=CFG, params=None, **more):
    params = weights(cfg) if params is None else params
    return np.asarray(jax.jit(lambda p, t: transformer.logits(p, t, cfg, Execution(), **more))(params, tokens))


@functools.cache
def functions(cfg, **options):
    """Compiled prefill and decode."""
    prefill = jax.jit(lambda p, t, last: cached.prefill(p, t, cfg, Execution(), last))
    return prefill, jax.jit(lambda p, t, cache, at: cached.decode(p, t, cfg, cache, at, **options))


def longer(cache, slots):
    return jax.tree.map(lambda x: np.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), cache)


def assert_decodes_as_the_whole(cfg, params=None):
    """Ragged prompts, prefilled together and continued one token at a time, against the forward pass over all."""
    params = weights(cfg) if params is None else params
    want, (prefill, step) = logits(TOKENS, cfg, params), functions(cfg)
    rows, lengths = np.arange(B), LENGTHS.copy()
    prompts = np.where(np.arange(6) < lengths[:, None], TOKENS[:, :6], 7)
    got, cache = prefill(params, prompts, lengths - 1)
    np.testing.assert_allclose(got, want[rows, lengths - 1], atol=2e-5)
    cache = longer(cache, T)
    for _ in range(T - 6):
        got, cache = step(params, TOKENS[rows, lengths][:, None], cache, lengths[:, None])
        np.testing.assert_allclose(got[:, 0], want[rows, lengths], atol=2e-5)
        lengths = lengths + 1


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_every_rope(mesh, rope):
    assert_decodes_as_the_whole(replace(CFG, rope=rope))


@pytest.mark.parametrize("heads", GQA.values(), ids=GQA)
def test_every_grouping(mesh, heads):
    assert_decodes_as_the_whole(replace(CFG, heads=heads[0], kv_heads=heads[1], tied_embeddings=True))


def test_several_tokens_at_a_time(mesh):
    want, (_, step) = logits(TOKENS), functions(CFG)
    cache = cached.init_cache(CFG, B, T)
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    for begin, end in ((0, 5), (5, 6), (6, 12)):
        got, cache = step(weights(CFG), TOKENS[:, begin:end], cache, at[:, begin:end])
        np.testing.assert_allclose(got, want[:, begin:end], atol=2e-5)


def test_a_document_alone_is_that_document_in_a_packed_row(mesh):
    documents = np.repeat(np.array([[0, 1]], np.int32), [5, 7], axis=1)
    packed = logits(TOKENS[:1], documents_BT=jnp.asarray(documents))
    prefill, step = functions(CFG)
    got, cache = prefill(weights(CFG), TOKENS[:1, 5:8], np.array([2]))
    cache = longer(cache, 8)
    np.testing.assert_allclose(got, packed[:, 7], atol=2e-5)
    for place in range(8, T):
        at = np.array([[place - 5]])
        got, cache = step(weights(CFG), TOKENS[:1, place : place + 1], cache, at)
        np.testing.assert_allclose(got[:, 0], packed[:, place], atol=2e-5)


@pytest.mark.parametrize("mesh_cfg", [config.Mesh(replica=2), config.Mesh(replica=2, data=2, tensor=2)], ids=str)
def test_on_a_mesh(mesh_cfg):
    mesh = sharding.make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        put = functools.partial(jax.device_put, device=sharding.batch_sharding(mesh))
        params = jax.device_put(weights(CFG), sharding.param_shardings(weights(CFG), mesh))
        want, (_, step) = logits(put(TOKENS), params=params), functions(CFG)
        rows, lengths = np.arange(B), LENGTHS.copy()
        prompts = np.where(np.arange(6) < lengths[:, None], TOKENS[:, :6], 7)
        at = np.broadcast_to(np.arange(6, dtype=np.int32), (B, 6))
        cache = cached.init_cache(CFG, B, 10, sharding.BATCH)
        got, cache = step(params, put(prompts), cache, put(at))
        np.testing.assert_allclose(np.asarray(got)[rows, lengths - 1], want[rows, lengths - 1], atol=2e-5)
        got, cache = step(params, put(TOKENS[rows, lengths][:, None]), cache, put(lengths[:, None].astype(np.int32)))
        np.testing.assert_allclose(np.asarray(got)[:, 0], want[rows, lengths], atol=2e-5)
        tensor = "tensor" if mesh_cfg.tensor > 1 else None
        assert cache[0]["k"].sharding.spec == P(sharding.BATCH, tensor, None, None)


def test_a_position_past_the_cache_is_not_written(mesh):
    cache = cached.init_cache(CFG, B, 4)
    assert {leaf.shape for layer in cache for leaf in layer.values()} == {(B, 2, 4, 8)} and len(cache) == 2
    at = np.broadcast_to(np.array([0, 4], np.int32), (B, 2))
    _, cache = functions(CFG)[1](weights(CFG), TOKENS[:, :2], cache, at)
    written = np.abs(np.asarray(cache[0]["k"])).max(axis=(0, 1, 3))
    assert written[0] > 0 and not written[1:].any()


def test_only_the_visible_slots_are_read(mesh):
    cache = jax.tree.map(lambda x: x.at[:, :, 4:].set(jnp.nan), cached.init_cache(CFG, B, 16))
    step = functions(CFG, visible=4)[1]
    at = np.broadcast_to(np.arange(3, dtype=np.int32), (B, 3))
    got, _ = step(weights(CFG), TOKENS[:, :3], cache, at)
    np.testing.assert_allclose(got, logits(TOKENS)[:, :3], atol=2e-5)


def test_sliding_sees_the_last_tokens_only(mesh):
    """One layer, whose keys and values do not depend on what was seen: the last S tokens decide."""
    cfg, slots = replace(CFG, layers=1), 4
    step, cache = functions(cfg, slide=True)[1], cached.init_cache(cfg, B, slots)
    for t in range(T):
        got, cache = step(weights(cfg), TOKENS[:, t : t + 1], cache, np.full((B, 1), t))
        # RoPE depends on differences only: a window that begins anew gives the same.
        want = logits(TOKENS[:, max(0, t - slots + 1) : t + 1], cfg)[:, -1]
        np.testing.assert_allclose(got[:, 0], want, atol=5e-5)


WIDE = replace(CFG, head_dim=32, d_ff=64)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_weights_in_few_bits_decode_as_what_they_stand_for(mesh, bits):
    params = jax.jit(quantized.serving, static_argnums=(1, 2))(weights(WIDE), WIDE, bits)
    plain = jax.tree.map(np.asarray, quantized.whole(params, jnp.dtype("float32")))
    step = functions(WIDE)[1]
    at = np.broadcast_to(np.arange(4, dtype=np.int32), (B, 4))
    got, _ = step(params, TOKENS[:, :4], cached.init_cache(WIDE, B, 4), at)
    want, _ = step(plain, TOKENS[:, :4], cached.init_cache(WIDE, B, 4), at)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(np.asarray(got) - logits(TOKENS[:, :4], WIDE)).max() > 1e-4, "nothing was rounded"


@pytest.mark.parametrize(("bits", "share"), [("int8", 0.5 / 127), ("int4", 0.5 / 7)])
@pytest.mark.parametrize("inputs", [(0,), (0, 1)])
def test_rounding_is_at_most_half_a_step(mesh, bits, share, inputs):
    w = np.random.default_rng(1).standard_normal((64, 32, 5), np.float32)
    stored = quantized.quantize(jnp.asarray(w), bits, inputs)
    error = np.abs(np.asarray(quantized.whole(stored, jnp.dtype("float32"))) - w)
    if bits == "int8":
        largest = np.abs(w).max(axis=inputs, keepdims=True)
    else:
        axis = inputs[-1]
        groups = np.abs(w.reshape(*w.shape[:axis], -1, 32, *w.shape[axis + 1 :])).max(axis=axis + 1)
        largest = np.repeat(groups, 32, axis=axis)
        share = 1 / 8  # the largest of the other sign is clipped from 8 to 7 steps
    assert (error <= largest * share * 1.0001).all() and error.max() > 0


def test_sizes_in_few_bits(mesh):
    w = jnp.ones((1024, 64))
    nbytes = lambda stored: stored.codes.nbytes + stored.scale.nbytes  # noqa: E731
    assert nbytes(quantized.quantize(w.astype(jnp.bfloat16), "int8", (0,))) == w.size + 64 * 2
    assert nbytes(quantized.quantize(w.astype(jnp.bfloat16), "int4", (0,))) == w.size // 2 + w.size // 32 * 2
    zeros = quantized.quantize(jnp.zeros((64, 4)), "int4", (0,))
    assert not np.asarray(quantized.whole(zeros, jnp.dtype("float32"))).any()


def test_int4_says_what_does_not_divide(mesh):
    with pytest.raises(ConfigError, match="out .* 32 inputs, which do not divide 8; take int8"):
        jax.jit(quantized.serving, static_argnums=(1, 2))(weights(CFG), CFG, "int4")
