"""One optimizer step as one jitted function: forward, backward, accumulation, clip, AdamW, metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tinyllama_jax import optim
from tinyllama_jax.config import Run
from tinyllama_jax.data.pipeline import Batch
from tinyllama_jax.finetune import adapters, preference
from tinyllama_jax.loss import training_loss
from tinyllama_jax.model import quantized, transformer
from tinyllama_jax.sharding import BATCH, CPU, GPU, device, row_share, striped, token_sharding
from tinyllama_jax.train.state import State, keys


def put_batch(batch: Batch, accumulation: int, mesh: Mesh, *, documents: bool) -> dict[str, jax.Array]:
    """This host's rows [B, T] as global device arrays [A, B/A, T]; document ids only where they are used.

    Tokens are striped over the mesh's `context`; all arrays alike, and a sum over tokens does not mind.  The host's
    rows are those of its `sharding.row_share`.  References of pairs [B, 2] come along as [A, B/A, 2].
    """
    laid_out, (_, hosts) = token_sharding(mesh, leading=1), row_share(mesh)
    names = ["tokens", "targets", "valid"] + (["documents"] if documents else [])

    def put(rows_BX: np.ndarray, stripes: int, where: NamedSharding) -> jax.Array:
        rows_ABX = striped(rows_BX.reshape(accumulation, -1, rows_BX.shape[-1]), stripes)
        shape = (accumulation, rows_ABX.shape[1] * hosts, rows_ABX.shape[2])
        return jax.make_array_from_process_local_data(where, np.ascontiguousarray(rows_ABX), shape)

    placed = {name: put(batch[name], mesh.shape["context"], laid_out) for name in names}
    if "reference" in batch:
        placed["reference"] = put(batch["reference"], 1, NamedSharding(mesh, P(None, BATCH, None)))
    return placed


def compiler_options(run: Run) -> dict[str, Any] | None:
    """Options of `jax.jit` for the step on the mesh in use.

    execution.deterministic: XLA takes no kernel whose sums depend on the order of threads, for scatters (the gradient
    of the embedding), cuDNN's attention backward and reductions.  Unlike with xla_gpu_deterministic_ops it still
    measures which kernels are fastest, and keeps what it has found (programs.py).

    On a CPU a product of matrices takes all cores.  Two of them at the same time, for which XLA orders the program
    unless told otherwise, push each other's blocks out of the caches.

    Beside a base in 4 bits XLA's CPU backend must not put a sum of two products into one call of its library: in a loop
    over layers with 4096 tokens the gradients were then wrong, by another amount in each program (jax 0.10.2 and
    0.12.0; int8 and unrolled layers were right).
    """
    platform, _ = device()
    if platform == CPU:
        options: dict[str, Any] = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
        if run.adapter and run.adapter.base_weights in quantized.GROUPS:
            options["xla_cpu_experimental_ynn_fusion_type"] = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
        return options
    if run.execution.deterministic and platform == GPU:
        return {"xla_gpu_exclude_nondeterministic_ops": True}
    return None


def make_train_step(run: Run) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """A function (state, batch, lr, step) -> (state, metrics); compiles once per batch shape, donates `state`.

    `batch` holds tokens, targets, valid [A, B, T] and, with document masking, documents [A, B, T].  The loss is the
    sum over valid tokens divided by their count in the whole batch, so that it depends neither on the number of
    micro-batches A nor on the mesh.  With optimizer.z_loss the gradients are those of loss + z_loss, and the metrics
    hold both apart.  Of pairs (run.preference) the batch has `reference` [A, B, 2] too; loss and metrics are means
    over pairs.  With run.adapter state["params"] are the adapters', and state["frozen"] is what they adapt.
    """
    optimizer = optim.make_optimizer(run.optimizer)
    dropout = bool(run.model.dropout or (run.adapter and run.adapter.dropout))

    def complete(weights: Any, frozen: Any, key: jax.Array | None) -> Any:
        """The model's parameters out of those that are trained and those that are not."""
        return weights if run.adapter is None else adapters.attach(frozen, weights, run.model, run.adapter, key)

    def micro_loss(weights: Any, frozen: Any, micro: dict[str, jax.Array], count: jax.Array, key: jax.Array | None):
        params = complete(weights, frozen, None if key is None else jax.random.fold_in(key, 1))
        if run.preference:
            total, sums = preference.micro_loss(params, micro, run.model, run.execution, run.preference, key)
            return total / count, jax.tree.map(lambda each: each / count, {"loss": total, **sums})
        x_BTD = transformer.hidden(
            params,
            micro["tokens"],
            run.model,
            run.execution,
            documents_BT=micro.get("documents"),
            dropout_key=key,
        )
        objective, nll, z = training_loss(
            x_BTD,
            transformer.head_kernel(params, run.model),
            micro["targets"],
            micro["valid"],
            chunk_tokens=run.execution.loss_chunk_tokens,
            z_loss=run.optimizer.z_loss,
        )
        losses = {"loss": nll} | ({"z_loss": z} if run.optimizer.z_loss else {})
        return objective / count, jax.tree.map(lambda total: total / count, losses)

    def train_step(state: State, batch: dict[str, jax.Array], lr: jax.Array, step: jax.Array):
        params, frozen = state["params"], state.get("frozen")
        weights = params if run.adapter else transformer.working(params, run.model, run.execution)
        accumulation, rows = batch["tokens"].shape[:2]
        valid_tokens = jnp.maximum(jnp.sum(batch["valid"], dtype=jnp.int32), 1).astype(jnp.float32)
        count = jnp.float32(accumulation * rows) if run.preference else valid_tokens
        # The key is a function of the step, so that a resumed run draws the same masks.
        step_key = jax.random.fold_in(keys(run.seed)[1], step) if dropout else None

        def one(micro: dict[str, jax.Array], index: jax.Array | int):
            key = None if step_key is None else jax.random.fold_in(step_key, index)
            grads, losses = jax.grad(micro_loss, has_aux=True)(weights, frozen, micro, count, key)
            return losses, grads

        if accumulation == 1:
            losses, grads = one(jax.tree.map(lambda x: x[0], batch), 0)
        else:

            def body(total, xs):
                micro, index = xs
                # The barrier keeps XLA's TPU compiler from moving the gradients' all-reduce out of the loop, where
                # it has ended in an internal error (RET_CHECK in while_loop_all_reduce_code_motion) when a cast lay
                # between reduction and sum; on other devices it does nothing.
                losses_and_grads = jax.lax.optimization_barrier(one(micro, index))
                return jax.tree.map(jnp.add, total, losses_and_grads), None

            names = ["loss"] + (["z_loss"] if run.optimizer.z_loss else [])
            names += list(preference.METRICS) if run.preference else []
            sums = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), weights)
            zeros = (dict.fromkeys(names, jnp.float32(0)), sums)
            (losses, grads), _ = jax.lax.scan(body, zeros, (batch, jnp.arange(accumulation)))

        params, opt_state, metrics = optim.update(
            *(optimizer, run.optimizer, grads if run.adapter else transformer.stacked(grads)),
            *(state["optimizer"], params),
            loss=losses["loss"],
            lr=lr,
        )
        after = {"params": params, "optimizer": opt_state} | ({"frozen": frozen} if run.adapter else {})
        return after, {**losses, "valid_tokens": valid_tokens, **metrics}

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options(run))
