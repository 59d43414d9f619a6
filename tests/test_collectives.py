from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tinyllama_jax.preflight import collectives

GPU_LOOP = """
HloModule jit_train_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%layer (p: (s32[], bf16[4,64], bf16[4,8])) -> (s32[], bf16[4,64], bf16[4,8]) {
  %p = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %a = bf16[4,64]{1,0} get-tuple-element(%p), index=1
  %b = bf16[4,8]{1,0} get-tuple-element(%p), index=2
  %gathers = ((bf16[4,64]{1,0}, bf16[4,8]{1,0}), (bf16[32,64]{1,0}, bf16[32,8]{1,0})) all-gather-start(%a, /*index=1*/%b), channel_id=1, replica_groups=mesh['replica'=2,'data'=8] {'data'}, dimensions={0}
  %gathered = (bf16[32,64]{1,0}, bf16[32,8]{1,0}) all-gather-done(%gathers)
  ROOT %next = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) tuple(%i, %a, %b)
}

%going_on (p: (s32[], bf16[4,64], bf16[4,8])) -> pred[] {
  %p = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(99)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%micro (q: (s32[], bf16[4,64], bf16[4,8])) -> (s32[], bf16[4,64], bf16[4,8]) {
  %q = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) parameter(0)
  ROOT %layers = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) while(%q), condition=%going_on, body=%layer, backend_config={"known_trip_count":{"n":"22"}}
}

%more (q: (s32[], bf16[4,64], bf16[4,8])) -> pred[] {
  %q = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %limit = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] fusion(%i, %limit), kind=kLoop, calls=%fused_compare
}

%scattering (g: f32[64,16]) -> f32[8,16] {
  %g = f32[64,16]{1,0} parameter(0)
  ROOT %inner = f32[8,16]{1,0} reduce-scatter(%g), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
}

ENTRY %main (s: (s32[], bf16[4,64], bf16[4,8]), g: f32[64,16], h: f32[]) -> f32[8,16] {
  %s = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %g = f32[64,16]{1,0} parameter(1)
  %h = f32[] parameter(2)
  %accumulated = (s32[], bf16[4,64]{1,0}, bf16[4,8]{1,0}) while(%s), condition=%more, body=%micro
  %sums = ((f32[64,16]{1,0}), f32[64,16]{1,0}) all-reduce-start(%g), channel_id=2, to_apply=%add
  %summed = f32[64,16]{1,0} all-reduce-done(%sums)
  %start = ((f32[64,16]{1,0}), f32[8,16]{1,0}) async-start(%summed), calls=%scattering
  ROOT %end = f32[8,16]{1,0} async-done(%start), calls=%scattering
}
"""  # noqa: E501


def row(static, per_step, bytes_per_step, group):
    return {
        "static": static,
        "per_step": per_step,
        "bytes_per_step": bytes_per_step,
        "bytes_by_group": {group: bytes_per_step},
    }


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups=mesh['replica'=4,'data'=16] {'data'}, dimensions={0}", "16"),
        ("replica_groups=mesh['replica'=4,'data'=16] {'replica','data'}, dimensions={0}", "64"),
        ("replica_groups=mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_0'}, dimensions={0}", "16"),
        ("replica_groups={{0,4,8},{1,5,9}}, dimensions={0}", "3"),
        ("replica_groups=[8,2]<=[2,8]T(1,0), dimensions={0}", "2"),
        ("replica_groups={}, dimensions={0}", "all"),
    ],
)
def test_groups_are_told_apart_in_every_way_of_writing_them(groups, size):
    text = GPU_LOOP.replace("replica_groups=mesh['replica'=2,'data'=8] {'data'}, dimensions={0}", groups)
    assert list(collectives.count(text)["all-gather"]["bytes_by_group"]) == [size]


def test_collectives_in_nested_loops_run_as_often_as_the_loops():
    found = collectives.count(GPU_LOOP)
    both = 32 * 64 * 2 + 32 * 8 * 2
    assert found.pop("loops_of_unknown_length") == 0
    assert found == {
        # 3 by the condition's constant, 22 by the compiler's word, which counts more than the 99
        "all-gather": row(1, 66, 66 * both, "8"),
        "all-reduce": row(1, 1, 64 * 16 * 4, "all"),
        "reduce-scatter": row(1, 1, 64 * 16 * 4, "8"),
    }


