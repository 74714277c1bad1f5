"""Runs that are disturbed, begun again as a scheduler would, and compared with an undisturbed one.

Three things are disturbed: a training process, a training of two ranks under a launcher that restarts, and a study.
A fault wounds the first process of a run from inside (wounds.py) or damages files of a run that was begun (kinds.py).
Then the run is started again until it ends: by itself where it was killed or stopped, after the files have been put
back where it refuses with an error. Every process notes the steps that it trained, from which lost steps follow.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS, EVERY = 20, 4
BEGUN = 13
"""Steps of a run, its checkpoint interval, and where the run that gets damaged was killed."""
MOST_LOST = EVERY + 1
"""Steps that a fault may cost: an interval, and the step beside which the checkpoint is written."""
TIMEOUT = 90.0
RESTARTS = 4
STOPPED = (75, 130)


@dataclass(kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        what: run, ranks or study.
        wound: name of a function of wounds.py and its arguments; ``{data}`` and ``{run}`` stand for folders. For ranks
            the wounded rank comes first; for a study it is a signal, when it is sent, as a share of the whole time, and
            whether it is sent to one of its trainings alone.
        damage: called with the case's folder and a random generator, before the process starts.
        mend: what a person does to the case's folder after an error, besides putting back data and settings.
        begun: whether the run has been trained up to a kill before step 13.
        settings: overrides of the config.
    """

    kind: str
    name: str
    what: str = "run"
    wound: tuple | None = None
    damage: Callable[[Path, random.Random], None] | None = None
    mend: Callable[[Path], None] | None = None
    begun: bool = False
    settings: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Outcome:
    """What became of a fault.

    Attributes:
        state: survived; hands: an error of one line named it, and after the files were put back the run ended as it
            should; wrong: it ended with other numbers and no error; hung; crashed: a traceback, or it never ends.
        lost: steps trained twice, the most of any restart of any run.
        note: the error, or what differs.
    """

    fault: Fault
    state: str
    lost: int = 0
    note: str = ""


@dataclass
class Templates:
    """Prepared data, an undisturbed run and one that was killed; cases work on copies."""

    folder: Path
    expected: dict[str, Any] = field(default_factory=dict)
    file_calls: int = 0
    study_seconds: float = 0.0

    @classmethod
    def make(cls, folder: Path) -> "Templates":
        from dataset_factory import make_dataset

        for seed, kind in enumerate(("caption", "text")):
            make_dataset(folder / "begun" / "data" / kind, kind=kind, num_documents=120, seed=seed)
        shutil.copytree(folder / "begun", folder / "fresh")
        shutil.copytree(folder / "begun", folder / "whole")
        made = cls(folder)
        if train(folder / "whole", ("count_file_calls", str(folder / "calls"))).code:
            raise AssertionError((folder / "whole" / "log.txt").read_text())
        made.expected["run"] = numbers(folder / "whole")
        made.file_calls = int((folder / "calls").read_text())
        train(folder / "begun", ("killed_when_saved", BEGUN))
        for name in ("log.txt", "steps.txt"):
            (folder / "begun" / name).unlink()
        return made

    def make_larger(self) -> None:
        """An undisturbed training of two ranks, and an undisturbed study; they take longer."""
        for what, start in (("ranks", launch), ("study", study)):
            folder = self.folder / what
            shutil.copytree(self.folder / "fresh", folder)
            began = time.monotonic()
            ended = start(folder)
            if ended.code:
                raise AssertionError(ended.words)
            self.expected[what] = numbers(folder)
            self.study_seconds = time.monotonic() - began


def numbers(folder: Path) -> dict[str, Any]:
    """The numbers of a run, or of all runs of a study."""
    runs = sorted((folder / "study").glob("runs/*/*/result.json")) if (folder / "study").exists() else []
    return {path.parent.name: _numbers(path.parent) for path in runs} or _numbers(folder / "run")


