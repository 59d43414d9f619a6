"""The rules of the house that a parser can hold: who imports whom, how long a file may be."""

import ast
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tinyllama_jax"
NO_JAX = {
    "config",
    "errors",
    "finetune.recipe",
    "configio",
    "presets",
    "flops",
    "mesh_rules",
    "schedules",
    "weights",
    *("lab.fit." + name for name in ("chinchilla", "isoflop", "repetition", "overtraining", "allocate", "points")),
    *("lab." + name for name in ("laws", "rules", "row", "shapes", "sweep", "slots", "run_sweep", "table")),
    *("lab." + name for name in ("runs", "report", "study")),
    *("data.prepare", "launch.supervise", "train.saved"),
    *("finetune." + name for name in ("rows", "prepare", "store", "describe")),
}
ONE_HOME = {
    "orbax": {"train.checkpoint_files"},
    "grain": {"data.pipeline"},
    **dict.fromkeys(("tokenizers", "sentencepiece"), {"data.tokenizer", "data.tokenizer_backends"}),
    **dict.fromkeys(("pyarrow", "tensorflow_datasets", "array_record"), {"data.readers"}),
    "zstandard": {"data.readers", "programs"},
    "fsspec": {"data.storage", "launch.bucket"},
    "datasketch": {"data.duplicates"},
    "yaml": {"launch.yaml_text", "interop.litgpt_config", "interop.model_card"},
    "torch": {"interop.torch_files"},
    "gguf": {"interop.gguf", "interop.gguf_file", "interop.gguf_kinds"},
    "datatrove": {"data.datatrove_adapter"},
    "lm_eval": {"evaluate.harness", "evaluate.harness_model", "evaluate.harness_tasks"},
    "aiohttp": {"serve.app", "serve.run"},
    **dict.fromkeys(("tensorboardX", "wandb", "trackio"), {"train.adapters"}),
}
BELOW_TRAIN = {"model", "attention", "loss", "optim", "data", "schedules", "presets", "flops", "sharding"}
EXPERIMENTS_MAY_USE = {
    "config",
    "finetune",
    "finetune.recipe",
    "presets",
    "schedules",
    "lab",
    "lab.shapes",
    "lab.sweep",
}


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def module_name(path: Path) -> str:
    """Dotted name inside the package: `train.checkpoint`; a package's own file goes by the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files(PACKAGE)}


def imports(source: str, package: str = "") -> set[str]:
    """Every module that `source` imports, inside functions too; both `a.b` and `a.b.c` for `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join(parents[: len(parents) - node.level + 1] + ([base] if base else []))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(path: Path) -> set[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return imports(path.read_text(), package)


def ours(imported: set[str]) -> set[str]:
    """The modules of this package among them, without the package's name."""
    inside = {name.removeprefix("tinyllama_jax.") for name in imported if name.startswith("tinyllama_jax.")}
    return inside & set(MODULES)


def reached(name: str) -> set[str]:
    """Everything that is imported when module `name` is, through modules of this package; `name` included."""
    seen, todo = set(), [name]
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        imported = imports_of(MODULES[module])
        seen |= {i for i in imported if not i.startswith("tinyllama_jax")}
        todo += ours(imported)
        todo += [package for package in (module.rpartition(".")[0],) if package in MODULES]
    return seen


def test_the_parser_sees_every_way_to_import():
    source = "import a.b\ndef f():\n    from c import d\nfrom . import e\nfrom ..g.h import i\n"
    assert imports(source, "p.q") >= {"a.b", "c", "c.d", "p.q.e", "p.g.h", "p.g.h.i"}


def test_config_imports_the_standard_library_only():
    import sys

    for name in ("config", "config_model", "config_finetune", "errors"):
        imported = imports_of(MODULES[name])
        assert ours(imported) <= {"errors", "config_model", "config_finetune"}
        roots = {i.split(".")[0] for i in imported}
        assert roots <= sys.stdlib_module_names | {"tinyllama_jax"}


def test_the_supervisor_needs_the_standard_library_only():
    """It runs beside the container, on nodes that may have nothing but Python."""
    import sys

    assert {i.split(".")[0] for i in imports_of(MODULES["launch.supervise"])} <= {
        *sys.stdlib_module_names,
        "tinyllama_jax",
    }
    assert ours(imports_of(MODULES["launch.supervise"])) == {"launch.bucket"}, "only when it is asked for a bucket"


@pytest.mark.parametrize("name", sorted(NO_JAX & set(MODULES)))
def test_no_jax(name):
    assert not {i for i in reached(name) if i.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")}


@pytest.mark.parametrize("library", sorted(ONE_HOME))
def test_one_home(library):
    users = {name for name, path in MODULES.items() if library in {i.split(".")[0] for i in imports_of(path)}}
    assert users <= ONE_HOME[library]


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.split(".")[0] in BELOW_TRAIN))
def test_below_training(name):
    assert not {i for i in ours(imports_of(MODULES[name])) if i.split(".")[0] == "train"}


def test_nothing_imports_the_command_line():
    users = {name for name, path in MODULES.items() if "cli" in ours(imports_of(path))}
    assert users <= {"__main__", "cli"}
    for path in files(ROOT / "experiments"):
        assert "cli" not in ours(imports_of(path))


@pytest.mark.parametrize("path", files(ROOT / "experiments"), ids=lambda p: p.name)
def test_experiments_only_describe_runs(path):
    imported = imports_of(path)
    assert ours(imported) <= EXPERIMENTS_MAY_USE
    assert not {i for i in imported if i.split(".")[0] in ("jax", "flax", "optax", "numpy")}


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:  # an unpacked archive
        return [p for folder in ("tinyllama_jax", "tests", "experiments", "benchmarks") for p in files(ROOT / folder)]
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def test_a_file_is_one_idea():
    long = {str(p.relative_to(ROOT)): n for p in tracked() if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_every_module_says_what_it_is_for():
    silent = [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_development_requirements_are_written_twice_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert [line for line in lines if line[0] not in "#-"] == project["optional-dependencies"]["dev"]
