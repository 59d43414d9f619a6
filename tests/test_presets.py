import pytest

from tinyllama_jax.errors import ConfigError
from tinyllama_jax.flops import parameter_counts
from tinyllama_jax.presets import PRESETS, preset

PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "tinyllama-120m": 121_129_728,
    "tinyllama-1.1b-code-8k": 1_100_048_384,
    "llama-19m": 53_221_888,
    "llama-41m": 73_675_264,
    "llama-85m": 134_105_856,
    "llama-127m": 176_582_400,
    "llama-231m": 296_784_896,
    "llama-308m": 373_867_520,
    "llama-488m": 569_570_560,
    "llama-679m": 777_856_512,
    "llama-1233m": 1_364_297_728,
    "micro-llama-300m": 304_636_928,
    "llama-2-7b": 6_738_415_616,
    "smollm2-135m": 134_515_008,
}

# total, non-embedding and matmul, in millions
LADDER = {
    "t15": (14.6, 2.4, 8.5),
    "t22": (22.3, 5.9, 14.1),
    "t37": (37.2, 12.6, 24.9),
    "t55": (54.5, 21.8, 38.1),
    "t79": (79.3, 42.5, 60.9),
    "t101": (101, 60.2, 80.7),
    "t150": (150, 101, 125),
    "t243": (243, 177, 210),
    "t331": (331, 266, 299),
    "t489": (489, 407, 448),
    "t1100": (1100, 969, 1034),
}


def test_every_preset_is_checked_below():
    assert set(PRESETS) == set(PUBLISHED) | set(LADDER)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameter_counts(preset(name))["total"] == PUBLISHED[name]


@pytest.mark.parametrize("name", LADDER)
def test_ladder_counts_to_three_figures(name):
    counts = parameter_counts(preset(name))
    for kind, millions in zip(("total", "non_embedding", "matmul"), LADDER[name], strict=True):
        assert abs(counts[kind] / 1e6 - millions) <= (0.05 if millions < 100 else 0.5), kind
    assert preset(name).head_dim == 64


def test_shapes_that_counts_do_not_show():
    assert preset("t1100") == preset("tinyllama-1.1b")
    assert preset("tinyllama-120m").kv_heads == 1
    code = preset("tinyllama-1.1b-code-8k")
    assert (code.context_tokens, code.rope.kind, code.rope.factor) == (8192, "linear", 4.0)
    assert preset("llama-1233m").head_dim == 128
    smol = preset("smollm2-135m")
    assert (smol.tied_embeddings, smol.rope.theta, smol.kv_heads, smol.head_dim) == (True, 1e5, 3, 64)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="nearest is 'tinyllama-1.1b'") as error:
        preset("TinyLlama_1.1B")
    assert "\n" not in str(error.value)
