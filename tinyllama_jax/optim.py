"""AdamW or RMSprop with a guard that skips bad steps.  All of it in float32; nothing depends on a hidden step counter
except Adam's bias correction, whose count is part of the state and does not advance on a skipped step.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from tinyllama_jax.config import Optimizer
from tinyllama_jax.sharding import CPU, device

Tree = Any


def decay_mask(params: Tree) -> Tree:
    """Which weights `decay='matrices'` decays: every one that is not a norm scale, so embeddings and head as well.

    Norm scales are found by their name, `scale`: layers are stacked on axis 0, so the number of axes does not tell a
    scale [L, D] from a matrix [D, F].
    """

    def is_matrix(path, _):
        return getattr(path[-1], "key", None) != "scale"

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(cfg: Optimizer) -> optax.GradientTransformation:
    """Gradients -> direction d; the step is params - lr * d with the rate given to `update`.

    d = m_hat / (sqrt(v_hat) + eps) + weight_decay * params, after clipping to a global L2 norm of clip_norm
    (AdamW, arXiv 1711.05101; the decay is scaled by the rate, as in PyTorch).
    With kind rmsprop the first term is g / (sqrt(v) + eps) of the mean v = beta2 v + (1 - beta2) g^2, which begins at
    zero and is not corrected for it: torch.optim.RMSprop with its alpha = beta2, without momentum.  The decay is the
    same as AdamW's, where PyTorch's RMSprop would add it to the gradient.
    """
    parts = [_clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm else []
    if cfg.kind == "rmsprop":
        parts.append(_scale_by_rms(cfg.beta2, cfg.eps))
    else:
        parts.append(_scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps))
    if cfg.weight_decay:
        parts.append(optax.add_decayed_weights(cfg.weight_decay, decay_mask if cfg.decay == "matrices" else None))
    return optax.chain(*parts)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients times min(1, limit / norm).  optax divides each of them by the norm, and XLA does not repeat a division
    in the loops of both moments: it writes all gradients once more in between."""

    def step(grads, state, params=None):
        del params
        factor = limit / jnp.maximum(optax.tree.norm(grads), limit)
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), step)


def _scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, whose moments and count stay as they are when `update` gets take=False."""

    def step(grads, state, params=None, *, take, **_):
        del params
        old = (state.mu, state.nu)
        new = (
            optax.tree_utils.tree_update_moment(grads, state.mu, beta1, 1),
            optax.tree_utils.tree_update_moment_per_elem_norm(grads, state.nu, beta2, 2),
        )
        # A select, not a multiplication by 0 or 1: the branch not taken may hold NaN.
        mu, nu = jax.tree.map(lambda n, o: jnp.where(take, n, o), new, old)
        count = state.count + take.astype(jnp.int32)
        if device()[0] == CPU:
            # XLA's CPU backend has a loop per result, and donated moments would first be copied for the loop of the
            # parameters, which computes the new ones again from the old: twice the time of the whole update.
            mu, nu = jax.lax.optimization_barrier((mu, nu))
        first, second = (optax.tree_utils.tree_bias_correction(m, b, count) for m, b in ((mu, beta1), (nu, beta2)))
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return direction, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    init = optax.scale_by_adam(beta1, beta2, eps, mu_dtype=jnp.float32).init
    return optax.GradientTransformationExtraArgs(init, step)


def _scale_by_rms(beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Gradients over the root of the mean of their squares, which stays as it is when `update` gets take=False.

    optax.scale_by_rms has no such choice, and eps within the root unless told otherwise.
    """

    def step(grads, state, params=None, *, take, **_):
        del params
        new = optax.tree_utils.tree_update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        nu = jax.tree.map(lambda n, o: jnp.where(take, n, o), new, state.nu)
        if device()[0] == CPU:
            nu = jax.lax.optimization_barrier(nu)  # as Adam's moments
        direction = jax.tree.map(lambda g, v: g / (jnp.sqrt(v) + eps), grads, nu)
        return direction, optax.ScaleByRmsState(nu=nu)

    init = lambda params: optax.ScaleByRmsState(nu=optax.tree.zeros_like(params, dtype=jnp.float32))  # noqa: E731
    return optax.GradientTransformationExtraArgs(init, step)


