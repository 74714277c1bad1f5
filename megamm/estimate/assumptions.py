"""What an estimate assumes where no data sheet says it. Nothing here was measured on a GPU."""

from dataclasses import dataclass

from megamm.errors import InputError


@dataclass(kw_only=True, frozen=True)
class Assumptions:
    """Efficiencies of kernels and links, and what a node is.

    Attributes:
        matmul: share of the peak rate that large matrix products reach.
        attention: the same for attention, of the pairs that the mask admits (tiles compute more).
        memory: share of the memory bandwidth that element-wise kernels and the optimizer reach.
        network: share of the links' bandwidth that collectives reach.
        overlap: share of the computation that communication can hide behind.
        ranks_per_node: ranks that share a node's fast links.
        node_bandwidth: bytes/s per rank, in each direction, between nodes.
        launch: seconds that a kernel takes at least: its launch by Python.
        reserve: bytes per rank for the CUDA context, NCCL and fragmentation.
    """

    # Chosen on one published speed, torchtitan's Llama 3 8B on 8 H100 (docs/estimate.md); the others on none.
    matmul: float = 0.54
    attention: float = 0.35
    memory: float = 0.75
    network: float = 0.75
    overlap: float = 0.9
    ranks_per_node: int = 8
    # A network card of 400 Gb/s for each GPU.
    node_bandwidth: float = 50e9
    launch: float = 4e-6
    reserve: float = 3e9

    def check(self) -> None:
        """Raises InputError where a share is none, or a number is not positive."""
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name}: {getattr(self, name):g} is not above 0 and at most 1")
        for name in ("ranks_per_node", "node_bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name.replace('_', '-')}: {getattr(self, name):g} is not a finite number above 0")
        for name, unit in (("reserve", "bytes"), ("launch", "seconds")):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"--{name}: {getattr(self, name):g} is not a finite number of {unit}")


SHARES = {
    "matmul": (0.4, 0.7),
    "attention": (0.25, 0.55),
    "memory": (0.6, 0.9),
    "network": (0.5, 0.9),
    "overlap": (0.6, 1.0),
}
"""Shares and the ends between which they are taken to lie, together, for the interval of the MFU."""
