"""A study that has changed since it was trained: what is on disk is taken up, what it no longer has is set aside.

Nothing is deleted. Runs that a study no longer has stay where they are and count no longer; an unfinished run of
other settings is moved to ``set_aside/``, so that it can be trained anew. study.json names and counts both.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from megamm.errors import InputError
from megamm.files import write_text
from megamm.settings import merge
from megamm.study.ladders import Run, Study
from megamm.yaml_text import read_yaml

MANIFEST = "manifest.json"
"""Without it a checkpoint is not whole (training/checkpoint.py, which imports torch)."""
SET_ASIDE = "set_aside"
REASON_FILE = "set_aside.txt"
REMOVED = "no longer in the study"


def finished_result(run: Run) -> dict[str, Any] | None:
    """The result.json of a run that is trained to its end; None for one that is not, or is to be lengthened.

    Raises:
        InputError: it is damaged.
    """
    path = Path(run.config.train.run_dir) / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return result if result["steps"] >= run.steps else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the result of a run ({error}); delete it, and the run ends again") from error


def take_up(study: Study) -> None:
    """Let the runs of a study go on from what earlier calls have trained, in place.

    A trunk never gets shorter and keeps its branch points. A run stays what it was begun as, a branch or a run from
    the start: both give the same numbers. A branch whose point its trunk has passed unsaved leaves it earlier and
    repeats the steps between.
    """
    for runs in study.ladders.values():
        trunk = runs[0] if runs[0].trunk else None
        if trunk:
            _take_up_trunk(trunk)
        for run in runs[1:] if trunk else runs:
            _take_up_branch(run, trunk)


def _take_up_trunk(trunk: Run) -> None:
    old = _begun(trunk)
    if old:
        _change(trunk, "train", steps=max(trunk.steps, old["train"]["steps"]))
        points = {*trunk.config.checkpoint.steps, *old["checkpoint"]["steps"]}
        _change(trunk, "checkpoint", steps=sorted(points))


def _take_up_branch(run: Run, trunk: Run | None) -> None:
    old = _begun(run)
    if old:
        before, now = old["train"]["branch_from"], run.config.train.branch_from
        # A finished study may have been moved: its branches then name the trunk by its former place.
        moved = before and finished_result(run) and Path(before).parts[-2:] == (run.ladder, f"{run.ladder}-trunk")
        if before is None or now is None or moved:
            _change(run, "train", branch_from=before)
            run.start = run.start if before else 0
    elif trunk and run.config.train.branch_from:
        kept = _kept_steps(trunk)
        if kept and kept[-1] >= run.start:  # else the trunk is yet to reach it, and saves there
            early = [step for step in kept if step <= run.start]
            run.start = max(early, default=0)
            if not early:
                _change(run, "train", branch_from=None)


def _kept_steps(trunk: Run) -> list[int]:
    """Steps of the checkpoints of a trunk, in order."""
    # Those that are half-written or set aside do not end, or begin, so.
    folders = (Path(trunk.config.train.run_dir) / "checkpoints").glob("step-*[0-9]")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders if (folder / MANIFEST).exists())


def _begun(run: Run) -> dict | None:
    """The settings that a run was begun with; None where it was not."""
    path = Path(run.config.train.run_dir) / "config.yaml"
    return read_yaml(path) if path.exists() else None


def _change(run: Run, section: str, **values: Any) -> None:
    for key, value in values.items():
        # In both: ``values`` is written for the process that trains, ``config`` is what is read here.
        setattr(getattr(run.config, section), key, value)
    merge(run.values, {section: values})


def move_aside(run: Run, out: Path, reason: str) -> None:
    """Move a run directory below ``out``/set_aside, to a name that is free, and leave the reason there."""
    folder = out / SET_ASIDE / run.ladder
    folder.mkdir(parents=True, exist_ok=True)
    place = next(p for p in (folder / f"{run.name}-{n}" for n in itertools.count(1)) if not p.exists())
    os.rename(run.config.train.run_dir, place)
    write_text(place / REASON_FILE, reason + "\n")


def list_set_aside(study: Study, out: Path) -> list[dict[str, Any]]:
    """Every run directory below ``out`` that is not of the study: name, dir (relative to ``out``), reason, finished."""
    own = {out / "runs" / run.ladder / run.name for run in study.runs}
    places = [*out.glob("runs/*/*/config.yaml"), *out.glob(f"{SET_ASIDE}/*/*/config.yaml")]
    found = []
    for place in sorted(path.parent for path in places if path.parent not in own):
        written, done = place / REASON_FILE, (place / "result.json").exists()
        reason = written.read_text(encoding="utf-8").strip() if written.exists() else REMOVED
        found.append({"name": place.name, "dir": str(place.relative_to(out)), "reason": reason, "finished": done})
    return found


def make_way(run: Run, out: Path) -> str | None:
    """Make way for a run, if the directory that it needs holds one of other settings.

    Returns:
        None where there is nothing in the way, else why the unfinished run there was moved aside.

    Raises:
        InputError: the run there is finished.
        RunError: it is still being trained.
    """
    from megamm.training import run_dir  # takes torch along, which --dry-run does not need

    place = Path(run.config.train.run_dir)
    changed = run_dir.changed_settings(place, run.config)
    if not changed:
        return None
    differences = "; ".join(changed)
    reason = f"unfinished, with other settings ({differences})"
    if (place / "result.json").exists():
        raise InputError(
            f"{place}: finished with other settings ({differences}); restore them in the study, or give the changed "
            "study another --out, or move this folder out of the study to train it anew"
        )
    with run_dir.lock(place, patience=2.0):
        move_aside(run, out, reason)
    return reason
