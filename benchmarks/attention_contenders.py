"""Who competes in benchmarks/attention.py, on what arrays, and how much arithmetic that is."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import config
from tinyllama_jax.attention import attention, ranges
from tinyllama_jax.attention.choice import INTERPRET, KERNELS, NAMES
from tinyllama_jax.sharding import BATCH, make_mesh

BLOCK = 128  # of queries and of keys, by which skipping is counted; the kernels' own are 64 to 512
PEERS = ("cudnn-mask", "tokamax-mosaic", "tokamax-triton", "jax-flash")
EVERYONE = (*NAMES, *PEERS)


class Unable(Exception):
    """Why a contender cannot run here."""


class Shape(NamedTuple):
    rows: int
    tokens: int  # in a row
    heads: int
    kv_heads: int
    head_dim: int = 64
    dtype: str = "bfloat16"


class Contender(NamedTuple):
    """`run` under `context`: (q_BTHK, k_BTGK, v_BTGK, *more) -> o_BTHK."""

    run: Callable[..., jax.Array]
    more: tuple  # what it is told about documents, made once
    documents_as: str | None
    context: Callable[[], contextlib.AbstractContextManager]


def everyone_here() -> tuple[str, ...]:
    """All contenders; on a CPU the kernels are interpreted."""
    kernels = tuple(INTERPRET + name for name in KERNELS) if jax.default_backend() == "cpu" else ()
    return (*EVERYONE, *kernels)


def document_ids(shape: Shape, per_row: int) -> np.ndarray | None:
    """int32 [B, T]: so many documents of random lengths to a row; None for one."""
    if per_row == 1:
        return None
    random = np.random.default_rng(per_row)
    inner = np.arange(1, shape.tokens)
    borders = np.stack([np.sort(random.choice(inner, per_row - 1, replace=False)) for _ in range(shape.rows)])
    return (np.arange(shape.tokens) >= borders[:, :, None]).sum(axis=1).astype(np.int32)


def visible_scores(shape: Shape, ids: np.ndarray | None) -> float:
    """Scores per head in all rows that are not masked; without documents T^2/2 a row, as FlashAttention counts."""
    if ids is None:
        return shape.rows * shape.tokens**2 / 2
    lengths = np.concatenate([np.bincount(row) for row in ids]).astype(float)
    return float(np.sum(lengths * (lengths + 1) / 2))


def operations(shape: Shape, ids: np.ndarray | None, direction: str) -> float:
    """FLOPs: 4 K per visible score forward, 2.5 times as many backward (arXiv 2205.14135's and 2307.08691's count)."""
    forward = 4 * shape.head_dim * shape.heads * visible_scores(shape, ids)
    return forward * {"forward": 1.0, "forward_backward": 3.5}[direction]


def ideal_ratio(shape: Shape, ids: np.ndarray | None) -> float:
    """Blocks of BLOCK x BLOCK in which something is visible, over those of plain causal rows."""
    blocks = -(-shape.tokens // BLOCK)
    causal = shape.rows * blocks * (blocks + 1) / 2
    if ids is None:
        return 1.0
    seen = 0
    for row in ids:
        first_T = np.searchsorted(row, row)  # the first token of each token's document
        begins = first_T[::BLOCK] // BLOCK  # of each block of queries, the first block of keys
        seen += int(np.sum(np.arange(blocks) - begins + 1))
    return seen / causal


def arrays(shape: Shape, seed: int, context: Callable = contextlib.nullcontext) -> tuple[jax.Array, ...]:
    """q, k, v and the result's cotangent, standard normal, on the device."""
    q_shape = (shape.rows, shape.tokens, shape.heads, shape.head_dim)
    kv_shape = (*q_shape[:2], shape.kv_heads, shape.head_dim)
    keys = jax.random.split(jax.random.key(seed), 4)
    made = [
        jax.random.normal(key, s, shape.dtype)
        for key, s in zip(keys, (q_shape, kv_shape, kv_shape, q_shape), strict=True)
    ]
    with context() as mesh:
        return tuple(made if mesh is None else jax.device_put(made, NamedSharding(mesh, P(BATCH, None, None, None))))


