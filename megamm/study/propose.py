"""Sizes of a first study, from what the data hold and how fast the machine is: pure functions, nothing is read.

The order is that of ``megamm-start``: vocabulary, images and pieces before preparation; then the mixture, the budget of
the longest run and the widths, from the prepared counts and a measured speed. The numbers are those of the demo's
ladders (docs/lab-log/studies.md), stretched by simple rules; each is a start and can be edited in the study's YAML.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from megamm.config import ModelConfig
from megamm.model.counts import count_parameters
from megamm.model.sizes import resolve_model
from megamm.resolve import MOST_EPOCHS, times_read

Device = Literal["cpu", "cuda"]

SMALLEST_VOCAB, LARGEST_VOCAB = 512, 32_000
CPU_CHARACTERS_PER_MINUTE = 800_000
"""Text that the longest run sees for each minute of a study on a few cores: the demo's two million tokens in ten."""
LENGTHS = {"cpu": (128, 256, 512), "cuda": (128, 256, 512, 1024, 2048)}
"""Row lengths to choose from; on few cores a step of long rows would take long, and be one of few."""
WHOLE_SHARE = 0.9
"""Share of all positions that should lie in documents that need no cutting."""
VAL_TOKENS = 20_000
"""Text tokens of validation to aim at: the mean loss of so many is sure to about 0.01 nats."""
FEW_VAL_TOKENS = 4_000
LEAST_STEPS, GOOD_STEPS = 120, 400
"""Steps of the longest run: the fewest that can be trained at all, and the fewest that are worth a look."""
STEPS = 2_000
"""Steps of the longest run to aim at."""
TOKENS_PER_PARAMETER = 10
"""Positions for each parameter of the largest model of a ladder that is wider than the demo's."""
COOLDOWN = 0.2
WARMUP_STEPS = 40
IMBALANCE = 1.1
"""How much longer ladders take than if their work were spread evenly over the jobs."""


def vocabulary(characters: int, minutes: float, device: Device) -> int:
    """Number of token ids: about the root of the characters that will be trained on, a power of two.

    Small models spend most of their parameters on the two tables of the vocabulary, so little text, or little time to
    train on it, asks for few ids.
    """
    seen = min(characters, CPU_CHARACTERS_PER_MINUTE * minutes) if device == "cpu" else characters
    size = 2 ** round(math.log2(max(1.0, seen) ** 0.5))
    return int(min(LARGEST_VOCAB, max(SMALLEST_VOCAB, size)))


def image_sizes(images: int, image_side: int, device: Device) -> tuple[int, int]:
    """Image size and patch size in pixels: 16 to 64 patches an image, 256 for very many on a GPU.

    Args:
        images: in all sources.
        image_side: their median longer side in pixels, 0 where unknown; images are not enlarged.
    """
    if images < 500:
        size, patch = 32, 8
    elif images < 5_000:
        size, patch = 48, 8
    elif images < 200_000 or device == "cpu":
        size, patch = 64, 8
    else:
        size, patch = 224, 14
    while image_side and size > max(32, image_side):
        size, patch = (48, 8) if size == 64 else (32, 8) if size == 48 else (64, 8)
    return size, patch


def piece_length(positions: Sequence[float], num_patches: int, device: Device) -> int:
    """Positions above which a document is cut; also the row length, so that every piece fits.

    The shortest of LENGTHS that leaves 90% of all positions in whole documents and has room for two images, or else the
    longest.

    Args:
        positions: of a sample of documents of all sources.
        num_patches: of an image; 0 without images.
    """
    sizes = np.asarray(positions, float)
    room = 2 * (num_patches + 16)
    for length in LENGTHS[device]:
        whole = sizes[sizes <= length].sum() / max(1.0, sizes.sum())
        if length >= room and whole >= WHOLE_SHARE:
            return length
    return LENGTHS[device][-1]


