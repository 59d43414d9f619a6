"""Cross-entropy of a linear head without holding all logits: [B*T, V] in float32 would be the largest array by far.

Tokens are taken a chunk at a time, per device, inside one `shard_map`.  For training the gradients are made in the
same pass as the loss (the cotangent of a scalar is only a factor), so each chunk's logits are computed once and
forgotten, and the head's gradient crosses devices once, after the loop.  Where the mesh's `tensor` splits the
vocabulary, each device has the logits of its part, and two numbers per token are summed over `tensor`.

The head may be an array, or what model/lowrank.py says: the logits are then a sum of products x w, in the code below
`xs` and `ws`, and no gradient is made for a frozen w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from tinyllama_jax import sharding
from tinyllama_jax.model.layers import Weight, terms
from tinyllama_jax.model.layers import whole as whole_weight


def cross_entropy(
    x_BTD: jax.Array, w_DV: Weight, targets_BT: jax.Array, valid_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log softmax(x w)[target] over valid tokens, in nats, float32; and the number of valid tokens, int32.

    x_BTD: hidden states in the compute dtype, w_DV: float32 head.  The products run in x's dtype and accumulate in
    float32; log-sum-exp is float32.  Invalid targets may have any value and contribute exactly nothing, to the loss
    and to the gradients.  chunk_tokens: tokens whose logits exist at the same time on a device.
    Reverse-mode differentiation only, once.
    """
    nll, _, _ = training_loss(x_BTD, w_DV, targets_BT, valid_BT, chunk_tokens=chunk_tokens)
    return nll, jnp.sum(valid_BT, dtype=jnp.int32)