def _numbers(run: Path) -> dict[str, Any]:
    """All that a run's numbers are: losses and gradient norms of steps, validation losses, tokens."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    records = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
    return {"records": records, **{name: result[name] for name in ("losses", "loss", "tokens", "flops", "steps")}}


def overrides(folder: Path) -> list[str]:
    """A tiny run of 20 steps in a case's folder."""
    sources = ", ".join(f"{kind}: {{path: {folder}/data/{kind}}}" for kind in ("caption", "text"))
    settings = {
        "model.width": 16,
        "model.depth": 1,
        "model.head_dim": 8,
        "model.hidden_multiple": 8,
        "data.row_length": 64,
        "data.window_tokens": 2000,
        "data.workers": 0,
        "data.sources": f"{{{sources}}}",
        "optimizer.lr": 0.003,
        "schedule.warmup_steps": 3,
        "train.steps": STEPS,
        "train.batch_rows": 4,
        "train.log_every": 1,
        "train.device": "cpu",
        "train.run_dir": folder / "run",
        "eval.rows": 4,
        "eval.every": 7,
        "checkpoint.every": EVERY,
        "checkpoint.keep": 2,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (minus the signal), None for one that had to be killed, and its last words."""

    code: int | None
    words: str


def train(folder: Path, wound: tuple | None = None, settings: tuple[str, ...] = ()) -> Ended:
    """One training process; it is forked from a server that has imported torch."""
    log = folder / "log.txt"
    log.write_text("")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megamm.trainer", "megamm.train"])
    process = context.Process(target=_train, args=([*overrides(folder), *settings], wound, folder))
    process.start()
    process.join(TIMEOUT)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    return Ended(None if hung else process.exitcode, log.read_text())


def launch(folder: Path, wound: tuple | None = None, settings: tuple[str, ...] = ()) -> Ended:
    """Two ranks under a launcher that restarts them."""
    command = launcher(folder, settings, ranks=2, restarts=1)
    rank, *rest = wound or (-1, "")
    fault = [str(folder / "steps.txt"), rank, *placed(rest, folder)]
    return _call(command, {"FAULT": json.dumps(fault)})


def launcher(folder: Path, settings: tuple[str, ...], ranks: int, restarts: int) -> list:
    """The command that trains in a case's folder on some ranks; FAULT says what becomes of them (rank.py)."""
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    rank = Path(__file__).with_name("rank.py")
    return [sys.executable, "-m", "megamm.launch", *options, rank, *overrides(folder), *settings]


def study(folder: Path, wound: tuple | None = None, settings: tuple[str, ...] = ()) -> Ended:
    """A small study; ``wound``: a signal, the seconds after which it is sent, and whether to one training alone."""
    values = {
        "name": "tiny",
        "base": {
            "model": {"depth": 1, "head_dim": 8, "hidden_multiple": 8},
            "data": {
                "sources": {kind: {"path": str(folder / "data" / kind)} for kind in ("caption", "text")},
                "row_length": 64,
                "window_tokens": 2000,
            },
            "schedule": {"warmup_steps": 3, "cooldown_fraction": 0.25},
            "train": {"batch_rows": 4, "log_every": 1, "device": "cpu"},
            "eval": {"rows": 4},
            "checkpoint": {"every": EVERY, "keep": 1, "final": False},
        },
        "architectures": ["early", "late"],
        "widths": [16],
        "tokens": [64 * 4 * STEPS, 64 * 4 * 2 * STEPS],
    }
    (folder / "study.yaml").write_text(json.dumps(values))
    tool = Path(__file__).parents[2] / "tools" / "run_study.py"
    command = [sys.executable, tool, folder / "study.yaml", "--out", folder / "study", "--jobs", "2", *settings]
    return _call(command, {}, wound)


def _call(command: list, environment: dict[str, str], wound: tuple | None = None) -> Ended:
    """A command as a process of its own, which may get a signal after some seconds."""
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,
    ) as process:
        try:
            if wound:
                number, seconds, to_one = wound
                with suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
                if to_one:
                    _signal_a_training(process.pid, number)
                else:
                    process.send_signal(number)
            words = process.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return Ended(None, process.communicate()[0])
    return Ended(process.returncode, words)


def _signal_a_training(study: int, number: int) -> None:
    """Send a signal to the first training that a study has begun and not ended; waits for one."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended meanwhile
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == study and b"megamm.study.child" in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), number)
                    return
        time.sleep(0.05)
    raise AssertionError("the study began no training")


def placed(arguments: list | tuple, folder: Path) -> list:
    """Arguments of a wound with the case's folders in place of their names."""
    places = {"data": folder / "data", "run": folder / "run"}
    return [a.format(**places) if isinstance(a, str) else a for a in arguments]


def note_steps(path: Path) -> None:
    """Let this process append the steps that it trains to a file, after a line that says that it began."""
    from megamm.trainer import Trainer

    train_step, steps = Trainer.train_step, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(steps, b"begin\n")

    def noted(self, batches):
        found = train_step(self, batches)
        if self.step % EVERY == 1:
            time.sleep(0.15)  # as in a real run, a step takes longer than writing a checkpoint beside it
        os.write(steps, f"{self.step}\n".encode())
        return found

    Trainer.train_step = noted


START = {"run": train, "ranks": launch, "study": study}


def _train(arguments: list[str], wound: tuple | None, folder: Path) -> None:
    import torch
    import wounds

    import megamm.train

    torch.set_num_threads(1)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["train.py", *arguments]
    note_steps(folder / "steps.txt")
    if wound and wound[0] == "count_file_calls":
        _count_file_calls(Path(wound[1]))
    elif wound:
        name, *args = wound
        getattr(wounds, name)(*placed(args, folder))
    megamm.train.command()


