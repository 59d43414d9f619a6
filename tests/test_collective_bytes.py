"""What one optimizer step sends between devices, derived here from the shapes and found in compiled programs.

Bytes are of the whole array on each device, as in preflight/collectives.py.
"""

import jax
import pytest

from experiments import smoke, tinyllama
from tinyllama_jax import mesh_rules
from tinyllama_jax.config import Execution, Mesh, Run, replace
from tinyllama_jax.preflight import step, targets, traffic
from tinyllama_jax.preflight.worker import Worker

KINDS = ("all-gather", "reduce-scatter", "all-reduce")
# The number of valid tokens, and the squares of gradients and weights by array, for their norms: a few scalars.
SCALARS = 1024
LAYERS = 2  # compiled: they are one loop, whose length changes the formula's numbers and not its form


class Formula:
    """FSDP (ZeRO-3) of one step with `a` micro-batches.

    Every matrix of a layer is gathered in the compute dtype for the forward pass and again for the backward pass; its
    gradient leaves in the compute dtype.  The head is gathered once for both passes.  The gradients of head and
    embedding are sums in float32.  The embedding does not change between micro-batches: gathered once.  Gradients of
    norm scales and the two sums of the loss are added up everywhere.
    """

    def __init__(self, run: Run, a: int, width: int):
        cfg = run.model
        d, heads, kv = cfg.d_model, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.attention = cfg.layers * (2 * d * heads + 2 * d * kv)
        self.layers = self.attention + cfg.layers * 3 * d * cfg.d_ff
        self.table = cfg.vocab_size * d
        self.width, self.a = width, a
        self.gathered = a * (2 * self.layers + self.table) * width + 4 * self.table
        self.layer_gradients = a * self.layers * width
        self.table_gradients = a * 2 * self.table * 4
        self.scattered = self.layer_gradients + self.table_gradients
        self.summed = a * 4 * ((2 * cfg.layers + 1) * d + 2)


def v1_0(mesh: Mesh, micro: int, remat: str, layers: int = 22) -> Run:
    run = tinyllama.v1_0()
    model, execution = replace(run.model, layers=layers), Execution(micro_batch_sequences=micro, remat=remat)
    return replace(run, model=model, mesh=mesh, execution=execution)


def compiled(run: Run, target: str) -> tuple[dict[str, int], dict[str, dict], int]:
    """(bytes by kind, rows of collectives, micro-batches) of the step compiled for the target, which must hold it."""
    target = targets.parse(target)
    with Worker(run, target) as worker:
        about = worker.description
        micro_batches = about["batch_sequences_per_device"] // about["as_written"]
        account = worker.compile(about["as_written"], micro_batches)
    assert not account["refused"] and account["total"] <= target.capacity_bytes
    found = account["collectives"]
    assert found["loops_of_unknown_length"] == 0
    print(found)
    return {kind: found.get(kind, {}).get("bytes_per_step", 0) for kind in KINDS}, found, micro_batches


def again(formula: Formula, width: int) -> int:
    """The compilers of JAX 0.10 gather the embedding for each micro-batch, though it does not change between them."""
    return (formula.a - 1) * formula.table * width if jax.__version_info__ < (0, 11) else 0


@pytest.mark.parametrize("mesh", [Mesh(data=64), Mesh(replica=4, data=16), Mesh(data=1, replica=-1)], ids=str)
def test_the_estimate_counts_what_is_derived_here(mesh):
    run = v1_0(mesh, 512, "save_dots_and_attention")
    sizes = mesh_rules.sizes(mesh, 64)
    formula = Formula(run, 2, 2)
    counted = dict.fromkeys(KINDS, 0)
    for collective in traffic.per_step(run, sizes, 8, 2):
        counted[collective.kind] += collective.per_step
    split = sizes["data"] > 1
    assert counted["all-gather"] == split * formula.gathered
    assert counted["reduce-scatter"] == split * formula.scattered
    across = formula.scattered // sizes["data"] if sizes["replica"] > 1 else 0
    assert counted["all-reduce"] == formula.summed + across


class _CpuTarget(targets.Target):
    def devices(self):
        return jax.devices()