def val_fraction(text_tokens: float) -> float:
    """Share of a source held out: enough for 20,000 text tokens, at least 1% and at most 20%."""
    return round(min(0.2, max(0.01, VAL_TOKENS / max(1.0, text_tokens))), 2)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Counts of a prepared source.

    Attributes:
        positions: text tokens and patches of its train split.
        val_positions, val_text_tokens: of its val split.
        num_repeats: documents that repeat another one, and can therefore not be held out.
    """

    name: str
    positions: int
    val_positions: int
    val_text_tokens: int
    num_repeats: int = 0


def mixture(sources: Sequence[Source], tokens: float) -> dict[str, float]:
    """Weight of each source in percent.

    Large sources do not drown small ones: weights go with the root of the size. But none is read more than four times
    in ``tokens`` positions, where the others have more to give.
    """
    limits = {s.name: MOST_EPOCHS * s.positions / tokens for s in sources}
    roots = {s.name: s.positions**0.5 for s in sources}
    if sum(limits.values()) <= 1:  # all are read more often: equally often
        shares = {name: limit / sum(limits.values()) for name, limit in limits.items()}
        return _percent(shares)
    fixed: dict[str, float] = {}
    while True:
        rest = 1 - sum(fixed.values())
        free = {name: root for name, root in roots.items() if name not in fixed}
        shares = {name: rest * root / sum(free.values()) for name, root in free.items()}
        over = [name for name, share in shares.items() if share > limits[name]]
        if not over:
            return _percent({s.name: (fixed | shares)[s.name] for s in sources})
        fixed |= {name: limits[name] for name in over}


def _percent(shares: dict[str, float]) -> dict[str, float]:
    """Shares in percent to two digits, for people to read; a study needs no sum of 100."""
    return {name: float(f"{100 * share:.2g}") for name, share in shares.items()}


@dataclass(frozen=True, kw_only=True)
class ProposedLadder:
    """Widths of a study, the same depth for all."""

    widths: tuple[int, ...]
    depth: int
    head_dim: int = 16


LADDERS = (
    ProposedLadder(widths=(16, 32), depth=2),
    ProposedLadder(widths=(8, 16, 32), depth=2),
    ProposedLadder(widths=(8, 16, 32, 64), depth=2),
    ProposedLadder(widths=(16, 32, 64, 128), depth=4),
    ProposedLadder(widths=(32, 64, 128, 256), depth=6, head_dim=32),
    ProposedLadder(widths=(64, 128, 256, 512), depth=8, head_dim=64),
    ProposedLadder(widths=(128, 256, 512, 1024), depth=12, head_dim=64),
    ProposedLadder(widths=(256, 512, 1024, 2048), depth=24, head_dim=64),
)
NUM_SMALL = 3
"""The first of LADDERS, up to the demo's: cheap, and worth their steps however little data there is."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a model costs on this machine, measured.

    Attributes:
        step: seconds of an optimizer step.
        build: seconds until the first step of a run.
    """

    step: float
    build: float


Measure = Callable[[str, int, ProposedLadder], Speed]
"""Architecture, width and ladder to its speed."""


@dataclass(frozen=True, kw_only=True)
class ProposedSetting:
    """What is fixed before widths and budgets are chosen.

    Attributes:
        architectures: of the grid.
        baseline: architecture of the one run beside it, or None.
        minutes: for training.
        jobs: ladders trained at a time.
        start: seconds that a training process takes to start.
        vocab_size, image_size, patch_size, row_length, batch_rows, eval_rows: as in a config.
    """

    architectures: tuple[str, ...]
    baseline: str | None
    sources: tuple[Source, ...]
    minutes: float
    jobs: int
    start: float
    vocab_size: int
    image_size: int
    patch_size: int
    row_length: int
    batch_rows: int
    eval_rows: int

    @property
    def batch(self) -> int:
        """Positions of a step."""
        return self.batch_rows * self.row_length

    def parameters(self, architecture: str, width: int, ladder: ProposedLadder) -> int:
        """Of a model, the tables of the vocabulary included."""
        sizes = {name: getattr(self, name) for name in ("vocab_size", "image_size", "patch_size")}
        shape = {"depth": ladder.depth, "head_dim": min(width, ladder.head_dim), "hidden_multiple": 32}
        config = ModelConfig(architecture=architecture, width=width, **sizes, **shape)  # type: ignore[arg-type]
        return count_parameters(resolve_model(config)).total


@dataclass(frozen=True, kw_only=True)
class StudyProposal:
    """Widths and budgets of a study.

    Attributes:
        tokens: budgets in positions, ascending.
        weights: of the sources, in percent.
        minutes: of each ladder, (architecture, width) to minutes; and of the study on all jobs.
    """

    ladder: ProposedLadder
    tokens: tuple[int, ...]
    warmup_steps: int
    weights: dict[str, float]
    epochs: dict[str, float]
    ladder_minutes: dict[tuple[str, int], float]
    minutes: float
    warnings: tuple[str, ...]

    @property
    def num_runs(self) -> int:
        """Models with a result: trunks, which only serve as their beginnings, are not counted."""
        grid = [key for key in self.ladder_minutes if key[0] != "text"]
        return len(grid) * len(self.tokens) + len(self.ladder_minutes) - len(grid)


def batch_rows(sources: Sequence[Source], row_length: int, minutes: float, device: Device) -> int:
    """Rows of a step: so many that the longest run has about 2,000 steps, in a batch of 1,024 to 262,144 positions."""
    data = MOST_EPOCHS * sum(s.positions for s in sources)
    guess = min(data, CPU_CHARACTERS_PER_MINUTE / 4 * minutes) if device == "cpu" else data
    positions = 2 ** round(math.log2(min(262_144.0, max(1024.0, guess / STEPS))))
    return max(1, positions // row_length)


def eval_rows(sources: Sequence[Source], row_length: int) -> int:
    """Rows of a source's validation: its whole val split, but 8 to 96 rows."""
    most = max(s.val_positions for s in sources)
    return min(96, max(8, math.ceil(most / row_length)))


