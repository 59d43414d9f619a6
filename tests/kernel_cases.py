"""What the tests of our attention kernels share: which kernels there are, random problems, and the truth about them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyllama_jax.attention import attention
from tinyllama_jax.attention.choice import kernel

F32, BF16 = jnp.float32, jnp.bfloat16
DTYPES = {
    "blocks": (F32, BF16),
    "triton": (F32, BF16),
    "tpu": (F32, BF16),
    "hopper": (BF16,),
}  # what the matrix units of each take
NAMES = ("o", "lse", "dq", "dk", "dv")


def kernels(dtype=None, but=()):
    """Parametrises a test over the kernels, interpreted; with `dtype`, over those that compute in it."""
    names = [name for name in DTYPES if (dtype is None or dtype in DTYPES[name]) and name not in but]
    return pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in names])


def _marks(name):
    refusal = kernel(name).refuses(head_dim=64, dtype=jnp.dtype(BF16), soft_cap=None)
    return [pytest.mark.skip(reason=refusal)] if refusal else []


def problem(B=1, T=256, H=4, G=2, K=64, dtype=F32, seed=0):
    """q, k, v, and a cotangent for o: normal, of one dtype."""
    rng = np.random.default_rng(seed)
    heads = (H, G, G, H)
    return tuple(jnp.asarray(rng.normal(size=(B, T, h, K)), F32).astype(dtype) for h in heads)


def packed(lengths, T=None):
    """Document ids [1, T] of documents of these lengths."""
    ids = np.repeat(np.arange(len(lengths)), lengths)
    assert T is None or len(ids) == T
    return jnp.asarray(ids[None])


def run(*args, **options):
    """(o, lse, dq, dk, dv) by one implementation; the log-sum-exp's cotangent is `dlse` or zero.

    Computed when this returns: a simulated Hopper starts programs of its own, and XLA's CPU client admits 32 at a time.
    If operations that wait for its results have taken all of them, neither side can go on.
    """
    return jax.block_until_ready(everything(*args, **options))


@functools.partial(jax.jit, static_argnames=("implementation", "window", "soft_cap"))
def everything(q, k, v, do, documents=None, *, implementation, window=None, soft_cap=None, dlse=None):
    def both(q, k, v):
        return attention(
            q,
            k,
            v,
            documents=documents,
            window=window,
            soft_cap=soft_cap,
            implementation=implementation,
            return_lse=True,
        )

    (o, lse), pull = jax.vjp(both, q, k, v)
    return o, lse, *pull((do, jnp.zeros_like(lse) if dlse is None else dlse))


def formula(q_BTHK, k_BTGK, v_BTGK, mask_BTS, soft_cap=None):
    """o and lse as the definition says them, in the dtype given; every query sees a key in mask_BTS."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BTGK, precision="highest") / math.sqrt(K)
    if soft_cap is not None:
        scores_BGRTS = soft_cap * jnp.tanh(scores_BGRTS / soft_cap)
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, -jnp.inf)
    lse_BGRT = jax.nn.logsumexp(scores_BGRTS, axis=-1)
    p_BGRTS = jnp.exp(scores_BGRTS - lse_BGRT[..., None])
    o_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", p_BGRTS, v_BTGK, precision="highest")
    return o_BTGRK.reshape(B, T, H, K), lse_BGRT.reshape(B, H, T)


def truth(q, k, v, do, documents=None, **options):
    """The same in float32 by the formula, from the very inputs."""
    with jax.default_matmul_precision("highest"):
        wide = (x.astype(F32) for x in (q, k, v, do))
        return run(*wide, documents, implementation="reference", **options)


@functools.partial(jax.jit, static_argnames=("implementation",))
def _without_lse(q, k, v, do, documents, implementation):
    o, pull = jax.vjp(lambda *x: attention(*x, documents=documents, implementation=implementation), q, k, v)
    return o, *pull(do)


def assert_close(got, q, k, v, do, documents=None, **options):
    """float32: rounding.  bfloat16: no more than twice the error that XLA makes in bfloat16 on the same inputs."""
    want = truth(q, k, v, do, documents, **options)
    if q.dtype == F32:
        for name, a, b in zip(NAMES, got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(jnp.abs(b).max())), rtol=0, err_msg=name)
        return
    o, dq, dk, dv = _without_lse(q, k, v, do, documents, "reference" if options else "xla")
    baseline = dict(o=o, dq=dq, dk=dk, dv=dv)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == (F32 if name == "lse" else q.dtype), name
        error = np.linalg.norm(np.asarray(a.astype(F32) - b))
        if name == "lse":
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)  # scores are float32 sums of exact products
        else:
            # What is zero but for rounding may be float32's noise here and nothing there.
            noise = 1e-5 * np.linalg.norm(np.asarray(do.astype(F32)))
            allowed = noise + 2 * np.linalg.norm(np.asarray(baseline[name].astype(F32) - b))
            assert error <= allowed, f"{name}: error {error:.3g}, twice XLA's is {allowed:.3g}"


def _is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def kernel_calls(f, *args) -> dict[str, int]:
    """How often each Pallas kernel is called in `f`, by name; a loop's body counts once."""
    found = {}

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("pallas_call", "core_map", "mpmd_map"):
                info = eqn.params.get("name_and_src_info")
                name = info.name if info is not None else eqn.params["name"]
                found[name] = found.get(name, 0) + 1
                continue  # a Mosaic GPU kernel holds another call
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return found