@pytest.mark.parametrize("a", [1, 2])
def test_eight_cpu_devices_send_what_is_derived(a):
    """In float32, since XLA's CPU compiler computes products of bfloat16 in float32 and moves the casts about.

    Without a cast the head, like the embedding, is the same array for all micro-batches and is gathered once.  The
    CPU has no reduce-scatter but the one that loss.py asks for: the others are all-reduces of the same bytes.
    """
    run = smoke.tiny()
    run = replace(
        run,
        model=replace(run.model, compute_dtype="float32"),
        mesh=Mesh(data=8),
        execution=replace(run.execution, micro_batch_sequences=0),
    )
    account = step.Compiler(run, _CpuTarget("cpu", "cpu", "cpu", 8, 0, "", (8,)))(2, a)
    found, formula = account["collectives"], Formula(run, a, 4)
    assert found["all-gather"]["bytes_per_step"] == formula.gathered - (a - 1) * formula.table * 4
    reduced = sum(found[kind]["bytes_by_group"]["8"] for kind in ("all-reduce", "reduce-scatter"))
    assert 0 <= reduced - formula.scattered - formula.summed < SCALARS


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_64_a100s_fully_sharded_send_the_formula_to_the_byte():
    run = v1_0(Mesh(data=64), 512, "save_dots_and_attention", LAYERS)
    found, rows, a = compiled(run, "a100-40g:8x8")
    formula = Formula(run, a, 2)
    assert a == 2
    assert found["all-gather"] == formula.gathered + again(formula, 4)
    assert found["reduce-scatter"] == formula.scattered
    assert 0 <= found["all-reduce"] - formula.summed < SCALARS
    assert all(set(row["bytes_by_group"]) == {"64"} for row in (rows[kind] for kind in KINDS))


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_64_a100s_in_four_copies():
    """HSDP: gathers and scatters within 16 devices, then one sum of the shares over the 4 copies.

    The layers' matrices ask for it in sharding.gather, the head in loss.py; for the embedding, of which only rows are
    looked up, XLA for GPUs does it unasked.
    """
    run = v1_0(Mesh(replica=4, data=16), 512, "save_dots_and_attention", LAYERS)
    found, rows, a = compiled(run, "a100-40g:8x8")
    formula = Formula(run, a, 2)
    assert found["all-gather"] == rows["all-gather"]["bytes_by_group"]["16"] == formula.gathered + again(formula, 4)
    assert found["reduce-scatter"] == rows["reduce-scatter"]["bytes_by_group"]["16"] == formula.scattered
    reduced = rows["all-reduce"]["bytes_by_group"]
    assert reduced["4"] == formula.scattered // 16
    assert 0 <= found["all-reduce"] - reduced["4"] - formula.summed < SCALARS


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_64_tpu_chips_in_four_copies():
    """HSDP as libtpu writes it: the same for layers and head, whose shares alone cross the copies.

    The embedding's gradient it sums whole over all 64 chips.  Within the 16 it writes some reduce-scatters as
    all-reduces whose result is cut, and some as a shorter one after a permutation of an array a part longer: that
    part, less a chip's own share, is what the permutations send.
    """
    run = v1_0(Mesh(replica=4, data=16), 512, "full", LAYERS)
    found, rows, a = compiled(run, "v5e:8x8")
    formula = Formula(run, a, 2)
    embedding = formula.table_gradients // 2
    in_parts = formula.scattered - embedding
    gathered = formula.gathered - 2 * formula.table + again(formula, 2)
    assert found["all-gather"] == rows["all-gather"]["bytes_by_group"]["16"] == gathered
    reduced = rows["all-reduce"]["bytes_by_group"]
    permuted = rows.get("collective-permute", {}).get("bytes_per_step", 0)
    longer = found["reduce-scatter"] + reduced["16"] - in_parts - permuted * 16 // 15
    assert 0 <= longer < SCALARS
    assert 0 <= reduced["4"] - in_parts // 16 < SCALARS
    assert 0 <= reduced["64"] - embedding - formula.summed < SCALARS


@pytest.mark.aot
@pytest.mark.timeout(900)
def test_256_tpu_chips_send_the_formula_in_their_own_words():
    """The same bytes, but libtpu writes some collectives as others.

    The embedding is cast before it is gathered.  Gradients are summed by all-reduces whose result is cut, and the
    attention matrices gathered by all-reduces of zeros but for each chip's share: it takes what its model of the torus
    says is faster for each size of array (on v5e:8x16 it scatters).
    """
    run = v1_0(Mesh(data=256), 512, "full", LAYERS)
    found, _, a = compiled(run, "v5e:16x16")
    formula = Formula(run, a, 2)
    assert a == 2
    gathered = formula.gathered - 2 * formula.table + again(formula, 2)
    disguised = gathered - found["all-gather"]
    assert disguised in (0, a * 2 * formula.attention * 2)
    reduced = found["reduce-scatter"] + found["all-reduce"] - disguised
    assert 0 <= reduced - formula.scattered - formula.summed < SCALARS