def test_a_loop_whose_length_cannot_be_read_is_reported():
    unreadable = GPU_LOOP.replace("%limit = s32[]{:T(128)} constant(3)", "%limit = s32[] parameter(7)")
    found = collectives.count(unreadable)
    assert found["loops_of_unknown_length"] == 1 and found["all-gather"]["per_step"] == 22


# The three fusions of one asynchronous all-gather, and a reduce-scatter, as XLA's compiler for TPUs writes them.
TPU = """
%fused_computation.1 (p: bf16[1,16]) -> (bf16[1,16], bf16[1,128], u32[]) {
  %p = bf16[1,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[1,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=61, replica_groups=mesh['replica'=2,'data'=8] {'data'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[1,16]{1,0:T(8,128)(2,1)S(1)}, bf16[1,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p: bf16[1,16], q: bf16[1,128]) -> (bf16[1,128]) {
  %p = bf16[1,16]{1,0} parameter(0)
  %q = bf16[1,128]{1,0} parameter(1)
  %all-gather.2 = bf16[1,128]{1,0} all-gather(%p), channel_id=61, dimensions={1}
  ROOT %tuple = (bf16[1,128]{1,0}) tuple(%q)
}

%fused_computation.3 (p: bf16[1,16], q: bf16[1,128]) -> bf16[1,128] {
  %p = bf16[1,16]{1,0} parameter(0)
  %q = bf16[1,128]{1,0} parameter(1)
  %all-gather.3 = bf16[1,128]{1,0} all-gather(%p), channel_id=61, dimensions={1}
  ROOT %custom-call.3 = bf16[1,128]{1,0} custom-call(%p, %q, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.4 (p: f32[1024,128]) -> f32[64,128] {
  %p = f32[1024,128]{1,0} parameter(0)
  %all-reduce.4 = f32[1024,128]{1,0} all-reduce(%p), channel_id=7, to_apply=%add
  %at = s32[] constant(0)
  ROOT %mine = f32[64,128]{1,0} dynamic-slice(%all-reduce.4, %at, %at), dynamic_slice_sizes={64,128}
}

ENTRY %main.5 (p: bf16[1,16], g: f32[1024,128]) -> f32[64,128] {
  %p = bf16[1,16]{1,0:T(8,128)(2,1)} parameter(0)
  %g = f32[1024,128]{1,0:T(8,128)} parameter(1)
  %async-collective-start = (bf16[1,16]{1,0}, bf16[1,128]{1,0}, u32[]{:S(2)}) fusion(%p), kind=kCustom, calls=%fused_computation.1
  %whole = bf16[1,128]{1,0} get-tuple-element(%async-collective-start), index=1
  %meanwhile = (bf16[1,128]{1,0}) fusion(%p, %whole), kind=kOutput, calls=%async_collective_fusion.2
  %async-collective-done = bf16[1,128]{1,0} fusion(%p, %whole), kind=kCustom, calls=%fused_computation.3
  ROOT %all-reduce-scatter.6 = f32[64,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.4
}
"""  # noqa: E501


def test_collectives_that_the_tpu_compiler_hides_in_fusions():
    assert collectives.count(TPU) == {
        "all-gather": row(1, 1, 128 * 2, "8"),
        "reduce-scatter": row(1, 1, 1024 * 128 * 4, "all"),
        "loops_of_unknown_length": 0,
    }


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    def program(x_N):
        def body(total, _):
            return total + jax.lax.psum(jnp.sin(x_N) * total, "data"), None

        total_N, _ = jax.lax.scan(body, jnp.ones_like(x_N), length=5)
        return jax.lax.all_gather(total_N + x_N, "data", tiled=True)

    text = jax.jit(program).lower(jnp.ones(800, jnp.float32)).compile().as_text()
    assert collectives.count(text) == {
        "all-reduce": row(1, 5, 5 * 400, "8"),
        "all-gather": row(1, 1, 3200, "8"),
        "loops_of_unknown_length": 0,
    }
