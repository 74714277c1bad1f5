"""The processes of one launch before they join a process group: what each found is told to all.

A rank that refuses its config must not leave the others waiting for it in a collective, and an error that all ranks
find must be printed once. Both take a few keys of the key-value store that torchrun, or rank 0, serves anyway.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import Store

from megamm.errors import InputError, RunError
from megamm.parallel.store import meet

PATIENCE = timedelta(minutes=5)
"""How long a rank waits for the others to read their configs."""


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together.

    Attributes:
        rank, size: as torchrun numbers them.
        store: shared by all; None for a single process.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None

    @classmethod
    def from_environment(cls) -> "Launch":
        """Find the others by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; joins no process group.

        Raises:
            InputError: the environment says that there are others, but not where.
            RunError: they cannot be reached.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # started without torchrun, or alone
            return cls()
        try:
            store, rank, size = meet(PATIENCE)
        except ValueError as error:  # a variable is missing
            raise InputError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: {error}; start with torchrun") from error
        except RuntimeError as error:
            raise RunError(f"the other ranks cannot be reached: {str(error).splitlines()[0]}") from error
        return cls(rank, size, store)

    def tell_all(self, found: Any) -> list[Any]:
        """What every rank found, by rank; ``found`` is what JSON can hold. Called once, by all ranks.

        Raises:
            RunError: a rank did not answer in five minutes.
        """
        if self.store is None:
            return [found]
        self.store.set(f"megamm/found/{self.rank}", json.dumps(found))
        try:
            # Rank 0 collects for all: ranks that each asked all others would be too many requests.
            if self.rank == 0:
                every = [json.loads(self.store.get(f"megamm/found/{rank}")) for rank in range(self.size)]
                self.store.set("megamm/found", json.dumps(every))
            every = json.loads(self.store.get("megamm/found"))  # waits until rank 0 has set it
            self.store.set(f"megamm/read/{self.rank}", "")
            if self.rank == 0:  # it may serve the store, and end at once with what it has read
                self.store.wait([f"megamm/read/{rank}" for rank in range(self.size)], PATIENCE)
            return every
        except RuntimeError as error:
            raise RunError(f"a rank did not say whether it can start: {str(error).splitlines()[0]}") from error

    def says(self, text: str) -> bool:
        """Whether it is for this rank to print ``text``: the first that asks does, for all that have the same."""
        if self.store is None:
            return True
        try:
            return self.store.add(f"megamm/said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
        except RuntimeError:  # the store has gone with rank 0: better twice than never
            return True