def contender(name: str, shape: Shape, ids: np.ndarray | None) -> Contender:
    """Raises Unable, or ConfigError when it is called, for what cannot run on this device."""
    if name.removeprefix(INTERPRET) in NAMES:
        return _ours(name, ids)
    platform = {"cuda": "gpu"}.get(jax.default_backend(), jax.default_backend())
    needs = "tpu" if name == "jax-flash" else "gpu"
    if name not in PEERS:
        raise Unable(f"there is no contender {name!r}; choose from {', '.join(everyone_here())}")
    if platform != needs:
        raise Unable(f"it runs on {needs.upper()}s and this is a {platform}")
    make = {"cudnn-mask": _cudnn_mask, "jax-flash": _jax_flash}.get(name) or functools.partial(_tokamax, name)
    return make(shape, ids)


def _ours(name: str, ids: np.ndarray | None) -> Contender:
    """By name through the package's one function, under its mesh; the ranges are made once, as in the model."""
    mesh = make_mesh(config.Mesh(), jax.devices()[:1])

    @contextlib.contextmanager
    def context():
        with jax.set_mesh(mesh):
            yield mesh

    with context():
        more = () if ids is None else (jax.jit(ranges)(jax.device_put(ids, NamedSharding(mesh, P(BATCH, None)))),)

    def run(q, k, v, seen=None):
        return attention(q, k, v, documents=seen, implementation=name)

    return Contender(run, more, None if ids is None else "ranges", context)


def _mask(ids: np.ndarray) -> jax.Array:
    """bool [B, 1, T, T], causal and within documents."""
    ids, position = jnp.asarray(ids), jnp.arange(ids.shape[1])
    return ((ids[:, :, None] == ids[:, None, :]) & (position[:, None] >= position))[:, None]


def _cudnn_mask(shape: Shape, ids: np.ndarray | None) -> Contender:
    """cuDNN through jax.nn, documents as a mask: T x T, which becomes a bias."""
    if ids is None:
        raise Unable("without documents it is cudnn")

    def run(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    return Contender(run, (_mask(ids),), "bool mask", contextlib.nullcontext)


def _tokamax(name: str, shape: Shape, ids: np.ndarray | None) -> Contender:
    """Tokamax's kernels by its public function, which takes documents as a mask only."""
    if importlib.util.find_spec("tokamax") is None:
        raise Unable("tokamax is not installed")
    import tokamax

    wanted = name.removeprefix("tokamax-")
    names: Sequence[str] = ("mosaic_gpu", "mosaic") if wanted == "mosaic" else (wanted,)

    def call(q, k, v, **how: Any) -> jax.Array:
        for implementation in names[:-1]:
            try:
                return tokamax.dot_product_attention(q, k, v, implementation=implementation, **how)
            except ValueError as error:  # the name is another in an older version
                if "implementation" not in str(error):
                    raise
        return tokamax.dot_product_attention(q, k, v, implementation=names[-1], **how)

    if ids is None:
        return Contender(lambda q, k, v: call(q, k, v, is_causal=True), (), None, contextlib.nullcontext)
    run = lambda q, k, v, mask: call(q, k, v, mask=mask)  # noqa: E731
    return Contender(run, (_mask(ids),), "bool mask", contextlib.nullcontext)


def _jax_flash(shape: Shape, ids: np.ndarray | None) -> Contender:
    """JAX's older TPU kernel: equal heads only, so keys and values are repeated for each group, inside the timing."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    def run(q, k, v, ids=None):
        group = shape.heads // shape.kv_heads
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)))
        segments = None if ids is None else flash.SegmentIds(ids, ids)
        scale = 1 / math.sqrt(shape.head_dim)
        return flash.flash_attention(q, k, v, segment_ids=segments, causal=True, sm_scale=scale).transpose(0, 2, 1, 3)

    more = () if ids is None else (jnp.asarray(ids),)
    return Contender(run, more, None if ids is None else "segment ids", contextlib.nullcontext)
