"""A study on disk as training leaves it, without training: losses follow a known law, with noise.

Files have the formats of megamm.trainer; datasets are real, small and prepared from drawn scenes.
"""

import json
from pathlib import Path

import numpy as np

from megamm.config import Config, SourceConfig
from megamm.data.documents import Text
from megamm.data.prepare import PrepareSettings, prepare
from megamm.data.scenes import generate_scenes
from megamm.data.tokenizer import train_tokenizer
from megamm.model.counts import ParameterCounts, TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.model.sizes import resolve_model
from megamm.settings import to_yaml

IMAGE_SIZE, PATCH_SIZE, ROW_LENGTH, BATCH_ROWS, COOLDOWN = 32, 4, 512, 32, 0.25
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
WEIGHTS = {"caption": 45.0, "interleaved": 45.0, "text": 10.0}
HAS_IMAGES = ("caption", "interleaved")
STATS = TokenStats(patches=0.52, labels=0.44, pairs=60.0)

LAWS = {
    "early": {
        "caption": (0.45, 60, 0.42, 420, 0.42),
        "interleaved": (0.9, 55, 0.40, 380, 0.41),
        "text": (1.3, 50, 0.38, 300, 0.39),
    },
    "late": {
        "caption": (0.45, 72, 0.42, 420, 0.42),
        "interleaved": (0.9, 64, 0.40, 380, 0.41),
        "text": (1.3, 53, 0.38, 300, 0.39),
    },
    "text": {
        "caption": (1.75, 20, 0.42, 150, 0.42),
        "interleaved": (1.6, 30, 0.40, 250, 0.41),
        "text": (1.3, 50, 0.38, 300, 0.39),
    },
}
"""Architecture -> source -> E, A, alpha, B, beta."""


def make_study(
    folder: Path,
    *,
    architectures: tuple[str, ...] = ("early", "late"),
    widths: tuple[int, ...] = (64, 96, 128, 192),
    steps: tuple[int, ...] = (60, 120, 240, 480, 960),
    noise: float = 0.004,
    seed: int = 0,
    datasets: dict[str, Path] | None = None,
) -> Path:
    """Write ``folder``/study.yaml, study.json and runs/<ladder>/<run>/; returns ``folder``.

    A ladder is a width of an architecture: a trunk and a branch per length. The blind model is trained once.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for architecture in architectures:
        for width in widths:
            ladder = f"{architecture}-w{width}"
            trunk = folder / "runs" / ladder / f"{ladder}-trunk"
            _write_run(trunk, _config(architecture, width, steps[-1], trunk, "trunk", datasets), rng, noise)
            for length in steps:
                run = folder / "runs" / ladder / f"{ladder}-s{length}"
                _write_run(run, _config(architecture, width, length, run, str(trunk), datasets), rng, noise)
                names.append(str(run.relative_to(folder)))
    blind = folder / "runs" / "text" / f"text-w{widths[-1]}"
    _write_run(blind, _config("text", widths[-1], steps[-1], blind, None, datasets), rng, noise)
    (folder / "study.yaml").write_text("name: small ladder\n# written by the test factory\n")
    (folder / "study.json").write_text(json.dumps({"name": "small ladder", "runs": names}))
    return folder


def _config(architecture: str, width: int, steps: int, run: Path, trunk: str | None, datasets: dict | None) -> Config:
    """``trunk``: the trunk's path, or ``trunk`` for a trunk, or None for a run that is neither."""
    config = Config()
    config.model.architecture, config.model.width, config.model.depth = architecture, width, 4
    config.model.vocab_size, config.model.image_size, config.model.patch_size = 512, IMAGE_SIZE, PATCH_SIZE
    config.model.hidden_multiple = 32
    resolve_model(config.model)
    config.data.row_length, config.data.window_tokens = ROW_LENGTH, 20_000
    config.data.sources = {
        name: SourceConfig(path=str((datasets or {}).get(name, run / "no-data" / name)), weight=weight)
        for name, weight in WEIGHTS.items()
    }
    config.train.run_dir, config.train.batch_rows, config.train.steps = str(run), BATCH_ROWS, steps
    config.schedule.cooldown_fraction = COOLDOWN
    if trunk == "trunk":
        config.schedule.cooldown = "none"
    else:
        config.train.branch_from = trunk
    return config


