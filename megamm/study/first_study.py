"""The study file of a first study, with a comment on every choice."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from megamm.resolve import MOST_EPOCHS
from megamm.study.propose import COOLDOWN, ProposedSetting, StudyProposal, learning_rate


def study_yaml(
    setting: ProposedSetting,
    made: StudyProposal,
    *,
    name: str,
    paths: dict[str, Path],
    seed: int,
    device: str,
    command: str,
) -> str:
    """A study as YAML.

    Args:
        paths: folder of each prepared source.
        device: cpu or cuda.
        command: that goes on from here.
    """
    grid = ", ".join(f"{text(source)} {_times(times)}" for source, times in made.epochs.items())
    ladder, images = made.ladder, "late" in setting.architectures
    lines = [
        "# Which model should learn from these data? Proposed by megamm-start; every line may be edited. To train it:",
        f"#   {command}",
        "# Finished runs are not trained again. What may change: docs/study.md; every setting: docs/settings.md.",
        f"name: {text(name)}",
        "base:",
        "  # The same for all models: the depth, and the width of an attention head.",
        f"  model: {{depth: {ladder.depth}, head_dim: {ladder.head_dim}, hidden_multiple: 32}}",
        "  data:",
        "    # Positions (text tokens and image patches) in a row; no prepared document is longer.",
        f"    row_length: {setting.row_length}",
        "    window_tokens: 200_000",
        f"    seed: {seed}",
        "    # Weights are shares of positions. Small sources get more than their size says, but are read at most",
        f"    # {MOST_EPOCHS} times where the others have enough. The longest run reads {grid}.",
        "    sources:",
        *(
            f"      {text(source)}: {{path: {text(str(path))}, weight: {made.weights[source]:g}}}"
            for source, path in paths.items()
        ),
        f"  optimizer: {{lr: {rate(learning_rate(ladder.widths[-1]))}}}",
        f"  schedule: {{warmup_steps: {made.warmup_steps}, cooldown: inverse_sqrt, cooldown_fraction: {COOLDOWN}}}",
        f"  # A step is {setting.batch:,} positions.",
        f"  train: {{batch_rows: {setting.batch_rows}, seed: {seed}, log_every: {_log_every(setting, made)}"
        + (", dtype: bfloat16}" if device == "cuda" else "}"),
        "  # Rows of validation for each source, from documents that are never trained on.",
        *(["  # With images, they are read once more with every image replaced by another one."] if images else []),
        f"  eval: {{rows: {setting.eval_rows}, swap_images: {str(images).lower()}}}",
        "  checkpoint: {every: 200, keep: 1, final: false}",
        "architectures:",
        "  early: {}  # " + ("raw patches and text in one transformer" if images else "one transformer over the text"),
        *_late(images),
        "# Small to large, so that the fitted laws can say what a larger one would do. Wide models take smaller steps.",
        "widths:",
        *(_width(width, ladder.head_dim) for width in ladder.widths),
        "# Positions that each model is trained on, a run for each number. They share their first part, trained once.",
        f"tokens: [{', '.join(f'{tokens:_}' for tokens in made.tokens)}]",
    ]
    if setting.baseline:
        lines += [
            "# A blind model, once: what the text alone can tell.",
            "baselines:",
            f"  - {{architecture: {setting.baseline}, width: {ladder.widths[-1]}, tokens: {made.tokens[-1]:_}}}",
        ]
    return "\n".join(lines) + "\n"


def source_names(inputs: Sequence[str]) -> list[str]:
    """A name for each input: that of its folder or file in letters, digits, - and _; numbered where it comes again."""
    names: list[str] = []
    for path in inputs:
        plain = re.sub(r"[^A-Za-z0-9_]+", "-", Path(path).resolve().name.split(".")[0]).strip("-") or "data"
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def text(value: str) -> str:
    """Text as YAML takes it, in quotes."""
    return json.dumps(value, ensure_ascii=False)


def rate(value: float) -> str:
    """A learning rate as YAML takes it."""
    return f"{value:.1e}".replace("e-0", "e-")


def _late(images: bool) -> list[str]:
    if images:
        return [
            "  # A vision transformer before it; it learns more slowly than the rest (docs/lab-log/studies.md).",
            "  late: {optimizer: {vision_lr_factor: 0.03}}",
        ]
    return [
        "  # Without images there is no front end to compare. With images there would be one more line here:",
        "  # late: {optimizer: {vision_lr_factor: 0.03}}",
    ]


def _width(width: int, head_dim: int) -> str:
    model = f"model: {{head_dim: {width}}}, " if width < head_dim else ""
    return f"  {width}: {{{model}optimizer: {{lr: {rate(learning_rate(width))}}}}}"


def _times(times: float) -> str:
    return f"{times:.2g} times" if times < 10 else f"{times:.0f} times"


def _log_every(setting: ProposedSetting, made: StudyProposal) -> int:
    return max(1, min(20, made.tokens[0] // setting.batch // 5))
