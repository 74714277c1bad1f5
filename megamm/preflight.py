"""``torchrun ... -m megamm.preflight --run-dir DIR``: is every node fit for a long run? Answers in under a minute.

Each rank measures itself, then the ranks measure each other: devices and versions, matrix products (right, and how
fast), all-reduce and a ring of transfers (right, and how fast), the folder of the run (shared, space, speed), clocks.
Rank 0 compares, prints a line per rank and names each rank that is wrong or slow. Exit codes: 0 fit, 1 a bad rank, 2
bad input. Also runs alone, without torchrun.
"""

import argparse
import os
import platform
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megamm_laws.arguments import ArgumentParser

import megamm
from megamm.config import load
from megamm.errors import InputError, RunError, exit_on_error
from megamm.files import check_out, write_json, write_text
from megamm.train import leave

SLOW = 0.7
"""A rank is slow below this share of the middle rank."""
CLOCKS_SECONDS = 2.0
"""Clocks may differ by this much."""
FREE_GIB = 10.0
TIMEOUT = timedelta(seconds=45)
"""After this a rank that does not answer is given up."""
# What must be the same on all ranks.
VERSIONS = ("megamm", "torch", "python", "cuda", "nccl", "device")


class Preflight:
    """One rank's checks; collective ones are called by all ranks in the same order.

    Attributes:
        facts: what this rank has measured, plain JSON values. Rates are in TFLOP/s, GB/s (1e9 bytes) and MB/s.
        faults: what is wrong with this rank.
    """

    def __init__(self, run_dir: Path, device: torch.device):
        self.run_dir, self.device = run_dir, device
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.facts: dict[str, Any] = {"rank": self.rank, "host": socket.gethostname()}
        self.faults: list[str] = []
        # Where each rank notes the check that it is in: the store answers when collectives hang.
        self._store: dist.Store | None = None

    def join(self) -> None:
        """Meet the other ranks."""
        if self.size == 1:
            return
        self._store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        self._store.set(f"preflight/{rank}", "join")
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=TIMEOUT)

    def run(self) -> list[dict[str, Any]]:
        """All checks; returns the facts of all ranks.

        Raises:
            RunError: a rank does not answer; names it and the check that it hangs in.
        """
        checks = (self.join, self.versions, self.products, self.all_reduce, self.ring, self.folder, self.clock)
        for check in checks:
            if self._store is not None:
                self._store.set(f"preflight/{self.rank}", check.__name__)
            try:
                check()
            except (RuntimeError, dist.DistError) as error:
                raise RunError(self._who_is_behind(check.__name__, error)) from error
        self.facts["faults"] = self.faults
        return self._gather(self.facts)

    def versions(self) -> None:
        """What this rank runs on."""
        cuda = self.device.type == "cuda"
        self.facts |= {
            "megamm": megamm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.machine(),
        }
        if cuda:
            free, total = torch.cuda.mem_get_info(self.device)
            self.facts |= {"memory_gib": total / 2**30, "memory_free_gib": free / 2**30}
            if free < 0.9 * total:  # the CUDA context of this process takes a little itself
                self.faults.append(f"{(total - free) / 2**30:.1f} GiB of the device's memory are in use by others")

    def products(self, seconds: float = 1.5) -> None:
        """Matrix products of whole numbers, exact in any order of summation, and their rate."""
        cuda = self.device.type == "cuda"
        # Large enough to be limited by arithmetic, not by memory.
        n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
        i = torch.arange(n, device=self.device)
        a = ((i[:, None] + i) % 2).to(dtype)  # each row and column has n / 2 ones
        rates: list[float] = []
        began = time.monotonic()
        # Over a while: a device that throttles when it is warm shows only then.
        while time.monotonic() - began < seconds or len(rates) < 3:
            start = self._now()
            product = multiply(a, a)
            rates.append(2 * n**3 / (self._now() - start) / 1e12)
        # Entries are 0 or n / 2, a power of two and so exact in bfloat16, too: any other value is a fault.
        even = ((i[:, None] + i) % 2 == 0).float() * (n / 2)
        wrong = int((product.float() != even).sum())
        if wrong:
            self.faults.append(f"{wrong} of {n * n} entries of a matrix product are wrong")
        self.facts["tflops"] = statistics.median(rates)

    def all_reduce(self) -> None:
        """A sum over ranks that is known, and its bus bandwidth; whose share is wrong is seen by gathering."""
        if self.size == 1:
            return
        # Each rank its own number, so that it can be told whose values are wrong.
        x = torch.full((self._elements(),), float(self.rank + 1), device=self.device)
        share = x[:1024].clone()  # enough to see whose values are wrong
        seconds = []
        for _ in range(3):
            y = x.clone()  # all_reduce works in place
            start = self._now()
            dist.all_reduce(y)
            seconds.append(self._now() - start)
        expected = self.size * (self.size + 1) / 2
        if not bool((y == expected).all()):
            self.faults.append(f"all-reduce gave {y[y != expected][0].item():g}, expected {expected:g}")
        shares = [torch.empty_like(share) for _ in range(self.size)]
        dist.all_gather(shares, share)
        off = [r for r, part in enumerate(shares) if not bool((part == r + 1).all())]
        if off:
            self.faults.append(f"all-gather gave wrong values of ranks {', '.join(map(str, off))}")
        # What a ring sends over each link, so that the number does not depend on how many ranks there are.
        bytes_moved = 2 * (self.size - 1) / self.size * x.numel() * x.element_size()
        # The best of the tries: the first one also sets up connections.
        self.facts["all_reduce_gb_per_second"] = bytes_moved / min(seconds) / 1e9

    def ring(self) -> None:
        """Each rank receives from the one before it: a slow link is seen at its end."""
        if self.size == 1:
            return
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        x = torch.full((self._elements(),), float(self.rank), device=self.device)
        y, seconds = torch.empty_like(x), []
        for _ in range(3):
            dist.barrier()  # a late neighbour is no slow link
            start = self._now()
            transfers = [dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, y, before)]
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
            seconds.append(self._now() - start)
        if not bool((y == before).all()):
            self.faults.append(f"what rank {before} sent did not arrive as it was")
        self.facts["ring_gb_per_second"] = x.numel() * x.element_size() / min(seconds) / 1e9

    def folder(self, num_bytes: int = 2**26) -> None:
        """The folder of the run: the same for all ranks, writable, with space, and its speed (one file per rank)."""
        shared = self.run_dir / ".preflight"
        token = self._gather(os.urandom(8).hex())[0]  # rank 0's
        if self.rank == 0:
            shutil.rmtree(shared, ignore_errors=True)
            _try(self.faults, lambda: write_text(shared / "token", token))
        # A barrier: the token has been written, or could not be.
        self._gather(None)
        try:
            seen = (shared / "token").read_text()
        except OSError:
            seen = None
        if seen != token:
            self.faults.append(f"train.run_dir {self.run_dir} is not the folder that rank 0 sees")
        else:
            _try(self.faults, lambda: self._write(shared / f"rank-{self.rank}", num_bytes))
            self.facts["free_gib"] = shutil.disk_usage(shared).free / 2**30
        # All have read and written: now it may be removed.
        self._gather(None)
        if self.rank == 0:
            shutil.rmtree(shared, ignore_errors=True)

    def _write(self, path: Path, num_bytes: int) -> None:
        # Random, as file systems may compress or share blocks that are alike.
        block = os.urandom(2**20)
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(num_bytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())  # else it is the memory's speed
        self.facts["disk_mb_per_second"] = num_bytes / (time.perf_counter() - start) / 1e6
        with path.open("rb") as file:
            if any(file.read(len(block)) != block for _ in range(num_bytes // len(block))):
                self.faults.append(f"{path}: reads back other than it was written")

    def clock(self) -> None:
        """Seconds since 1970 at a moment that all ranks share."""
        # All leave this at about the same moment.
        self._gather(None)
        self.facts["clock"] = time.time()

    # ---- help ----------------------------------------------------------------------------------------

    def _elements(self) -> int:
        return 2**26 if self.device.type == "cuda" else 2**21

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run on after their call
        return time.perf_counter()

    def _gather(self, value: Any) -> list[Any]:
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def _who_is_behind(self, check: str, error: Exception) -> str:
        reason = str(error).strip().splitlines()[0]
        if self._store is None:
            return f"{check}: {reason}"
        # Whoever is at another check is the one that the others wait for.
        places = [self._store.get(f"preflight/{r}").decode() for r in range(self.size)]
        behind = [f"rank {r} ({place})" for r, place in enumerate(places) if place != check]
        others = f"; elsewhere: {', '.join(behind)}" if behind else ""
        return f"rank {self.rank} on {self.facts['host']}: {check} failed: {reason}{others}"


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product whose rate is measured."""
    return a @ b


def _try(faults: list[str], action: Callable[[], Any]) -> None:
    try:
        action()
    except OSError as error:
        faults.append(str(error))


def compare_ranks(ranks: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Problems (a rank is wrong, slow or different) and warnings, from the facts of all ranks."""
    problems = [f"{_name(rank)}: {fault}" for rank in ranks for fault in rank["faults"]]
    for key, what, unit in (
        ("tflops", "matrix products", "TFLOP/s"),
        ("ring_gb_per_second", "transfers from the rank before it", "GB/s"),
        ("disk_mb_per_second", "writing to train.run_dir", "MB/s"),
    ):
        values = [rank[key] for rank in ranks if key in rank]
        # The middle and not the mean, which a single slow rank would pull down.
        middle = statistics.median_high(values) if values else 0.0
        problems += [
            f"{_name(rank)}: slow {what}: {rank[key]:.3g} {unit}, the middle rank has {middle:.3g}"
            for rank in ranks
            if rank.get(key, middle) < SLOW * middle
        ]
    for key in VERSIONS:
        values = [rank[key] for rank in ranks]
        # What most have is taken for right.
        usual = max(values, key=values.count)
        problems += [f"{_name(r)}: {key} {r[key]}, most have {usual}" for r in ranks if r[key] != usual]
    middle = statistics.median(rank["clock"] for rank in ranks)
    warnings = [
        f"{_name(rank)}: its clock is {rank['clock'] - middle:+.1f} s off; logs will not line up"
        for rank in ranks
        if abs(rank["clock"] - middle) > CLOCKS_SECONDS
    ]
    low = min((rank["free_gib"] for rank in ranks if "free_gib" in rank), default=FREE_GIB)
    if low < FREE_GIB:
        warnings.append(f"train.run_dir: {low:.1f} GiB are free; a checkpoint takes 12 bytes per parameter")
    return problems, warnings


def _name(rank: dict[str, Any]) -> str:
    return f"rank {rank['rank']} on {rank['host']}"


def table(ranks: list[dict[str, Any]]) -> str:
    """A line per rank."""
    lines = [f"{'rank':>4}  {'host':20}  {'device':24}  {'TFLOP/s':>8}  {'ring GB/s':>9}  {'disk MB/s':>9}"]
    for r in ranks:
        rates = [r.get(key) for key in ("tflops", "ring_gb_per_second", "disk_mb_per_second")]
        cells = [f"{rate:.3g}" if rate is not None else "-" for rate in rates]
        lines.append(
            f"{r['rank']:>4}  {r['host'][:20]:20}  {r['device'][:24]:24}  {cells[0]:>8}  {cells[1]:>9}  {cells[2]:>9}"
        )
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m megamm.preflight", description=__doc__)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--run-dir", metavar="DIR", help="folder that the run will write to")
    place.add_argument("--config", metavar="FILE", help="training config, for its train.run_dir")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE.json", help="also write everything measured there")
    return parser.parse_args()


def main() -> None:
    began = time.monotonic()
    arguments = parse_arguments()
    run_dir = Path(arguments.run_dir or load(arguments.config).train.run_dir)
    if arguments.out:
        check_out(arguments.out, folder=False)
    check_out(run_dir, folder=True, option="train.run_dir")
    available = torch.cuda.is_available()
    if arguments.device == "cuda" and not available:
        raise InputError("--device: cuda, but torch sees no CUDA device; give cpu or auto")
    device = torch.device("cpu")
    if available and arguments.device != "cpu":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    preflight = Preflight(run_dir, device)
    ranks = preflight.run()
    problems, warnings = compare_ranks(ranks)
    if preflight.rank == 0:
        seconds = time.monotonic() - began
        bus = ranks[0].get("all_reduce_gb_per_second")
        print(table(ranks))
        print(f"{len(ranks)} ranks, {seconds:.0f} s" + (f"; all-reduce {bus:.3g} GB/s of bus" if bus else ""))
        for warning in warnings:
            print(f"warning: {warning}")
        if arguments.out:
            report = {
                "fit": not problems,
                "problems": problems,
                "warnings": warnings,
                "seconds": seconds,
                "ranks": ranks,
            }
            write_json(arguments.out, report)
    if dist.is_initialized():
        # Rank 0 has printed before any rank ends: torchrun stops all when one fails.
        dist.barrier()
        dist.destroy_process_group()
    if problems:
        if preflight.rank:  # rank 0 speaks for all
            sys.exit(1)
        lines = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  {line}" for line in problems)]
        raise RunError("\n".join(lines))


def command() -> None:
    """:func:`main` under the exit-code contract; a rank ends without the interpreter's teardown (see train.leave)."""
    code: Any = 0
    try:
        exit_on_error(main)
    except SystemExit as end:
        code = end.code
    leave(code) if "RANK" in os.environ else sys.exit(code)


if __name__ == "__main__":
    command()
