"""Kill a random rank of a training, or stop the training, at many random moments; print what is lost.

    python tests/faults/kills.py [--ranks 4] [--kills 20] [--stops 20] [--steps 120] [--seed S]

Killed: SIGKILL to a random rank of a run under ``megamm.launch --max-restarts``, which starts all ranks again.
Stopped: SIGTERM to the launcher, which ends with exit code 75 and is started again, as a scheduler would.
Moments are drawn over the steps of the run; every fourth one strikes ranks that are starting. Exits with 1 where the
numbers of a run differ from those of an unbroken one in any bit, a kill costs more than a checkpoint interval and the
step beside which the checkpoint is written, or a stop costs a step.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests/faults", "tests/unit", "", "kernels", "laws")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from injection import MOST_LOST, STOPPED, TIMEOUT, launcher, numbers, steps_lost  # noqa: E402

UNTIL = 0.8
"""Share of the steps over which moments are drawn: the run must not end before its last one."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When to strike: some seconds after a step has been trained (or, at_start, after the ranks have been started)."""

    step: int
    seconds: float
    rank: int
    """Whose process is killed; a stop is the launcher's."""
    at_start: bool = False


@dataclass(kw_only=True)
class Report:
    """What became of a run.

    Attributes:
        struck: kills or stops that reached it.
        restarts: starts of the ranks after the first, by the launcher or by hand.
        lost: steps trained twice, the most of any restart.
        equal: whether all of its numbers are those of the unbroken run, bit for bit.
        loss: its final validation loss.
    """

    struck: int
    restarts: int
    lost: int
    equal: bool
    loss: float


def draw_moments(rng: random.Random, count: int, steps: int, ranks: int) -> list[Moment]:
    """Moments in the order of their steps."""
    at = sorted(rng.randrange(int(UNTIL * steps)) for _ in range(count))
    starts = set(rng.sample(range(1, count), count // 4)) if count > 1 else set()
    return [
        Moment(
            step=step,
            seconds=rng.uniform(0, 4 if i in starts else 0.3),
            rank=rng.randrange(ranks),
            at_start=i in starts,
        )
        for i, step in enumerate(at)
    ]


def disturb(folder: Path, moments: list[Moment], kind: str, expected: dict[str, Any], ranks: int, steps: int) -> Report:
    """Train in a folder with data to the end, struck at some moments; ``kind``: kill or stop.

    Raises:
        AssertionError: the training ends in another way than it should.
    """
    settings, log, starts = (f"--train.steps={steps}",), folder / "log.txt", 0
    environment = os.environ | {"FAULT": json.dumps([str(folder / "steps.txt"), -1, ""])}
    left, struck = list(moments), 0
    while True:
        command = launcher(folder, settings, ranks, restarts=len(moments))
        starts += 1
        with log.open("a") as file:
            process = subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=file, env=environment, start_new_session=True
            )
        try:
            gone: set[int] = set()  # processes of ranks that a kill has ended
            while left:
                found = _wait_for(process, folder, left[0], ranks, gone)
                if found is None:  # it has ended
                    break
                moment = left.pop(0)
                struck += 1
                if kind == "stop":
                    process.send_signal(signal.SIGTERM)
                    break
                os.kill(found[moment.rank], signal.SIGKILL)
                gone |= set(found)
            code = process.wait(timeout=4 * TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the ranks too
                process.wait()
        if code == 0:
            break
        # One that is told to stop before it can listen is ended by the signal.
        assert kind == "stop" and code in (*STOPPED, -signal.SIGTERM), f"{code}: {log.read_text()[-3000:]}"
    begun = (folder / "steps.txt").read_text().count("begin\n")
    got = numbers(folder)
    return Report(
        struck=struck,
        restarts=struck if kind == "kill" else starts - 1,
        lost=steps_lost(folder, 0) if begun > 1 else 0,
        equal=got == expected,
        loss=got["loss"],
    )


def _wait_for(process: subprocess.Popen, folder: Path, moment: Moment, ranks: int, gone: set[int]) -> list[int] | None:
    """Wait for a moment; the processes of the ranks then, None where the training has ended before."""
    deadline = time.monotonic() + 4 * TIMEOUT
    while process.poll() is None:
        assert time.monotonic() < deadline, f"no step {moment.step} of {ranks} ranks in {4 * TIMEOUT:g} s"
        found = ranks_of(process.pid)
        if len(found) == ranks and not gone & set(found) and (moment.at_start or _trained(folder) >= moment.step):
            time.sleep(moment.seconds)
            return found if process.poll() is None else None
        time.sleep(0.02)
    return None


def ranks_of(launcher_id: int) -> list[int]:
    """Processes of the ranks under a launcher, in the order in which they were started."""
    try:
        children = Path(f"/proc/{launcher_id}/task/{launcher_id}/children").read_text().split()
        return [int(child) for child in children if b"rank.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:  # one has ended meanwhile
        return []


def _trained(folder: Path) -> int:
    """The last step that was trained; -1 before the first."""
    path = folder / "steps.txt"
    steps = [int(line) for line in path.read_text().split() if line != "begin"] if path.exists() else []
    return steps[-1] if steps else -1


def make_data(folder: Path) -> None:
    """The data of a small run."""
    from dataset_factory import make_dataset

    for seed, kind in enumerate(("caption", "text")):
        make_dataset(folder / "data" / kind, kind=kind, num_documents=120, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=20, help="of ranks in one run (default: %(default)s)")
    parser.add_argument("--stops", type=int, default=20, help="of another run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    print(f"{args.ranks} ranks, {args.steps} steps, seed {args.seed}")
    bad = False
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name) / "unbroken"
        make_data(whole)
        disturb(whole, [], "kill", {}, args.ranks, args.steps)
        expected = numbers(whole)
        for kind, count, most in (("kill", args.kills, MOST_LOST), ("stop", args.stops, 0)):
            folder, began = Path(name) / kind, time.monotonic()
            shutil.copytree(whole / "data", folder / "data")
            moments = draw_moments(random.Random(f"{args.seed} {kind}"), count, args.steps, args.ranks)
            found = disturb(folder, moments, kind, expected, args.ranks, args.steps)
            print(
                f"{kind}: {found.struck} of {count} struck, {found.restarts} restarts, at most {found.lost} steps lost "
                f"(allowed {most}), final loss {found.loss!r} against {expected['loss']!r}, all numbers "
                f"{'equal' if found.equal else 'NOT equal'}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
            bad = bad or not found.equal or found.lost > most or found.struck < count
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
