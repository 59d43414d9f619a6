"""PyTorch's own files, as weights alone: `torch.load(weights_only=True)` builds tensors and runs nothing else.

The only file that imports torch, and only inside of its functions: it is optional.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama_jax.errors import ConfigError, DataError
from tinyllama_jax.interop.json_files import shown
from tinyllama_jax.interop.tensor_files import DTYPES, NAMES, Shape, cast

WRAPPERS = ("model", "state_dict")  # keys under which a training program keeps the weights, beside its optimizer
PREFIXES = ("_forward_module.", "_orig_mod.", "module.")  # of wrapped modules
OLDEST = (2, 6)  # before it, a file could run code in spite of weights_only (CVE-2025-32434)


def _torch() -> Any:
    """The module.  Raises ConfigError, with what to install, when it is absent or too old to be trusted with files."""
    try:
        import torch
    except ImportError:
        raise ConfigError(
            "a .pth file needs PyTorch, which is not installed: pip install 'tinyllama_jax[torch]'"
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
        raise ConfigError(f"PyTorch {torch.__version__} may run what a .pth file says: pip install 'torch>=2.6'")
    return torch


def load(path: Path) -> dict[str, np.ndarray]:
    """Name -> tensor of a file, mapped and not yet read; of a training checkpoint the model's.

    float32, float16 and bfloat16.  Raises DataError for anything but a dictionary of such tensors, each of which lies
    in the file: what is claimed is never more than twice what is there (two names may share one matrix).
    """
    if not path.is_file():
        raise DataError(f"{path} is missing; name the file with the weights, or its folder")
    torch = _torch()
    try:
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many kinds: of the archive, the pickle, the storages
        why = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise DataError(f"{path} cannot be read as weights alone ({why}); save the model's state_dict again") from None
    for wrapper in WRAPPERS:
        if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
            value = value[wrapper]
    if not isinstance(value, dict) or not value:
        raise DataError(f"{path} holds a {type(value).__name__}; it must be a dictionary of tensors, a state_dict")
    found, total = {}, 0
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise DataError(f"{path}: {shown(name)} is a {type(tensor).__name__}, no tensor; save the state_dict alone")
        tensor, dtype = tensor.detach(), str(tensor.dtype).removeprefix("torch.")
        total += tensor.numel() * tensor.element_size()
        if dtype not in NAMES:
            raise DataError(f"{path}: tensor {shown(name)} is {dtype}; only {', '.join(NAMES)} can be imported")
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        bits = tensor.view(torch.int16).numpy() if dtype == "bfloat16" else tensor.numpy()
        found[name] = bits.view(DTYPES[NAMES[dtype]])
    if total > 2 * path.stat().st_size:  # views of one storage, or strides of zero
        raise DataError(f"{path} claims {total} bytes of tensors, more than it holds; save the state_dict again")
    return found


def save(path: Path, tensors: Iterable[tuple[str, np.ndarray]], dtype: str) -> None:
    """Write a state_dict in float32, float16 or bfloat16 and force it to disk.  All of it is in memory meanwhile.

    Raises ConfigError when a value does not fit into float16, or without PyTorch.
    """
    torch, target = _torch(), DTYPES[NAMES[dtype]]
    state = {}
    for name, tensor in tensors:
        stored = cast(name, tensor, target)
        stored = stored if stored.flags.writeable else stored.copy()
        state[name] = (
            torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
            if dtype == "bfloat16"
            else torch.from_numpy(stored)
        )
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def require_exactly(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], where: Path, ignored: str) -> None:
    """Raises DataError unless there are the expected tensors and no others, but for names that end in `ignored`."""
    for name, shape in expected.items():
        if name not in shapes:
            raise DataError(f"{where} lacks tensor {name} {list(shape)}, which its configuration asks for")
        if tuple(shapes[name]) != shape:
            found = list(shapes[name])
            raise DataError(f"{where}: tensor {name} is {found}; its configuration makes it {list(shape)}")
    for name in shapes.keys() - expected.keys():
        if not name.endswith(ignored):
            raise DataError(f"{where}: tensor {shown(name)} {list(shapes[name])} has no place in this model")
