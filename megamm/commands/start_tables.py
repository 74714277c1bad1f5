"""What ``megamm-start`` found and proposes, as tables and warnings on stdout."""

from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from megamm.config import Config
from megamm.data.survey import Survey
from megamm.dry_run import GIB, run_memory
from megamm.study.propose import ProposedLadder, ProposedSetting, Speed, StudyProposal

REASONS = 3
"""Reasons of what is left out that are shown; preparation lists all."""


def print_found(found: Sequence[Survey], names: Sequence[str]) -> None:
    """A line per input."""
    table = Table(title="What was found")
    for head in ("source", "kind", "documents", "characters", "images", "left out"):
        table.add_column(head, justify="right" if head in ("documents", "characters", "images") else "left")
    for name, one in zip(names, found, strict=True):
        counts = (f"{count:,}" for count in (one.documents, one.characters, one.images))
        table.add_row(name, one.kind, *counts, left_out(one.skipped))
    Console().print(table)


def left_out(skipped: Mapping[str, int]) -> str:
    """How many inputs are left out, and the commonest reasons."""
    if not skipped:
        return "nothing"
    shown = [f"{count:,} x {reason}" for reason, count in list(skipped.items())[:REASONS]]
    more = len(skipped) - len(shown)
    return "; ".join(shown) + (f"; {more} other reasons" if more else "")


def print_proposal(
    setting: ProposedSetting,
    made: StudyProposal,
    config_of: Callable[[str, int, ProposedLadder], Config],
    known: Mapping[tuple[str, int, int], Speed],
) -> None:
    """Widths with their cost, budgets with how often they read the data, and the warnings.

    Args:
        config_of: the config of a model's longest run.
        known: measured speeds: architecture, width and depth to speed.
    """
    console = Console()
    table = Table(title=f"Models: depth {made.ladder.depth}, {setting.vocab_size:,} token ids")
    for head in ("architecture", "width", "parameters", "memory", "steps a second", "minutes"):
        table.add_column(head, justify="left" if head == "architecture" else "right")
    for (name, width), minutes in made.ladder_minutes.items():
        speed = known.get((name, width, made.ladder.depth))
        table.add_row(
            name,
            str(width),
            f"{setting.parameters(name, width, made.ladder):,}",
            f"{run_memory(config_of(name, width, made.ladder)) / GIB:.2f} GiB",
            f"{1 / speed.step:.1f}" if speed else "",
            f"{minutes:.1f}",
        )
    console.print(table)
    at_once = f"{setting.jobs} models train at a time" if setting.jobs > 1 else "One model trains at a time"
    console.print(f"{at_once}: about {made.minutes:.1f} minutes in all. Speed is measured where it is given.")
    table = Table(title="Budgets, and how often they read each source")
    for head in ("positions", "steps", *made.epochs):
        table.add_column(head, justify="right")
    for tokens in made.tokens:
        share = tokens / made.tokens[-1]
        read = (f"{times * share:.2g}" for times in made.epochs.values())
        table.add_row(f"{tokens:,}", f"{tokens // setting.batch:,}", *read)
    console.print(table)
    for text in made.warnings:
        console.print(f"[bold]Warning[/]: {text}", soft_wrap=True, highlight=False)
    if "late" not in setting.architectures:
        console.print(
            "There are no images: early fusion alone is trained, with no front end to compare.", soft_wrap=True
        )