def _count_file_calls(path: Path) -> None:
    """Leave at the end how many of the calls there were."""
    import atexit

    import wounds

    seen = [0]

    def counted(call):
        def run(*args, **kwargs):
            seen[0] += 1
            return call(*args, **kwargs)

        return run

    for owner, name in wounds.FILE_CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    # A forked process ends without atexit's functions.
    leave = sys.exit

    def note(code=0):
        path.write_text(str(seen[0]))
        leave(code)

    sys.exit = note
    atexit.unregister(note)


def inject(fault: Fault, templates: Templates, folder: Path, seed: int = 0) -> Outcome:
    """Let one thing go wrong in a copy of a template, and see what becomes of the run."""
    source = templates.folder / ("begun" if fault.begun else "fresh")
    shutil.copytree(source, folder)
    for path in folder.rglob("config.yaml"):  # it names the folders of the template
        path.write_text(path.read_text().replace(str(source), str(folder)))
    newest = BEGUN - 1 if fault.begun else 0
    if fault.damage:
        fault.damage(folder, random.Random(f"{seed} {fault.kind} {fault.name}"))
    hands, wound, note, lost, told = 0, fault.wound, "", 0, ""
    if fault.what == "study" and fault.wound:
        number, share, to_one = fault.wound
        wound = number, share * templates.study_seconds, to_one
    for _ in range(RESTARTS):
        ended = START[fault.what](folder, wound, fault.settings)
        lost = max(lost, _behind(folder) if fault.what == "study" else steps_lost(folder, newest))
        newest, wound, told = 0, None, told + ended.words
        if ended.code is None:
            return Outcome(fault=fault, state="hung", lost=lost, note=ended.words[-300:])
        if ended.code == 0:
            return _judge(fault, templates, folder, hands, lost, note, told)
        if ended.code < 0 or ended.code in STOPPED:
            continue
        note = next((line for line in reversed(ended.words.splitlines()) if line.startswith("error: ")), "")
        if "Traceback" in ended.words or not note:
            return Outcome(fault=fault, state="crashed", lost=lost, note=ended.words[-1500:])
        hands += 1
        _put_back(source, folder, note)
        if fault.mend:
            fault.mend(folder)
    return Outcome(fault=fault, state="crashed", lost=lost, note=f"it never ends: {note}")


def steps_lost(folder: Path, newest: int) -> int:
    """Steps trained again, the most of any restart; ``newest``: of the checkpoint that the first should go on from."""
    if not (folder / "steps.txt").exists():
        return 0
    done, lost = newest, 0
    for part in (folder / "steps.txt").read_text().split("begin\n")[1:]:
        steps = [int(step) for step in part.split()]
        if steps:
            lost, done = max(lost, done - steps[0] + 1), max(done, steps[-1])
    return lost


def _behind(folder: Path) -> int:
    """Steps by which the checkpoints of a study's unfinished runs are behind their logs, the most of any run."""
    most = 0
    for log in (folder / "study").glob("runs/*/*/metrics.jsonl"):
        pointer = log.parent / "checkpoints" / "latest"
        # A branch has no checkpoint before its first: it begins with its trunk's, and so does its log.
        if (log.parent / "result.json").exists() or not pointer.exists():
            continue
        lines = log.read_text().splitlines()
        most = max(most, json.loads(lines[-1])["step"] - int(pointer.read_text().split("-")[1]) if lines else 0)
    return most


def _put_back(source: Path, folder: Path, note: str) -> None:
    """What a person does after the error ``note``: restore data and settings, and leave what training wrote."""
    shutil.copytree(source / "data", folder / "data", dirs_exist_ok=True)
    result = folder / "run" / "result.json"
    if str(result) in note and result.is_file():  # the advice is to delete it
        result.unlink()
    for name in ("config.yaml", "run.json"):
        if (source / "run" / name).exists():
            text = (source / "run" / name).read_text().replace(str(source), str(folder))
            (folder / "run" / name).write_text(text)


def _judge(fault: Fault, templates: Templates, folder: Path, hands: int, lost: int, note: str, told: str) -> Outcome:
    found, expected = numbers(folder), templates.expected[fault.what]
    if fault.what != "study" and "has no line of steps" in told:  # a log that was lost, and a warning said so
        expected = expected | {"records": {s: expected["records"][s] for s in found["records"]}}
    if found != expected and fault.what == "study":
        wrong = [name for name in expected if found.get(name) != expected[name]]
        return Outcome(fault=fault, state="wrong", lost=lost, note=f"runs that differ: {', '.join(wrong)}")
    if found != expected:
        wrong = [s for s in expected["records"] if found["records"].get(s) != expected["records"][s]]
        text = f"{len(wrong)} of {STEPS} steps differ, first {wrong[0]}" if wrong else "validation differs"
        return Outcome(fault=fault, state="wrong", lost=lost, note=text)
    return Outcome(fault=fault, state="hands" if hands else "survived", lost=lost, note=note)


def seconds_since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"