def _write_run(run: Path, config: Config, rng: np.random.Generator, noise: float) -> None:
    """config.yaml, run.json, metrics.jsonl and result.json of one run."""
    run.mkdir(parents=True, exist_ok=True)
    counts, steps = count_parameters(config.model), config.train.steps
    trunk = config.schedule.cooldown == "none"
    start = steps - round(COOLDOWN * steps) if config.train.branch_from else 0
    offset = np.exp(rng.normal(0, noise))
    lines = [_record(config, counts, step, rng, offset) for step in range(start + 10, steps, 10)]
    lines.append(_record(config, counts, steps, rng, offset))
    final = {s: _losses(config, counts, steps, s, 1.03 if trunk else 1.0, offset) for s in WEIGHTS}
    at_end = {k: lines[-1][k] for k in ("step", "tokens")}
    lines.append(at_end | {f"val/{s}/{k}": v for s, values in final.items() for k, v in values.items()})
    swapped = {s: {**final[s]} for s in HAS_IMAGES}
    if config.model.architecture != "text":
        for s in HAS_IMAGES:
            worse = LAWS["text"][s][0] - LAWS["early"][s][0] + 0.8
            swapped[s] = {k: v + (worse if k != "text" else 0) for k, v in final[s].items()}
    result = {
        "name": run.name,
        "architecture": config.model.architecture,
        "mixture": "caption 45, interleaved 45, text 10",
        "width": config.model.width,
        "depth": config.model.depth,
        "steps": steps,
        "params": counts.total,
        "params_active": counts.total,
        "params_vision": counts.vision,
        "tokens": at_end["tokens"],
        "tokens_vision": int(STATS.patches * steps * BATCH_ROWS * ROW_LENGTH),
        "flops": lines[-2]["flops"],
        "flops_exact": lines[-2]["flops_exact"],
        "loss": float(np.mean([v["loss"] for v in final.values()])),
        "losses": final,
        "losses_swapped": swapped,
        "batch_tokens": BATCH_ROWS * ROW_LENGTH,
        "lr": config.optimizer.lr,
        "cooled": not trunk,
        "branch_from": config.train.branch_from,
    }
    about = {
        "megamm": "0.1.0",
        "torch": "2.13.0+cpu",
        "python": "3.11.2",
        "git_commit": "0f48989" + "0" * 33,
        "device": "cpu",
        "world_size": 1,
        "params": counts.total,
        "params_active": counts.total,
        "params_decoder": counts.decoder,
        "params_vision": counts.vision,
        "flops_per_token": 6 * counts.decoder,
        "flops_per_patch_vision": 6 * counts.vision,
    }
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "run.json").write_text(json.dumps(about))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "result.json").write_text(json.dumps(result))


def _record(config: Config, counts: ParameterCounts, step: int, rng: np.random.Generator, offset: float) -> dict:
    """A training line of metrics.jsonl."""
    positions = step * BATCH_ROWS * ROW_LENGTH
    final = config.train.steps - round(COOLDOWN * config.train.steps)
    cooled = 0 if config.schedule.cooldown == "none" else max(0, step - final) / (config.train.steps - final)
    bump = 1.03 - 0.03 * cooled
    record = {"step": step, "tokens": int(0.98 * positions)}
    values = {s: _losses(config, counts, step, s, bump, offset) for s in WEIGHTS}
    for source, losses in values.items():
        for key, value in losses.items():
            name = f"loss/{source}" + ("" if key == "loss" else f"/{key}")
            record[name] = value * float(np.exp(rng.normal(0, 0.01)))
    record["loss"] = float(sum(w * record[f"loss/{s}"] for s, w in WEIGHTS.items()) / sum(WEIGHTS.values()))
    flops = paper_flops(counts, record["tokens"], STATS.patches * positions)
    exact = exact_flops_per_token(config.model, STATS) * positions
    return record | {
        "lr": config.optimizer.lr * (1 - cooled),
        "grad_norm": 0.5,
        "flops": flops,
        "flops_exact": exact,
        "padding": 0.02,
        "tokens_per_second": 2e11 / (exact / positions),
        "flops_per_second": 2e11,
        "loader_wait": 0.001,
    }


def _losses(
    config: Config, counts: ParameterCounts, step: int, source: str, bump: float, offset: float
) -> dict[str, float]:
    E, A, alpha, B, beta = LAWS[config.model.architecture][source]
    tokens = 0.98 * step * BATCH_ROWS * ROW_LENGTH
    loss = (E + A * counts.total**-alpha + B * tokens**-beta) * bump * offset
    loss += 2.5 * float(np.exp(-step / 12))  # the first steps, before any law holds
    key = "text_after_image" if source in HAS_IMAGES else "text"
    return {"loss": loss, key: loss} | ({"text": loss * 1.2} if source == "interleaved" else {})


def make_datasets(folder: Path, num_documents: int = 80) -> dict[str, Path]:
    """Prepare a small dataset of scenes per source; returns name -> path."""
    texts = [
        span.text
        for kind in WEIGHTS
        for document in generate_scenes(kind, num_documents, 0, IMAGE_SIZE)
        for span in document.spans
        if isinstance(span, Text)
    ]
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(texts, 512, tokenizer)
    for kind in WEIGHTS:
        settings = PrepareSettings(
            inputs=(f"scenes:{kind}",),
            tokenizer=str(tokenizer),
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            max_length=ROW_LENGTH,
            num_documents=num_documents,
        )
        prepare(settings, folder / kind)
    return {kind: folder / kind for kind in WEIGHTS}
