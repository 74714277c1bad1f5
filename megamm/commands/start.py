"""From your own pages to a first decision: look, tokenizer, data, a proposed study, training, laws, report.

Each DIR is a folder (or file) as megamm-prepare takes it: HTML or Markdown pages with their images, images with
captions, or text. Each step prints the command that does it alone. Run again, what is finished is skipped.

Example: megamm-start pages/ captions/ --out own --minutes 10
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from megamm_laws.arguments import ArgumentParser, not_negative
from rich.progress import Progress

from megamm.commands.start_tables import print_found, print_proposal
from megamm.commands.steps import console, is_trained, step, study_steps
from megamm.config import Config
from megamm.data.dataset_info import FILE, KINDS, read_dataset_info
from megamm.data.survey import Survey, first_texts, survey
from megamm.errors import InputError
from megamm.files import check_out, read_json, write_json, write_text
from megamm.sequence import patches_per_image
from megamm.study import propose
from megamm.study.first_study import source_names, study_yaml
from megamm.study.ladders import expand, read_study
from megamm.training.signals import exit_when_stopped
from megamm.yaml_text import parse_yaml

RECORD = "start.json"
SAMPLE_TEXTS = 200
"""Documents of each folder whose text tells how many tokens a character is."""
MOST_JOBS = 8


def main() -> None:
    arguments = parse_arguments()
    out, began = Path(arguments.out), time.monotonic()
    found = look_at_folders(arguments, out)
    print_found(found, found_names(found))
    device: propose.Device = "cuda" if _has_cuda() else "cpu"
    prepare_sources(arguments, out, found, device)
    plan = out / "study.yaml"
    if plan.exists():
        console.print("[bold]Study file[/]: done before")
        if _record(out).get("minutes") != arguments.minutes:
            console.print(
                f"  --minutes: {plan} was made for another time and stays as it is; remove it to get a new one"
            )
    else:
        write_study(arguments, out, found, device)
    if not is_trained(plan, out / "study") and not agreed(arguments, out):
        return
    summary = study_steps(
        plan,
        out / "study",
        out / "report",
        jobs=_jobs(device),
        seed=arguments.seed,
        warnings=out / "fit-warnings.txt",
    )
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.")
    # Without a comparison the first sentence says only that there is none.
    print(" ".join(summary["sentences"][:2] if summary["comparisons"] else summary["sentences"][-2:]))
    print(f"Report: {out / 'report' / 'index.html'}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="DIR", help="folder or file of your own pages, captions or text; one kind in each")
    add("--out", default="own", metavar="DIR", help="folder for all that is made (default: %(default)s)")
    add("--minutes", type=float, default=10.0, metavar="M", help="time for training (default: 10)")
    add("--yes", action="store_true", help="train without asking")
    add("--kind", choices=("auto", *KINDS), default="auto", help="which files to read; auto: the kind of each DIR")
    add("--seed", type=not_negative, default=0, help="of the data order, first weights and intervals (default: 0)")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < 1e6:
        parser.error(f"--minutes: {arguments.minutes:g} is not a number above 0")
    check_out(arguments.out, folder=True)
    out = Path(arguments.out).resolve()
    for number, name in enumerate(arguments.inputs):
        path = Path(name).resolve()
        if name.startswith("scenes:"):
            parser.error(f"{name}: a generator, not data of your own; `make demo` trains on scenes")
        if path in [Path(other).resolve() for other in arguments.inputs[:number]]:
            parser.error(f"{name}: given twice")
        if out.is_relative_to(path) or path.is_relative_to(out):
            parser.error(f"--out: {arguments.out} and {name} lie in each other; give a folder elsewhere")
    return arguments


def look_at_folders(arguments: argparse.Namespace, out: Path) -> list[Survey]:
    """What each input holds, from the record of an earlier call or by reading all of it."""
    asked = {"inputs": [str(Path(name).resolve()) for name in arguments.inputs], "kind": arguments.kind}
    record = _record(out)
    if record:
        if {key: record.get(key) for key in asked} != asked:
            listed = ", ".join(map(str, record.get("inputs", [])))
            raise InputError(f"--out: {out} was made from {listed}; give another folder, or remove it")
        console.print("[bold]Look[/]: done before")
        return [Survey(**entry) for entry in record["found"]]
    if out.exists() and any(out.iterdir()):
        raise InputError(f"--out: {out} is not empty and not made by this command; give another folder")
    console.print("[bold]Look[/]")
    found = []
    with Progress(console=console, transient=True) as progress:
        for name in arguments.inputs:
            bar = progress.add_task(f"reading {name}", total=None)
            update = _updater(progress, bar)
            found.append(survey(name, arguments.kind, update))
            if found[-1].documents < 2:
                raise InputError(
                    f"{name}: {found[-1].documents} document with text, and 2 are needed: one to train on and one to "
                    "test with. Split it into several files, or give more"
                )
    write_json(out / RECORD, asked | {"found": [asdict(one) for one in found]})
    return found


def _updater(progress: Progress, bar) -> Callable[[int, int | None], None]:
    return lambda done, total: progress.update(bar, completed=done, total=total)


def prepare_sources(arguments: argparse.Namespace, out: Path, found: list[Survey], device: propose.Device) -> None:
    """Tokenizer and prepared sources below ``out``."""
    tokenizer = out / "tokenizer.json"
    characters = sum(one.characters for one in found)
    kind = () if arguments.kind == "auto" else ("--kind", arguments.kind)
    vocab_size = propose.vocabulary(characters, arguments.minutes, device)
    words = (*arguments.inputs, *kind, "--vocab-size", vocab_size, "--out", tokenizer)
    step("Tokenizer", "megamm-tokenizer", *words, done=tokenizer.exists())
    paths = source_paths(out, found)
    todo = [path for path in paths.values() if not (path / FILE).exists()]
    options = _data_options(found, tokenizer, device) if todo else {}
    for (name, path), one in zip(paths.items(), found, strict=True):
        words = tuple(word for option in options.get(name, {}).items() for word in option)
        words = (one.path, *kind, "--out", path, "--tokenizer", tokenizer, *words)
        step(f"Data: {name}", "megamm-prepare", *words, done=path not in todo)


def _data_options(found: list[Survey], tokenizer: Path, device: propose.Device) -> dict[str, dict[str, object]]:
    """Options of megamm-prepare for each source."""
    from megamm.data.tokenizer import Tokenizer

    encode = Tokenizer(tokenizer).encode
    sides = [one.image_side for one in found if one.images]
    image_size, patch_size = propose.image_sizes(sum(one.images for one in found), max(sides, default=0), device)
    patches = patches_per_image(image_size, patch_size)
    tokens, positions = {}, []
    for name, one in zip(found_names(found), found, strict=True):
        texts = first_texts(one.path, one.kind, SAMPLE_TEXTS)
        rate = sum(len(encode(text.encode(errors="replace").decode())) for text in texts) / sum(map(len, texts))
        tokens[name] = rate * one.characters
        positions += [2 + rate * characters + images * (patches + 1) for characters, images in one.sizes]
    length = propose.piece_length(positions, patches if sides else 0, device)
    shared = {"--image-size": image_size, "--patch-size": patch_size, "--max-length": length}
    return {name: {**shared, "--val-fraction": propose.val_fraction(count)} for name, count in tokens.items()}


def found_names(found: list[Survey]) -> list[str]:
    """Names of the sources."""
    return source_names([one.path for one in found])


def source_paths(out: Path, found: list[Survey]) -> dict[str, Path]:
    """Folder of each prepared source."""
    return {name: out / "data" / name for name in found_names(found)}


def write_study(arguments: argparse.Namespace, out: Path, found: list[Survey], device: propose.Device) -> None:
    """Propose widths and budgets from the data and the measured speed, and write study.yaml."""
    from megamm.study.speed import speed_test

    console.print("[bold]Study file[/]: some steps of small and large models, to know how fast they train here")
    paths, jobs = source_paths(out, found), _jobs(device)
    with speed_test(jobs) as test:
        setting = make_setting(paths, arguments.minutes, device, jobs, test.start)
        known: dict[tuple[str, int, int], propose.Speed] = {}
        details = {
            "name": f"own data: {', '.join(paths)}",
            "paths": paths,
            "seed": arguments.seed,
            "device": device,
            "command": _go_on(arguments),
        }

        def config_of(architecture: str, width: int, ladder: propose.ProposedLadder) -> Config:
            """That of the longest run of a model, as the study will have it."""
            draft = propose.draft(setting, ladder)
            values = parse_yaml(study_yaml(setting, draft, **details), where="study.yaml")
            return expand(values, out / "study").ladders[f"{architecture}-w{width:04d}-default"][-1].config

        def measure(architecture: str, width: int, ladder: propose.ProposedLadder) -> propose.Speed:
            key = (architecture, width, ladder.depth)
            if key not in known:
                config = config_of(architecture, width, ladder)
                config.train.branch_from = None
                known[key] = test.measure(config)
            return known[key]

        made = propose.propose_study(setting, measure)
    print_proposal(setting, made, config_of, known)
    content = study_yaml(setting, made, **details)
    expand(parse_yaml(content, where="study.yaml"), out / "study")  # never write what the next step would refuse
    write_text(out / "study.yaml", content)
    plan = {"sha256": _digest(content), "runs": made.num_runs, "minutes": made.minutes}
    write_json(out / RECORD, _record(out) | {"minutes": arguments.minutes, "plan": plan})
    console.print(
        f"  {shlex.join(['megamm-study', str(out / 'study.yaml'), '--out', str(out / 'study'), '--dry-run'])}"
    )


def make_setting(
    paths: dict[str, Path], minutes: float, device: propose.Device, jobs: int, start: float
) -> propose.ProposedSetting:
    """What the prepared data decide.

    Raises:
        InputError: all documents of a source are the same, so that none is left for validation.
    """
    infos = {name: read_dataset_info(path) for name, path in paths.items()}
    sources = []
    for name, info in infos.items():
        train, val = info["splits"]["train"], info["splits"].get("val")
        if val is None:
            raise InputError(f"{paths[name]}: all documents are the same, and none is left for validation; give others")
        positions, val_positions = (split["num_text_tokens"] + split["num_patches"] for split in (train, val))
        sources.append(
            propose.Source(
                name=name,
                positions=positions,
                val_positions=val_positions,
                val_text_tokens=val["num_text_tokens"],
                num_repeats=info["num_repeats"],
            )
        )
    first = next(iter(infos.values()))
    images = any(info["splits"]["train"]["num_images"] for info in infos.values())
    row_length = max(info["max_length"] for info in infos.values())
    return propose.ProposedSetting(
        architectures=("early", "late") if images else ("early",),
        baseline="text" if images else None,
        sources=tuple(sources),
        minutes=minutes,
        jobs=jobs,
        start=start,
        vocab_size=first["vocab_size"],
        image_size=first["image_size"],
        patch_size=first["patch_size"],
        row_length=row_length,
        batch_rows=propose.batch_rows(sources, row_length, minutes, device),
        eval_rows=propose.eval_rows(sources, row_length),
    )


def agreed(arguments: argparse.Namespace, out: Path) -> bool:
    """Whether to train: by --yes, or as a person on the terminal says."""
    path = out / "study.yaml"
    runs = [run for run in expand(read_study(path), out / "study", where=str(path)).runs if not run.trunk]
    plan = _record(out).get("plan") or {}
    same = plan.get("sha256") == _digest(path.read_text(encoding="utf-8"))
    time_ = f"about {plan['minutes']:.1f} minutes" if same else "in a time that nobody has foretold: it was edited"
    if arguments.yes:
        console.print(f"  {len(runs)} models, {time_}")
        return True
    question = f"Train these {len(runs)} models, {time_}? [y/N] "
    if sys.stdin.isatty() and sys.stdout.isatty() and input(question).strip().lower() in ("y", "yes"):
        return True
    print(f"{path}: {len(runs)} models, {time_}. To train them:\n  {_go_on(arguments)}")
    return False


def _go_on(arguments: argparse.Namespace) -> str:
    """The command that trains what was proposed."""
    words = ["megamm-start", *arguments.inputs, "--out", arguments.out, "--minutes", f"{arguments.minutes:g}"]
    words += [] if arguments.kind == "auto" else ["--kind", arguments.kind]
    words += ["--seed", str(arguments.seed)] if arguments.seed else []
    return shlex.join([*words, "--yes"])


def _record(out: Path) -> dict:
    """What an earlier call noted; empty where there was none."""
    return read_json(out / RECORD) if (out / RECORD).exists() else {}


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _jobs(device: propose.Device) -> int:
    """Ladders trained at a time: one on a GPU, one for each core otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if device == "cuda" else min(MOST_JOBS, cores)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract, and 75 where a signal stopped it."""
    exit_when_stopped(main)
