import json

import pytest

from tinyllama_jax import configio
from tinyllama_jax.config import Data, Fork, LearningRate, Model, Recipe, Run, Stage, replace
from tinyllama_jax.errors import ConfigError, UsageError


def small(**changes) -> Run:
    model = Model(vocab_size=64, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=64, context_tokens=64)
    run = Run(
        name="small",
        model=model,
        data=Data(store="data/x", sequence_tokens=16, recipe=Recipe()),
        curriculum=(
            Stage(name="basic", tokens=1000, batch_tokens=64, mixture={"prose": 1.0}),
            Stage(name="cooldown", tokens=500, batch_tokens=256, mixture={"prose": 0.5, "code": 0.5}, ramp_tokens=256),
        ),
    )
    return replace(run, **changes)


def test_a_run_survives_json():
    run = small(
        fork=Fork(run="runs/parent", tokens=1024), lr=LearningRate(kind="piecewise", points=((0, 1e-3), (9, 0.0)))
    )
    assert configio.from_dict(Run, json.loads(json.dumps(configio.to_dict(run)))) == run


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("lr.peak=3e-4", lambda r: r.lr.peak == 3e-4),
        ("seed=1e3", lambda r: r.seed == 1000 and isinstance(r.seed, int)),
        ("model.tied_embeddings=true", lambda r: r.model.tied_embeddings is True),
        ("model.rope.kind=yarn", lambda r: r.model.rope.kind == "yarn"),
        ("curriculum.0.tokens=2048", lambda r: r.curriculum[0].tokens == 2048),
        ("curriculum.cooldown.batch_tokens=128", lambda r: r.curriculum[1].batch_tokens == 128),
        ("curriculum.cooldown.mixture.code=2", lambda r: r.curriculum[1].mixture == {"prose": 0.5, "code": 2.0}),
        ('evaluation.prompts=["a=b"]', lambda r: r.evaluation.prompts == ("a=b",)),
        ("data.recipe=none", lambda r: r.data.recipe is None),
        ('fork={"run":"runs/p","tokens":64}', lambda r: r.fork == Fork(run="runs/p", tokens=64)),
    ],
)
def test_overrides_are_parsed_by_the_type_of_the_field(setting, read):
    assert read(configio.override(small(), [setting]))


def test_an_optional_group_is_filled_in_field_by_field():
    assert configio.override(small(), ["fork.run=a", "fork.tokens=64"]).fork == Fork(run="a", tokens=64)
    with pytest.raises(ConfigError, match="fork: missing tokens"):
        configio.override(small(), ["fork.run=a"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr.peek=1", "did you mean 'peak'"),
        ("optimiser.eps=1", "did you mean 'optimizer'"),
        ("seed=many", "seed takes int"),
        ("seed=1.5", "seed takes int"),
        ("model.tied_embeddings=perhaps", "takes bool"),
        ("model.rope.kind=alibi", "one of default, none"),
        ("curriculum.middle.tokens=1", "there are: basic, cooldown"),
        ("lr.peak.value=1", "single value"),
        ("evaluation.prompts=hello", "JSON"),
        ("seed", "key=value"),
    ],
)
def test_a_wrong_override_is_a_usage_error_that_helps(setting, message):
    with pytest.raises(UsageError, match=message):
        configio.override(small(), [setting])


def test_values_that_contradict_each_other_are_a_config_error():
    with pytest.raises(ConfigError, match="does not divide"):
        configio.override(small(), ["model.kv_heads=3"])
    with pytest.raises(ConfigError, match="exceeds model.context_tokens"):
        configio.override(small(), ["data.sequence_tokens=128"])