def training_loss(
    x_BTD: jax.Array,
    w_DV: Weight,
    targets_BT: jax.Array,
    valid_BT: jax.Array,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over valid tokens, float32 scalars: (objective, nll, z), where objective = nll + z.

    z is z_loss * log(Z)^2 with Z = sum(exp(x w)), PaLM's term against logits that drift away from zero as a whole
    (arXiv 2204.02311, section 5, with 1e-4).  Differentiate the objective; nll and z are for the log and have no
    gradients.  Everything else is as for `cross_entropy`.
    """
    by_token = _layout(x_BTD).by_token
    targets_BT, valid_BT = reshard(targets_BT, by_token), reshard(valid_BT, by_token)
    xs, ws, frozen = zip(*terms(x_BTD, w_DV), strict=True)
    objective, parts = _sums(xs, ws, targets_BT, valid_BT, chunk_tokens, z_loss, frozen)
    return objective, *jax.lax.stop_gradient(parts)


def token_nll(x_BTD: jax.Array, w_DV: Weight, targets_BT: jax.Array, *, chunk_tokens: int) -> jax.Array:
    """-log softmax(x w)[target] of every token, in nats, float32 [B, T], in the order of x's tokens: for scoring.

    Differentiable in x and w; the backward pass computes each chunk's logits again.
    """

    def nll(xs, ws, targets_C, vocab):
        return _nll(xs, ws, targets_C, vocab)[0]

    return _by_token(jax.checkpoint(nll, static_argnums=3), x_BTD, w_DV, targets_BT, chunk_tokens)


def token_nll_and_best(
    x_BTD: jax.Array, w_DV: Weight, targets_BT: jax.Array, *, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """`token_nll`, and whether no other token is more likely than the target, bool [B, T].  Without gradients."""

    def both(xs, ws, targets_C, vocab):
        nll_C, logits_CV, _ = _nll(xs, ws, targets_C, vocab)
        is_target_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
        target_C = jnp.max(jnp.where(is_target_CV, logits_CV, -jnp.inf), axis=-1)
        best_C = jnp.max(logits_CV, axis=-1)
        if vocab:
            target_C, best_C = jax.lax.pmax((target_C, best_C), vocab)
        return nll_C, target_C >= best_C

    return _by_token(both, x_BTD, w_DV, targets_BT, chunk_tokens)


def _by_token(f: Callable, x_BTD: jax.Array, w_DV: Weight, targets_BT: jax.Array, chunk_tokens: int) -> Any:
    """Arrays [B, T] of f(xs, ws, targets_C, vocab), which makes arrays [C]."""
    layout = _layout(x_BTD)
    xs, ws, _ = zip(*terms(x_BTD, w_DV), strict=True)
    ws, vocab = _whole(xs, ws)

    def local(xs, ws, targets_BT):
        def chunk(_, xs, targets_C):
            return None, f(xs, ws, _within(targets_C, ws[0], vocab), vocab)

        _, made = _over_chunks(chunk, None, chunk_tokens, xs, targets_BT)
        return jax.tree.map(lambda y_C: y_C.reshape(targets_BT.shape), made)

    specs = (layout.x, P(None, vocab), layout.by_token)
    run = jax.shard_map(local, in_specs=specs, out_specs=layout.by_token, check_vma=False)
    return run(xs, ws, reshard(targets_BT, layout.by_token))


def _whole(xs: tuple[jax.Array, ...], ws: tuple) -> tuple[tuple[jax.Array, ...], str | None]:
    """The weights in the dtype of what they are multiplied with, and the mesh axis that splits their vocabulary."""
    ws = tuple(whole_weight(w, x.dtype) for x, w in zip(xs, ws, strict=True))
    return ws, jax.typeof(ws[0]).sharding.spec[1]


class _Layout(NamedTuple):
    """How hidden states and their tokens lie over the mesh."""

    x: P
    by_token: P
    axes: tuple[str, ...]  # all mesh axes over which tokens lie


def _layout(x_BTD: jax.Array) -> _Layout:
    rows, tokens = jax.typeof(x_BTD).sharding.spec[:2]
    return _Layout(P(rows, tokens, None), P(rows, tokens), sharding.axes_of(rows, tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _sums(xs, ws, targets_BT, valid_BT, chunk_tokens, z_loss, frozen):
    del frozen
    layout, (ws, vocab) = _layout(xs[0]), _whole(xs, ws)

    def local(xs, ws, targets_BT, valid_BT):
        def chunk(sums, xs, targets_C, valid_C):
            targets_C = _within(jnp.where(valid_C, targets_C, 0), ws[0], vocab)
            nll_C, _, lse_C = _nll(xs, ws, targets_C, vocab)
            return sums + _chunk_sums(nll_C, lse_C, valid_C), ()

        sums, _ = _over_chunks(chunk, jnp.zeros(2), chunk_tokens, xs, targets_BT, valid_BT)
        return jax.lax.psum(sums, layout.axes) if layout.axes else sums

    specs = (layout.x, P(None, vocab), layout.by_token, layout.by_token)
    run = jax.shard_map(local, in_specs=specs, out_specs=P(None), check_vma=False)
    return _parts(run(xs, ws, targets_BT, valid_BT), z_loss)


def _sums_forward(xs, ws, targets_BT, valid_BT, chunk_tokens, z_loss, frozen):
    """The sums, and as residuals the objective's gradients by xs (in their dtype) and by those ws that are not frozen
    (float32, sharded as they are)."""
    layout = _layout(xs[0])
    trained = [i for i, is_frozen in enumerate(frozen) if not is_frozen]
    w_specs = [jax.typeof(ws[i]).sharding.spec for i in trained]
    ws, vocab = _whole(xs, ws)
    # The dimension of w that lies on an axis of the batch gets its sum over that axis already cut in shares.
    scattered = [[(axis, dim) for dim, axis in enumerate(spec) if axis in layout.axes] for spec in w_specs]

    def local(xs, ws, targets_BT, valid_BT):
        def chunk(carry, xs, targets_C, valid_C):
            sums, dws = carry
            targets_C = _within(jnp.where(valid_C, targets_C, 0), ws[0], vocab)
            nll_C, logits_CV, lse_C = _nll(xs, ws, targets_C, vocab)
            p_CV = jnp.exp(logits_CV - lse_C[:, None])
            if z_loss:  # d lse^2 / d logits = 2 lse p
                p_CV *= 1 + 2 * z_loss * lse_C[:, None]
            is_target_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
            dlogits_CV = jnp.where(is_target_CV, p_CV - 1, p_CV)
            dlogits_CV = jnp.where(valid_C[:, None], dlogits_CV, 0.0).astype(xs[0].dtype)
            dxs = tuple(jnp.matmul(dlogits_CV, w_DV.T) for w_DV in ws)
            dws = tuple(dw_DV + by_weight(xs[i].T, dlogits_CV) for i, dw_DV in zip(trained, dws, strict=True))
            return (sums + _chunk_sums(nll_C, lse_C, valid_C), dws), dxs

        def by_weight(x_DC, dlogits_CV):
            if sharding.device()[0] == sharding.CPU:  # as an operand of its own: this product is then a quarter faster
                x_DC = jax.lax.optimization_barrier(x_DC)
            return jnp.matmul(x_DC, dlogits_CV, preferred_element_type=jnp.float32)

        start = (jnp.zeros(2), tuple(jnp.zeros(ws[i].shape, jnp.float32) for i in trained))
        (sums, dws), dxs = _over_chunks(chunk, start, chunk_tokens, xs, targets_BT, valid_BT)
        dws = tuple(_summed(dw_DV, layout.axes, where) for dw_DV, where in zip(dws, scattered, strict=True))
        dxs = jax.lax.psum(dxs, vocab) if vocab else dxs
        dxs = jax.tree.map(lambda dx_CD, x_BTD: dx_CD.reshape(x_BTD.shape), dxs, xs)
        return jax.lax.psum(sums, layout.axes) if layout.axes else sums, dxs, dws

    run = jax.shard_map(
        local,
        in_specs=(layout.x, P(None, vocab), layout.by_token, layout.by_token),
        out_specs=(P(None), layout.x, tuple(_with_shares(P(None, vocab), where) for where in scattered)),
        check_vma=False,
    )
    sums, dxs, dws = run(xs, ws, targets_BT, valid_BT)
    dws = iter(reshard(dw_DV, spec) for dw_DV, spec in zip(dws, w_specs, strict=True))
    return _parts(sums, z_loss), (dxs, tuple(None if is_frozen else next(dws) for is_frozen in frozen))


def _summed(dw_DV: jax.Array, axes: tuple[str, ...], scattered: list[tuple[str, int]]) -> jax.Array:
    """A gradient summed over the devices along `axes`, and cut in shares as `scattered` says."""
    for axis, dim in scattered:
        dw_DV = jax.lax.psum_scatter(dw_DV, axis, scatter_dimension=dim, tiled=True)
    whole = tuple(a for a in axes if a not in dict(scattered))
    return jax.lax.psum(dw_DV, whole) if whole else dw_DV


def _with_shares(spec: P, scattered: list[tuple[str, int]]) -> P:
    axes = list(spec)
    for axis, dim in scattered:
        axes[dim] = axis
    return P(*axes)


def _sums_backward(chunk_tokens, z_loss, frozen, gradients, cotangents):
    (dxs, dws), (cotangent, _) = gradients, cotangents
    dxs = tuple((cotangent * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype) for dx_BTD in dxs)
    return dxs, tuple(None if dw_DV is None else cotangent * dw_DV for dw_DV in dws), None, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunk_sums(nll_C: jax.Array, lse_C: jax.Array, valid_C: jax.Array) -> jax.Array:
    """Sums over valid tokens of the loss and of log(Z)^2, float32 [2]."""
    return jnp.sum(jnp.where(valid_C, jnp.stack([nll_C, jnp.square(lse_C)]), 0.0), axis=1)


def _parts(sums: jax.Array, z_loss: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    nll, squares = sums
    z = z_loss * squares
    return (nll + z if z_loss else nll), (nll, z)  # without the term nothing is added, not even 0 * inf


def _within(targets_C: jax.Array, w_DV: jax.Array, vocab: str | None) -> jax.Array:
    """Targets counted from the first word of this device's part of the vocabulary; outside of it for most devices."""
    return targets_C - jax.lax.axis_index(vocab) * w_DV.shape[1] if vocab else targets_C


def _nll(
    xs: tuple[jax.Array, ...], ws: tuple[jax.Array, ...], targets_C: jax.Array, vocab: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss per token [C], the logits [C, V] and their log-sum-exp [C], all float32.

    vocab: the mesh axis of whose part of the vocabulary w and the logits are, and targets are counted from.
    """
    products = [jnp.matmul(x, w, preferred_element_type=jnp.float32) for x, w in zip(xs, ws, strict=True)]
    logits_CV = functools.reduce(jnp.add, products)
    if vocab is None:
        lse_C = jax.nn.logsumexp(logits_CV, axis=-1)
        return lse_C - jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0], logits_CV, lse_C
    max_C = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(logits_CV, axis=-1)), vocab)
    is_target_CV = jnp.arange(logits_CV.shape[1]) == targets_C[:, None]
    sums_2C = jnp.stack([jnp.exp(logits_CV - max_C[:, None]), jnp.where(is_target_CV, logits_CV, 0.0)]).sum(axis=-1)
    total_C, target_C = jax.lax.psum(sums_2C, vocab)
    lse_C = max_C + jnp.log(total_C)
    return lse_C - target_C, logits_CV, lse_C


def _over_chunks(
    f: Callable, carry: Any, chunk_tokens: int, xs: tuple[jax.Array, ...], *by_token_BT: jax.Array
) -> tuple[Any, Any]:
    """carry, y = f(carry, xs, *by_token_C) over chunks of at most chunk_tokens tokens, xs [C, D] then; last carry, y by
    token [BT].

    The chunks are of equal size; what fills the last one up is zero, so `valid` is false there.
    """
    tokens = xs[0].shape[0] * xs[0].shape[1]
    chunks = -(-tokens // chunk_tokens)
    size = -(-tokens // chunks)

    def cut(a):
        a = a.reshape(tokens, *a.shape[2:])
        padding = [(0, chunks * size - tokens)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding).reshape(chunks, size, *a.shape[1:])

    arrays = (xs, *by_token_BT)
    if chunks == 1:  # a loop of one would keep XLA from fusing across its border
        return f(carry, *jax.tree.map(lambda a: a.reshape(tokens, *a.shape[2:]), arrays))
    carry, ys = jax.lax.scan(lambda carry, chunk: f(carry, *chunk), carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], ys)