def learning_rate(width: int) -> float:
    """Peak rate: 4e-3 at the demo's width of 64, going with the inverse root of the width."""
    return float(f"{4e-3 * (64 / width) ** 0.5:.2g}")


def propose_study(setting: ProposedSetting, measure: Measure) -> StudyProposal:
    """The largest ladder whose models can be trained well in the time and on the data there are.

    Small ladders need 400 steps of the longest run in the time; wider ones also ten positions for each parameter of the
    largest model, from data that are read at most four times.
    """
    data = MOST_EPOCHS * sum(s.positions for s in setting.sources)
    chosen, speeds = LADDERS[0], _speeds(setting, LADDERS[0], measure)
    for number, ladder in enumerate(LADDERS[1:], start=1):
        found = _speeds(setting, ladder, measure)
        affordable = _affordable(setting, ladder, found)
        largest = max(setting.parameters(name, ladder.widths[-1], ladder) for name in setting.architectures)
        enough = GOOD_STEPS * setting.batch
        if number >= NUM_SMALL:
            enough, affordable = max(enough, TOKENS_PER_PARAMETER * largest), min(affordable, data)
        if affordable < enough:
            break
        chosen, speeds = ladder, found
    affordable = _affordable(setting, chosen, speeds)
    longest = max(min(affordable, data), min(affordable, GOOD_STEPS * setting.batch), LEAST_STEPS * setting.batch)
    return _proposal(setting, chosen, speeds, int(longest // setting.batch))


def draft(setting: ProposedSetting, ladder: ProposedLadder) -> StudyProposal:
    """Budgets that are good for nothing but to have a config to time."""
    speed = Speed(step=1.0, build=1.0)
    return _proposal(setting, ladder, _speeds(setting, ladder, lambda *_: speed), GOOD_STEPS)


def _proposal(setting: ProposedSetting, ladder: ProposedLadder, speeds: dict, steps: int) -> StudyProposal:
    number = 4 if steps >= 2 * GOOD_STEPS else 3
    step_counts = [steps >> k for k in reversed(range(number))]
    tokens = tuple(count * setting.batch for count in step_counts)
    weights = mixture(setting.sources, tokens[-1])
    ladder_minutes = {key: _seconds(setting, key, speeds[key], tokens) / 60 for key in speeds}
    total = max(IMBALANCE * sum(ladder_minutes.values()) / setting.jobs, *ladder_minutes.values())
    made = StudyProposal(
        ladder=ladder,
        tokens=tokens,
        warmup_steps=max(1, min(WARMUP_STEPS, step_counts[0] // 4)),
        weights=weights,
        epochs=times_read(tokens[-1], weights, {s.name: s.positions for s in setting.sources}),
        ladder_minutes=ladder_minutes,
        minutes=total,
        warnings=(),
    )
    return replace(made, warnings=tuple(_warnings(setting, made)))


def _speeds(setting: ProposedSetting, ladder: ProposedLadder, measure: Measure) -> dict[tuple[str, int], Speed]:
    """Speed of every ladder of runs: the smallest and largest width measured, those between on a line in log-log."""
    found = {}
    small, large = ladder.widths[0], ladder.widths[-1]
    for name in setting.architectures:
        ends = [measure(name, width, ladder) for width in (small, large)]
        for width in ladder.widths:
            part = math.log(width / small) / math.log(large / small)
            step = math.exp(sum(w * math.log(end.step) for w, end in zip((1 - part, part), ends, strict=True)))
            found[name, width] = Speed(step=step, build=max(end.build for end in ends))
    if setting.baseline:  # as fast as early fusion, of which it is a part
        found[setting.baseline, large] = found[setting.architectures[0], large]
    return found


def _seconds(setting: ProposedSetting, key: tuple[str, int], speed: Speed, tokens: Sequence[float]) -> float:
    """Seconds of all runs of one model; a baseline has the longest budget alone."""
    budgets = [tokens[-1]] if key[0] == setting.baseline else tokens
    branched = len(budgets) > 1
    trained = (1 - COOLDOWN) * budgets[-1] + COOLDOWN * sum(budgets) if branched else budgets[-1]
    # A validation is a third of a training step for each row, and is repeated with swapped images.
    rows = len(budgets) * 2 * setting.eval_rows * len(setting.sources) / 3
    steps = trained / setting.batch + rows / setting.batch_rows
    return setting.start + (len(budgets) + branched) * speed.build + steps * speed.step


def _affordable(setting: ProposedSetting, ladder: ProposedLadder, speeds: dict) -> float:
    """Positions of the longest run that the time allows, with budgets that halve; below 0 where it allows none."""

    def total(longest: float) -> float:
        budgets = [longest / 2**k for k in reversed(range(4))]
        return IMBALANCE / setting.jobs * sum(_seconds(setting, key, speed, budgets) for key, speed in speeds.items())

    fixed, per_position = total(0.0), (total(1e6) - total(0.0)) / 1e6
    return (60 * setting.minutes - fixed) / per_position


def _warnings(setting: ProposedSetting, made: StudyProposal) -> list[str]:
    found = []
    for name, times in made.epochs.items():
        if times > 1.05 * MOST_EPOCHS:
            found.append(
                f"{name}: the longest runs read it {times:.0f} times. After about {MOST_EPOCHS} readings the same text "
                "teaches less and less, and the laws look worse than they would on new data. Add data, or trust the "
                "shorter budgets more."
            )
    for source in setting.sources:
        if source.val_text_tokens < FEW_VAL_TOKENS:
            found.append(
                f"{source.name}: validation has only {source.val_text_tokens:,} text tokens, too few to tell small "
                f"differences apart ({VAL_TOKENS:,} would do). Add documents"
                + (f"; {source.num_repeats:,} repeat another one and do not count." if source.num_repeats else ".")
            )
    if len(made.ladder.widths) < 4:
        found.append(
            f"{len(made.ladder.widths)} widths fit into {setting.minutes:g} minutes; with fewer than 4 the intervals "
            "of the laws come out too narrow. Give more --minutes."
        )
    if made.minutes > 1.2 * setting.minutes:
        found.append(
            f"even the smallest study takes about {made.minutes:.1f} minutes here, more than the {setting.minutes:g} "
            "of --minutes."
        )
    return found
