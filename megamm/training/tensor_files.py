"""Tensors to and from a folder, each rank its shards, through torch.distributed.checkpoint (DCP).

DCP keeps its index in ``.metadata``, a pickle, and whatever is no tensor in pickles of its own. Users exchange
checkpoints, so neither is trusted: the index may name only the classes that it needs, and only tensors are read.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from megamm.errors import InputError, error_text
from megamm.parallel.mesh import World

INDEX = ".metadata"

_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = (
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "BytesStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
ALLOWED = {(f"{_DCP}metadata", name) for name in _METADATA_CLASSES} | {
    (f"{_DCP}filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),  # how torch pickles the layout of a tensor's properties
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
}
"""What an index may name, as (module, name); beside them the types of numbers in torch."""

# A single process saves and loads without torch.distributed on purpose.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_tensors(folder: Path, tensors: dict, world: World) -> None:
    """Write nested dictionaries of tensors; called by all ranks.

    Raises:
        CheckpointException: it could not be written; not an Exception. See :func:`innermost`.
    """
    # no_dist: a single process may have no process group at all.
    dcp.save(tensors, checkpoint_id=folder, process_group=world.group, no_dist=world.size == 1)


def load_tensors(folder: Path, tensors: dict, world: World) -> None:
    """Fill nested dictionaries of tensors in place, whatever the number of ranks that wrote them.

    Only what ``tensors`` names is read: pass the model's state alone to leave the optimizer's out.

    Raises:
        InputError: a tensor is missing or of another shape, a file is damaged, or the index asks for code.
        KeyboardInterrupt: it came while loading.
    """
    try:
        dcp.load(
            tensors,
            storage_reader=_Reader(folder),
            planner=_TensorsOnly(),
            process_group=world.group,
            no_dist=world.size == 1,
        )
    except (Exception, CheckpointException) as error:
        # DCP catches everything on a rank, also Ctrl-C, and gives it back inside of its own error.
        reason = innermost(error)
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        raise InputError(f"{folder}: cannot be loaded ({error_words(reason)}); is it of this model?") from error


def innermost(error: BaseException) -> BaseException:
    """The error that began it, below those of DCP, which hold a traceback of each rank."""
    while True:
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]  # rank -> (error, traceback); one rank's will do
        elif error.__cause__ or (error.__context__ and not error.__suppress_context__):
            error = error.__cause__ or error.__context__
        else:
            return error


def error_words(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(error_text(error).split())
    # Other errors often say little without their kind: KeyError's text is only the key.
    return text if isinstance(error, OSError | InputError) else f"{type(error).__name__}: {text}"


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A list of what is allowed, not of what is forbidden: of the latter there is always one more.
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise InputError(f"{INDEX} asks for {module}.{name}, which no checkpoint needs; refused")


class _Reader(dcp.FileSystemReader):
    """Reads the index without running code, and only from files of its own folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        # As DCP's own method, but for the unpickler and the check of names.
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata = _Unpickler(file).load()
        for place in metadata.storage_data.values():
            # DCP joins this path to the folder as it is: ".." or an absolute one would read any file.
            if Path(place.relative_path).name != place.relative_path:
                raise InputError(f"{INDEX} names the file {place.relative_path}, outside of the checkpoint; refused")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _TensorsOnly(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        # Called for whatever is no tensor, which DCP would unpickle without any restriction.
        raise InputError(f"{read_item.dest_index.fqn} is a pickle, not a tensor; refused")