def init(cfg: Optimizer, params: Tree) -> dict[str, Tree]:
    """State: under "adam" (or "rmsprop", which has one) the moments with the parameters' shardings, and the guard's
    statistics, replicated.

    losses, norms: float32 [skip_window_steps] rings of the accepted steps' losses and gradient norms;
    accepted: int32 number of accepted steps; skips: int32 skipped steps since the last accepted one.
    """
    guard = {
        "losses": jnp.zeros(cfg.skip_window_steps, jnp.float32),
        "norms": jnp.zeros(cfg.skip_window_steps, jnp.float32),
        "accepted": jnp.zeros((), jnp.int32),
        "skips": jnp.zeros((), jnp.int32),
    }
    moments = make_optimizer(cfg).init(params)
    if jax.sharding.get_abstract_mesh().empty:
        return {_name(cfg): moments, "guard": guard}
    # What is not shaped like a parameter was made without the mesh; jit refuses to mix the two.
    replicate = lambda x: jax.sharding.reshard(x, P(*[None] * x.ndim))  # noqa: E731
    moments = optax.tree_utils.tree_map_params(
        make_optimizer(cfg), lambda x: x, moments, transform_non_params=replicate
    )
    return {_name(cfg): moments, "guard": jax.tree.map(replicate, guard)}


def _name(cfg: Optimizer) -> str:
    """Of the moments in the state, and so in checkpoints."""
    return {"adamw": "adam", "rmsprop": "rmsprop"}[cfg.kind]


def update(
    optimizer: optax.GradientTransformation,
    cfg: Optimizer,
    grads: Tree,
    opt_state: dict[str, Tree],
    params: Tree,
    *,
    loss: jax.Array,
    lr: jax.Array | float,
) -> tuple[Tree, dict[str, Tree], dict[str, jax.Array]]:
    """One step, or none: -> (params, opt_state, metrics).

    A step is skipped when the loss or the gradient norm is not finite, or, with skip_sigma, when either lies more
    than skip_sigma standard deviations above the mean of the last skip_window_steps accepted ones (once half of them
    are there).  A skipped step leaves parameters, moments and statistics bit for bit as they were.
    metrics, float32 scalars: grad_norm (before clipping), param_norm (after the step), skipped (0 or 1),
    consecutive_skips.
    """
    loss, lr = jnp.asarray(loss, jnp.float32), jnp.asarray(lr, jnp.float32)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    grad_norm = optax.tree.norm(grads)
    guard = opt_state["guard"]
    take = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if cfg.skip_sigma:
        take &= ~_spike(loss, guard["losses"], guard["accepted"], cfg.skip_sigma)
        take &= ~_spike(grad_norm, guard["norms"], guard["accepted"], cfg.skip_sigma)

    direction, moments = optimizer.update(grads, opt_state[_name(cfg)], params, take=take)
    params = jax.tree.map(lambda p, d: jnp.where(take, p - lr * d, p), params, direction)

    slot = guard["accepted"] % cfg.skip_window_steps
    guard = {
        "losses": jnp.where(take, guard["losses"].at[slot].set(loss), guard["losses"]),
        "norms": jnp.where(take, guard["norms"].at[slot].set(grad_norm), guard["norms"]),
        "accepted": guard["accepted"] + take.astype(jnp.int32),
        "skips": jnp.where(take, 0, guard["skips"] + 1),
    }
    metrics = {
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "skipped": 1.0 - take.astype(jnp.float32),
        "consecutive_skips": guard["skips"].astype(jnp.float32),
    }
    return params, {_name(cfg): moments, "guard": guard}, metrics


def _spike(value: jax.Array, ring_W: jax.Array, accepted: jax.Array, sigma: float) -> jax.Array:
    """Whether `value` exceeds mean + sigma * std (sample standard deviation) of the filled part of the ring.

    Never before half of the ring, and at least two entries, are filled: the first losses fall steeply and say
    nothing about what is usual.
    """
    window = ring_W.shape[0]
    filled = jnp.minimum(accepted, window)
    there = jnp.arange(window) < filled
    mean = jnp.sum(jnp.where(there, ring_W, 0.0)) / jnp.maximum(filled, 1)
    variance = jnp.sum(jnp.where(there, (ring_W - mean) ** 2, 0.0)) / jnp.maximum(filled - 1, 1)
    return (filled >= max(2, (window + 1) // 2)) & (value > mean + sigma * jnp.sqrt(variance))
