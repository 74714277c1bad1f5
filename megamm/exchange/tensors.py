"""Safetensors files, one tensor in memory at a time; a model may be cut into several with an index.

The format: eight bytes with the length of a header, the header in JSON (name -> dtype, shape, place), then the bytes of
the tensors. Writing it here lets a tensor go to the disk before the next one is made; the library wants all of a file.
"""

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megamm.errors import InputError
from megamm.files import write_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}


class TensorFolder:
    """The tensors of a folder's safetensors files; nothing is read before it is asked for.

    Raises:
        InputError: no such files, files that are damaged, pickled weights instead, or an index that names a file
            outside the folder or one that lacks what it should hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        self.places = {name: file for file in self._list() for name in self._keys(file)}
        """Name -> file."""
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self.places}
        """Name -> shape."""

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A tensor, or part of it (slices without steps), in float32."""
        found = self._slice(name)
        try:
            tensor = found[:] if part is None else found[part]
        except SafetensorError as error:
            raise InputError(f"{self.folder / self.places[name]}: {name} cannot be read ({error})") from error
        if not tensor.is_floating_point():
            raise InputError(
                f"{self.folder / self.places[name]}: {name} is {tensor.dtype}; quantised weights are not read, give "
                "those in float32, bfloat16 or float16"
            )
        return tensor.float()

    def _list(self) -> list[str]:
        index = self.folder / INDEX
        if index.exists():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(names.values()))
                # Folders of weights are exchanged: what an index says must not lead out of its own.
                if any(Path(file).name != file for file in files):
                    raise ValueError("it names files outside of its folder")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index}: not an index of safetensors files ({error}); copy it again") from error
            held = {name for file in files for name in self._keys(file)}
            if missing := sorted(names.keys() - held):
                raise InputError(
                    f"{index}: {missing[0]} is not in {names[missing[0]]}; copy that file again"
                    + (f" ({len(missing)} tensors are missing)" if len(missing) > 1 else "")
                )
            return files
        if (self.folder / FILE).exists():
            return [FILE]
        pickles = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InputError(
                f"{self.folder / pickles[0]}: pickled weights can run code and are not read; save the model as "
                "safetensors (save_pretrained does) and give that folder"
            )
        raise InputError(f"{self.folder}: neither {FILE} nor {INDEX} is there; give a folder that has one of them")

    def _keys(self, file: str) -> list[str]:
        if file not in self._files:
            path = self.folder / file
            if not path.is_file():
                raise InputError(f"{path}: missing, though the index names it; copy it again")
            try:
                self._files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again") from error
        return list(self._files[file].keys())

    def _slice(self, name: str) -> Any:
        return self._files[self.places[name]].get_slice(name)


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that are made together.

    Attributes:
        shapes: by name, in the order of what ``make`` gives.
    """

    shapes: dict[str, tuple[int, ...]]
    make: Callable[[], Sequence[torch.Tensor]]


def write_tensors(folder: Path, groups: Sequence[TensorGroup], dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write one file, or several with an index, into an existing folder.

    Args:
        dtype: a key of ``DTYPES``.
        shard_bytes: a file holds no more than this, unless one group does.
    """
    kind, code = DTYPES[dtype]
    sizes = [sum(torch.Size(shape).numel() for shape in group.shapes.values()) * kind.itemsize for group in groups]
    shards: list[list[TensorGroup]] = [[]]
    held = 0
    for group, size in zip(groups, sizes, strict=True):
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(group)
        held += size
    if len(shards) == 1:
        _write_file(folder / FILE, shards[0], kind, code)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, kind, code)
        places |= {name: file for group in shard for name in group.shapes}
    write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})


def _write_file(path: Path, groups: list[TensorGroup], kind: torch.dtype, code: str) -> None:
    # transformers looks for this mark of the framework.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for group in groups:
        for name, shape in group.shapes.items():
            size = torch.Size(shape).numel() * kind.itemsize
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
    text = json.dumps(header).encode()
    # Spaces after the JSON are allowed, and let the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for group in groups:
            for shape, tensor in zip(group.shapes.values(), group.make(), strict=True):
                assert tuple(tensor.shape) == tuple(shape), f"{path}: {list(group.shapes)}"
                # As bytes, because numpy has no bfloat16.
                file.write(tensor.detach().to(kind).contiguous().flatten().view(torch.uint8).numpy().data)
