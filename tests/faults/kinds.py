"""The list of faults: what goes wrong inside of a process, and which files are damaged before it starts."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from injection import BEGUN, EVERY, STEPS, Fault, Templates

NEWEST = BEGUN - 1
NEWEST_FOLDER = f"run/checkpoints/step-{NEWEST:08d}"

Damage = Callable[[Path, random.Random], None]


def flip(path: Path, rng: random.Random) -> None:
    """One bit anywhere."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(path: Path, _: random.Random) -> None:
    path.write_bytes(b"")


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(200))


def gone(path: Path, _: random.Random) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def says(text: str, path: Path, _: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def ends_with(text: str, path: Path, _: random.Random) -> None:
    with path.open("a") as file:
        file.write(text)


def of(pattern: str, damage: Damage) -> Damage:
    """A damage of the first file of the case's folder that matches."""

    def run(folder: Path, rng: random.Random) -> None:
        damage(sorted(folder.glob(pattern))[0], rng)

    return run


def all_faults(templates: Templates) -> list[Fault]:
    """Over 200, the same in every run."""
    return [*_processes(templates), *_checkpoints(), *_run_files(), *_places(), *_data(), *_ranks(), *_studies()]


def _ranks() -> list[Fault]:
    kind = partial(Fault, kind="a rank under a launcher", what="ranks")
    found = [
        kind(name=f"rank {rank} killed at {step}", wound=(rank, "signal_at", step, signal.SIGKILL))
        for rank, step in ((0, 2), (1, 5), (0, 9), (1, 14), (1, 19))
    ]
    found.append(kind(name="rank 0 told to stop", wound=(0, "signal_at", 7, signal.SIGTERM)))
    found.append(kind(name="rank 1 told to stop", wound=(1, "signal_at", 11, signal.SIGTERM)))
    found.append(kind(name="rank 0 killed while writing", wound=(0, "signal_at_file_call", 20, signal.SIGKILL)))
    told = partial(Fault, kind="ranks told unlike things", what="ranks")
    unlike = {
        "train.run_dir": "{run}-elsewhere",
        "optimizer.lr": "many",
        "data.row_length": "8",
        "model.colour": "red",
        "data.sources": "{{caption: {{path: {data}/caption}}, text: {{path: {data}/elsewhere}}}}",
    }
    for rank, (setting, value) in enumerate(unlike.items()):
        found.append(told(name=f"rank {rank % 2}: {setting}", wound=(rank % 2, "told_otherwise", setting, value)))
    return found


def _studies() -> list[Fault]:
    kind = partial(Fault, kind="a study", what="study")
    shares = {signal.SIGKILL: (0.3, 0.5, 0.7, 0.9), signal.SIGTERM: (0.4, 0.8), signal.SIGINT: (0.6,)}
    found = [
        kind(name=f"{number.name} at {share:.0%}", wound=(number, share, False))
        for number, some in shares.items()
        for share in some
    ]
    child = partial(Fault, kind="a study's training", what="study")
    for number, share in ((signal.SIGKILL, 0.4), (signal.SIGKILL, 0.8), (signal.SIGTERM, 0.5)):
        found.append(child(name=f"{number.name} at {share:.0%}", wound=(number, share, True)))
    return found


def _processes(templates: Templates) -> list[Fault]:
    found = [Fault(kind="killed at a step", name=str(s), wound=("signal_at", s, signal.SIGKILL)) for s in range(STEPS)]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        steps = range(0, STEPS, 3)
        found += [Fault(kind="told to stop", name=f"{number.name} {s}", wound=("signal_at", s, number)) for s in steps]
    for number in (signal.SIGKILL, signal.SIGTERM):
        found.append(Fault(kind="in validation", name=number.name, wound=("signal_in_validation", number)))
    calls = [1 + round(i * (templates.file_calls - 1) / 29) for i in range(30)]
    killed = partial(Fault, kind="killed while writing")
    found += [killed(name=str(call), wound=("signal_at_file_call", call, signal.SIGKILL)) for call in calls]
    found += [Fault(kind="full disk", name=str(call), wound=("full_disk_at", call)) for call in calls]
    found += [Fault(kind="NaN in weights", name=str(s), wound=("nan_at", s)) for s in (0, 5, 8, 19)]
    for jump in (-1e6, 1e6):
        found += [Fault(kind="clock jumps", name=f"{jump:g} {s}", wound=("clock_jumps_at", s, jump)) for s in (2, 11)]
    workers = ("--data.workers=1",)
    found += [
        Fault(kind="loader dies", name=str(s), wound=("loader_dies_at", s), settings=workers) for s in (1, 6, 13, 18)
    ]
    return found


def _checkpoints() -> list[Fault]:
    kind, found = partial(Fault, kind="newest checkpoint", begun=True), []
    for file in ("__0_0.distcp", ".metadata", "manifest.json", "state.json"):
        for damage in (flip, flip, flip, cut, cut, empty, garbage, gone):
            name = f"{file} {damage.__name__} {len(found)}"
            found.append(kind(name=name, damage=of(f"{NEWEST_FOLDER}/{file}", damage)))
    found.append(kind(name="whole folder", damage=of(NEWEST_FOLDER, gone)))
    pointer = partial(Fault, kind="latest", begun=True)
    texts = {
        "rewound": f"step-{NEWEST - EVERY:08d}",
        "nowhere": "step-00000099",
        "outside": "../../data",
        "words": "ab",
    }
    for name, text in texts.items():
        found.append(pointer(name=name, damage=of("run/checkpoints/latest", partial(says, text))))
    for damage in (flip, cut, empty, garbage, gone):
        found.append(pointer(name=damage.__name__, damage=of("run/checkpoints/latest", damage)))
    return found


def _run_files() -> list[Fault]:
    kind, found = partial(Fault, kind="files of a run", begun=True), []
    for damage in (flip, cut, empty, garbage, gone):
        for file in ("metrics.jsonl", "run.json", "config.yaml"):
            if (file, damage) == ("metrics.jsonl", flip):
                continue  # a changed digit in an old line of the log is not found, and nothing is computed from it
            found.append(kind(name=f"{file} {damage.__name__}", damage=of(f"run/{file}", damage)))
        found.append(kind(name=f"pack plan {damage.__name__}", damage=of("run/pack_plan/*", damage)))
    lines = {"a line of garbage": "\x00\xff garbage\n", "half a line": '{"step": 13, "lo'}
    for name, text in lines.items():
        found.append(kind(name=f"metrics.jsonl {name}", damage=of("run/metrics.jsonl", partial(ends_with, text))))
    found.append(kind(name="tensorboard gone", damage=of("run/tensorboard", gone)))
    found.append(kind(name="half a result", damage=lambda f, rng: says('{"steps": 2', f / "run/result.json", rng)))
    for name in ("step-00000099.partial", "step-00000012.partial", "notes", "step-abc"):
        place = f"run/checkpoints/{name}/file"
        found.append(kind(name=f"odd folder {name}", damage=lambda f, rng, place=place: says("x", f / place, rng)))
    place = "run/checkpoints/step-00000099/state.json"
    found.append(kind(name="a later folder", damage=lambda f, rng: says("{}", f / place, rng)))
    return found


def _make_way(place: str, folder: Path) -> None:
    gone(folder / place, random.Random())


def _places() -> list[Fault]:
    """What a run writes to is of another kind, read-only, or taken by another process."""
    found, kind = [], partial(Fault, kind="a place is taken")
    for name in ("run", "run/checkpoints", "run/pack_plan", "run/tensorboard"):
        damage = lambda f, rng, name=name: says("in the way", f / name, rng)  # noqa: E731
        found.append(kind(name=f"{name} is a file", damage=damage, mend=partial(_make_way, name)))
    for name in ("run/metrics.jsonl", "run/config.yaml", "run/run.json", "run/checkpoints/latest", "run/result.json"):
        damage = lambda f, rng, name=name: (f / name).mkdir(parents=True)  # noqa: E731
        found.append(kind(name=f"{name} is a folder", damage=damage, mend=partial(_make_way, name)))
    for step in (0, 6, 15):
        found.append(Fault(kind="read-only folder", name=str(step), wound=("read_only_from", step, "{run}")))
    for step in (2, 10):
        found.append(Fault(kind="two processes", name=str(step), wound=("second_process_at", step)))
    return found


def _other_data(folder: Path, _: random.Random) -> None:
    from dataset_factory import make_dataset

    make_dataset(folder / "data" / "text", kind="text", num_documents=120, seed=77)


def _data() -> list[Fault]:
    found = []
    for begun in (False, True):
        kind = partial(Fault, kind="prepared data", begun=begun)
        when = "resumed" if begun else "fresh"
        for damage in (flip, flip, flip, cut, empty, gone):
            for file in ("train/*.arrow", "train/lengths.npy", "dataset.json", "val/*.arrow"):
                name = f"{when} {file} {damage.__name__} {len(found)}"
                found.append(kind(name=name, damage=of(f"data/text/{file}", damage)))
        found.append(kind(name=f"{when} folder gone", damage=of("data/caption", gone)))
    found.append(Fault(kind="prepared data", name="other documents", begun=True, damage=_other_data))
    for workers in ("0", "1"):
        settings, kind = (f"--data.workers={workers}",), partial(Fault, kind="data lost in a run")
        shard = "{data}/text/train/shard-00000.arrow"
        for step in (3, 12):
            name = f"at {step}, {workers} workers"
            found.append(kind(name=f"cut {name}", wound=("file_cut_at", step, shard), settings=settings))
            found.append(kind(name=f"gone {name}", wound=("file_gone_at", step, shard), settings=settings))
    run = "{run}/checkpoints"
    found += [Fault(kind="folder lost in a run", name=str(s), wound=("folder_gone_at", s, run)) for s in (6, 14)]
    return found
