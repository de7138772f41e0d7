"""Model folders as files: what tensors one holds, and writing one tensor at a time."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from rljax.config import ConfigError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Stored types that can be read, by their safetensors name."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in one of a model's JSON files; `ConfigError` when there is no such file or it is damaged."""
    if not file.is_file():
        raise ConfigError(f"{file} does not exist; give a folder with config.json and safetensors files")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON ({error}); fetch it again") from error


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Any
    """The open file; `file.get_slice(name)[rows, columns]` reads and allocates that slice only."""
    name: str
    shape: tuple[int, ...]


def list_tensors(folder: str | Path) -> dict[str, Stored]:
    """Tensors of a folder's safetensors files by name; reads the headers only.

    Raises:
      ConfigError: files are missing, cut short, or hold another type than float32, float16, bfloat16.
    """
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    elif single.is_file():
        paths = [single]
    else:
        raise ConfigError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; other weight formats are not "
            "read: convert the model to safetensors (`rljax convert` does it for GGUF)"
        )
    found: dict[str, Stored] = {}
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{path} is missing, and the index beside it lists it; fetch the folder again")
        try:
            file = safe_open(path, framework="np")
        except SafetensorError as error:
            raise ConfigError(
                f"{path} is damaged or cut short, it cannot be read as safetensors ({error}); fetch it again"
            ) from error
        for name in file.keys():  # noqa: SIM118, not a dict
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise ConfigError(
                    f"{path}: tensor {name} has type {tensor.get_dtype()}; {', '.join(DTYPES)} can be read; use an "
                    "unquantised copy of the model"
                )
            found[name] = Stored(file, name, tuple(tensor.get_shape()))
    return found


def write_tensors(
    folder: Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[np.ndarray], dtype: str, max_shard_bytes: float
) -> None:
    """Files of at most `max_shard_bytes` (or one tensor) each, and their index; `tensors` in the order of `shapes`."""
    item = np.dtype(dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = item * math.prod(shape)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    several = len(shards) > 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if several else "model.safetensors"
        write_file(folder / file, shard, tensors, dtype)
        weight_map |= dict.fromkeys(shard, file)
    if several:
        total = item * sum(math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path, shard: dict[str, tuple[int, ...]], tensors: Iterator[np.ndarray], dtype: str) -> None:
    """u64 header length, JSON header, data. The safetensors package would need all of the file in memory."""
    stored_as = next(name for name, kind in DTYPES.items() if kind == np.dtype(dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses the file
    offset = 0
    for name, shape in shard.items():
        end = offset + np.dtype(dtype).itemsize * math.prod(shape)
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shard.items():
            tensor = next(tensors)
            assert tensor.shape == shape and tensor.dtype == np.dtype(dtype), f"{name}: {tensor.shape} {tensor.dtype}"
            stream.write(np.ascontiguousarray(tensor).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())
