"""Published training speeds of other systems, to calibrate the estimate with: one factor, from one of them.

Each row says what ran in this project's own terms, as far as its source tells.  A GPT's MLP of two matrices d x 4d
stands as three of d x 8d/3, which is the same number of weights, FLOPs and values touched.  TinyLlama's own number is
not among them, and no constant of the model was fitted to any.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

from tinyllama_jax.config import Data, Execution, Mesh, Model, Run, Stage
from tinyllama_jax.flops import flops_per_token
from tinyllama_jax.preflight import assumptions, roofline, targets
from tinyllama_jax.presets import llama, preset
from tinyllama_jax.schedules import Plan


class Calibration(NamedTuple):
    efficiency: float  # tokens/s there were, over those of the model
    source: str  # what it rests on, for a person
    anchor: str  # name of the anchor or the run directory; empty = none


@dataclass(frozen=True, kw_only=True)
class Anchor:
    name: str
    source: str
    target: str
    model: Model
    sequence_tokens: int
    rows: int  # sequences per device and micro-batch
    tokens_per_s: float  # per device
    micro_batches: int = 1
    mesh: Mesh = field(default_factory=Mesh)
    remat: str = "none"
    note: str = ""

    def run(self) -> Run:
        count = targets.parse(self.target).count
        data = self.mesh.data if self.mesh.data != -1 else count // self.mesh.replica
        micro = self.rows * self.mesh.replica * data
        tokens = micro * self.micro_batches * self.sequence_tokens
        return Run(
            name=self.name,
            model=self.model,
            data=Data(store="none", sequence_tokens=self.sequence_tokens),
            curriculum=(Stage(name="all", tokens=tokens, batch_tokens=tokens, mixture={"text": 1.0}),),
            execution=Execution(micro_batch_sequences=micro, remat=self.remat),
            mesh=self.mesh,
        )

    def modelled(self) -> float:
        """Tokens per second and device by the roofline, not calibrated."""
        run, target = self.run(), targets.parse(self.target)
        plan = Plan(run.curriculum, run.data.sequence_tokens)
        (row,) = roofline.of_plan(run, plan.stages, target.count, assumptions.of(target))
        return row["batch_tokens"] / row["step_seconds"] / target.count

    @property
    def efficiency(self) -> float:
        return self.tokens_per_s / self.modelled()

    def calibration(self) -> Calibration:
        said = f"{self.name}: {self.tokens_per_s:,.0f} tokens/s per device on {self.target} ({self.source})"
        return Calibration(self.efficiency, said, self.name)


def _gpt(layers: int, d_model: int, heads: int, *, vocab_size: int, context_tokens: int) -> Model:
    return Model(
        vocab_size=vocab_size,
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=d_model // heads,
        d_ff=round(8 * d_model / 3),
        context_tokens=context_tokens,
        tied_embeddings=True,
    )


MPT_1B = _gpt(24, 2048, 16, vocab_size=50368, context_tokens=2048)
GPT_5B = _gpt(24, 4096, 32, vocab_size=50304, context_tokens=2048)
FOUNDRY = "llm-foundry@061f2c7 scripts/train/benchmarking/README.md"
TOOLBOX = "JAX-Toolbox@ddf1b99^ rosetta/rosetta/projects/pax/README.md"
KEEP = "save_dots_and_attention"

ANCHORS: dict[str, Anchor] = {
    anchor.name: anchor
    for anchor in (
        # -- A100
        Anchor(
            name="mpt-1b-a100-40g",
            source=FOUNDRY,
            target="a100-40g:8",
            model=MPT_1B,
            sequence_tokens=2048,
            rows=8,
            micro_batches=8,
            tokens_per_s=19_271,
            note="weights and optimizer in bf16 too, as in all its rows for 40 GB",
        ),
        Anchor(
            name="mpt-1b-a100-40g-2x8",
            source=FOUNDRY,
            target="a100-40g:2x8",
            model=MPT_1B,
            sequence_tokens=2048,
            rows=8,
            tokens_per_s=19_085,
        ),
        Anchor(
            name="mpt-1b-a100-40g-16x8",
            source=FOUNDRY,
            target="a100-40g:16x8",
            model=MPT_1B,
            sequence_tokens=2048,
            rows=10,
            tokens_per_s=18_647,
        ),
        Anchor(
            name="mpt-3b-a100-40g",
            source=FOUNDRY,
            target="a100-40g:8",
            model=_gpt(32, 2560, 20, vocab_size=50368, context_tokens=2048),
            sequence_tokens=2048,
            rows=5,
            micro_batches=8,
            tokens_per_s=10_065,
        ),
        Anchor(
            name="mpt-1b-a100-80g",
            source="llm-foundry@8c8dd48 scripts/train/benchmarking/README.md",
            target="a100-80g:8",
            model=MPT_1B,
            sequence_tokens=2048,
            rows=14,
            tokens_per_s=20_513,
            note="micro-batches per step not read; one assumed",
        ),
        Anchor(
            name="gpt3-1.3b-a100-80g",
            source="flash-attention@0b037c2 training/README.md",
            target="a100-80g:8",
            model=_gpt(24, 2048, 16, vocab_size=50304, context_tokens=2048),
            sequence_tokens=2048,
            rows=16,
            micro_batches=4,
            mesh=Mesh(replica=8, data=1),
            tokens_per_s=169_000 / 8,
            note="a batch of 1M tokens; how it is cut is assumed",
        ),
        Anchor(
            name="gpt-5b-pax-a100-80g",
            source=TOOLBOX,
            target="a100-80g:32x8",
            model=GPT_5B,
            sequence_tokens=2048,
            rows=8,
            remat=KEEP,
            tokens_per_s=5_745,
            note="rematerialisation assumed",
        ),
        Anchor(
            name="llama3-8b-torchtitan-a100-80g",
            source="torchtitan@d4c86e3^ docs/performance.md",
            target="a100-80g:8x8",
            model=llama(32, 4096, 32, 8, 14336, vocab_size=128_256, context_tokens=8192),
            sequence_tokens=8192,
            rows=1,
            remat="save_dots",
            tokens_per_s=2_973,
            note="selective activation checkpointing stands as save_dots",
        ),
        Anchor(
            name="gpt2-124m-jax-a100-40g",
            source="jax issue 24411 (October 2024)",
            target="a100-40g:1",
            model=_gpt(12, 768, 12, vocab_size=50304, context_tokens=1024),
            sequence_tokens=1024,
            rows=16,
            tokens_per_s=142_000,
            note="a tenth of the size; micro-batch assumed",
        ),
        # -- H100
        Anchor(
            name="olmo-1b-h100",
            source="OLMo-core@e27ba74 README (November 2024)",
            target="h100:8",
            model=llama(18, 2048, 16, 16, 5632, vocab_size=100_352, context_tokens=4096),
            sequence_tokens=4096,
            rows=8,
            tokens_per_s=55_000,
            note="number of GPUs assumed",
        ),
        Anchor(
            name="mpt-1b-h100",
            source=FOUNDRY,
            target="h100:8",
            model=MPT_1B,
            sequence_tokens=2048,
            rows=14,
            tokens_per_s=45_455,
            note="software of 2023",
        ),
        Anchor(
            name="gpt2-1.5b-llmc-h100",
            source="llm.c@039904e scripts/run_gpt2_1558M.sh",
            target="h100:8",
            model=_gpt(48, 1600, 25, vocab_size=50304, context_tokens=1024),
            sequence_tokens=1024,
            rows=16,
            micro_batches=8,
            mesh=Mesh(replica=8, data=1),
            tokens_per_s=1_048_576 / 2.75 / 8,
            note="2.70 to 2.80 s per step; its ZeRO-1 stands as whole copies",
        ),
        Anchor(
            name="llama2-7b-maxtext-h100",
            source="JAX-Toolbox@bcbbfa5 docs/frameworks/maxtext/README.md",
            target="h100:8",
            model=preset("llama-2-7b"),
            sequence_tokens=4096,
            rows=2,
            remat=KEEP,
            tokens_per_s=11_361,
        ),
        Anchor(
            name="gpt-5b-pax-h100",
            source=TOOLBOX,
            target="h100:32x8",
            model=GPT_5B,
            sequence_tokens=2048,
            rows=8,
            remat=KEEP,
            tokens_per_s=13_258,
            note="rematerialisation assumed",
        ),
        # -- TPU
        Anchor(
            name="llama3.2-1b-levanter-v4",
            source="marin issues 1826, 1864",
            target="v4:2x2x1",
            model=llama(16, 2048, 32, 8, 8192, vocab_size=128_256, context_tokens=4096, tied_embeddings=True),
            sequence_tokens=4096,
            rows=8,
            remat="full",
            tokens_per_s=13_250,
            note="length, micro-batch and rematerialisation are not stated: assumed",
        ),
        Anchor(
            name="llama3.1-8b-maxtext-v6e",
            source="maxtext docs/reference/models/tiering.md",
            target="v6e:16x16",
            model=llama(32, 4096, 32, 8, 14336, vocab_size=128_256, context_tokens=8192),
            sequence_tokens=8192,
            rows=2,
            remat=KEEP,
            tokens_per_s=7_207,
            note="micro-batch and rematerialisation assumed",
        ),
        Anchor(
            name="llama2-70b-maxtext-v5p",
            source="maxtext docs/reference/models/tiering.md",
            target="v5p:8x8x8",
            model=llama(80, 8192, 64, 8, 28672, vocab_size=32_000, context_tokens=4096),
            sequence_tokens=4096,
            rows=4,
            remat=KEEP,
            tokens_per_s=692,
            note="micro-batch and rematerialisation assumed; 64 times TinyLlama's size",
        ),
        Anchor(
            name="llama2-7b-axlearn-v5e",
            source="axlearn@34aed43 fuji.py: 46 % MFU on four slices of 256, here one",
            target="v5e:16x16",
            model=preset("llama-2-7b"),
            sequence_tokens=4096,
            rows=1,
            remat="full",
            tokens_per_s=0.46 * 197e12 / flops_per_token(preset("llama-2-7b"), 4096),
            note="length, micro-batch and rematerialisation assumed",
        ),
    )
}

# What an estimate is calibrated with unless it is told: the nearest by card, then by size, length and how it was cut.
NEAREST = {
    "a100-40g": "mpt-1b-a100-40g",
    "a100-80g": "mpt-1b-a100-80g",
    "h100": "olmo-1b-h100",
    "h200": "olmo-1b-h100",
    "v4": "llama3.2-1b-levanter-v4",
    "v5e": "llama2-7b-axlearn-v5e",
    "v5p": "llama2-70b-maxtext-v5p",
    "v6e": "llama3.1-8b-maxtext-v6e",
}


def family(target: str) -> str:
    """a100, h100 or tpu: what one efficiency may be carried over within."""
    name = target.partition(":")[0]
    return {"a": "a100", "h": "h100"}.get(name[0], "tpu")


def leave_one_out(name: str) -> float:
    """Relative error of the tokens/s of one anchor, forecast with the median efficiency of the others of its family."""
    anchor = ANCHORS[name]
    others = [a for a in ANCHORS.values() if a.name != name and family(a.target) == family(anchor.target)]
    forecast = anchor.modelled() * statistics.median(a.efficiency for a in others)
    return forecast / anchor.tokens_per_s - 1
