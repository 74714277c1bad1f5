"""Kill a command at random moments, start it again, and compare what it leaves with an undisturbed run's."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

TIME_FIELDS = ("tokens_per_second", "flops_per_second", "loader_wait", "mfu")
# A resumed run's first line covers the steps since the checkpoint only.
WINDOW_FIELDS = ("padding",)


def run(command: list, log: Path) -> float:
    """Run to the end; returns the seconds that it took."""
    began = time.monotonic()
    with log.open("a") as file:
        code = subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=environment()).returncode
    assert code == 0, log.read_text()[-3000:]
    return time.monotonic() - began


def run_killed(make_command, rng: random.Random, kills: int, longest: float, log: Path) -> tuple[list[int], int]:
    """Kill -9 the command ``kills`` times, at up to ``longest`` seconds after its start, then let it end.

    Args:
        make_command: attempt number -> command; the number rises whenever an attempt ended before its kill.

    Returns:
        The attempts that ended (to compare) and the number of starts.
    """
    attempt, done, ended, starts = 0, 0, [], 0
    while done < kills:
        starts += 1
        with log.open("a") as file:
            process = subprocess.Popen(
                list(map(str, make_command(attempt))), stdout=file, stderr=file, env=environment()
            )
        try:
            code = process.wait(timeout=rng.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
        else:
            assert code == 0, log.read_text()[-3000:]
            ended.append(attempt)
            attempt += 1
    run(make_command(attempt), log)
    return [*ended, attempt], starts + 1


def environment() -> dict[str, str]:
    """The same number of threads every time: sums depend on it in the last bits."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def outcome(run_dir: Path) -> tuple[dict, list[dict]]:
    """What must be equal bit for bit: the result, and every logged value that is no time."""
    result = json.loads((run_dir / "result.json").read_text())
    result.pop("branch_from")  # differs with the folder
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    left_out = (*TIME_FIELDS, *WINDOW_FIELDS)
    return result, [{k: v for k, v in record.items() if k not in left_out} for record in records]