def test_the_fingerprint_covers_numbers_and_not_places():
    base = configio.fingerprint(small())
    for same in (
        "data.store=elsewhere/y",
        "name=other",
        "execution.remat=full",
        "mesh.data=1",
        "evaluation.sequences=1",
    ):
        assert configio.fingerprint(configio.override(small(), [same])) == base, same
    for other in (
        "seed=1",
        "lr.peak=1e-3",
        "model.d_ff=65",
        "curriculum.0.tokens=2000",
        "optimizer.decay=matrices",
        "data.epochs=replay",
        "data.document_masking=true",
    ):
        assert configio.fingerprint(configio.override(small(), [other])) != base, other


def test_the_future_may_be_edited_when_the_horizon_is_stated():
    fixed = configio.override(small(), ["lr.horizon_tokens=4096"])
    later = configio.override(fixed, ["curriculum.cooldown.tokens=900", "curriculum.cooldown.mixture.code=9"])
    assert configio.identity(fixed, 1000) == configio.identity(later, 1000)
    assert configio.identity(fixed, 1100) != configio.identity(later, 1100)  # cooldown begins at 1024
    derived = configio.override(small(), ["curriculum.cooldown.tokens=900"])
    changes = configio.differences(configio.identity(small(), 1000), configio.identity(derived, 1000))
    assert changes == ["lr.horizon_tokens: 1536 -> 2048"]


def test_an_experiment_is_found_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_here.py").write_text(
        "from tinyllama_jax.config import *\n"
        "def go():\n"
        "    m = Model(vocab_size=8, d_model=8, layers=1, heads=1, kv_heads=1, head_dim=8, d_ff=8, context_tokens=8)\n"
        "    s = Stage(name='a', tokens=8, batch_tokens=8, mixture={'x': 1.0})\n"
        "    return Run(name='mine', model=m, data=Data(store='s', sequence_tokens=8), curriculum=(s,))\n"
        "def sweep():\n    return [go(), go()]\n"
        "def _helper():\n    return go()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert configio.load_experiment("mine_here:go").name == "mine"
    for wrong, message in [
        ("mine_here:goo", "did you mean 'go'"),
        ("mine_here:nothing_like_it", r"\(there are: go, sweep\)"),
        ("nowhere:go", "no module 'nowhere'"),
        ("mine_here", "module:function"),
    ]:
        with pytest.raises(UsageError, match=message):
            configio.load_experiment(wrong)
    with pytest.raises(ConfigError, match=r"returned 2 Runs: a sweep is not one run; name one, such as .*sweep\[0\]"):
        configio.load_experiment("mine_here:sweep")


def test_one_run_of_a_sweep_is_named_by_its_number(tmp_path, monkeypatch):
    (tmp_path / "my_sweep.py").write_text(
        "from experiments.smoke import tiny\nfrom tinyllama_jax.config import replace\n"
        "def sweep():\n    return [replace(tiny(), name=f'seed{n}', seed=n) for n in range(12)]\n"
        "def one():\n    return tiny()\n"
        "def none():\n    return []\n"
        "def words():\n    return ['tiny']\n"
    )
    monkeypatch.chdir(tmp_path)
    assert configio.load_experiment("my_sweep:sweep[11]").seed == 11
    assert [run.seed for run in configio.load_runs("my_sweep:sweep")] == list(range(12))
    assert configio.load_runs("my_sweep:one").name == "tiny"
    for wrong, message in [
        ("my_sweep:sweep[12]", "returns 12 Runs, numbered from 0"),
        ("my_sweep:one[0]", r"returns one Run; leave \[0\] out"),
        ("my_sweep:sweep[-1]", "has no function"),
    ]:
        with pytest.raises(UsageError, match=message):
            configio.load_experiment(wrong)
    for wrong, message in [("my_sweep:none", "an empty list"), ("my_sweep:words", "returned list, not a Run")]:
        with pytest.raises(ConfigError, match=message):
            configio.load_runs(wrong)


def test_an_experiment_is_found_on_the_experiment_path(tmp_path):
    (tmp_path / "mine_there.py").write_text("import no_such_package\n")
    with pytest.raises(ConfigError, match="no_such_package.*not installed"):
        configio.load_experiment("mine_there:go", [str(tmp_path)])
