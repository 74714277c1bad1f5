"""The first packed rows of a study's training plan, drawn."""

import base64
import io
import tempfile
from pathlib import Path

from PIL import Image
from tokenizers import Tokenizer

from megamm.config import Config
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.data.picture import draw_row
from megamm.errors import InputError
from megamm.report.study import BLIND, StudyResults
from megamm.settings import build

SEARCHED = 32
"""Rows at the start of the plan among which the samples are picked."""


def sample_rows(study: StudyResults, number: int = 3) -> tuple[dict[int, Image.Image], str]:
    """Pictures of rows that a run of the study trains on, by row number, and a line on where they are from.

    Picked are those, of the first rows, that together show the most sources. Where the prepared data is not there any
    more, no pictures and a line that says so.
    """
    run = next((r for r in study.runs if r.architecture != BLIND), study.runs[0])
    config = build(Config, run.config, where=str(run.path / "config.yaml"))
    # So few rows need no processes of their own.
    config.data.workers = 0
    try:
        datasets = open_sources(config.data, "train")
        tokenizer = Tokenizer.from_file(str(datasets[0].path / "tokenizer.json"))
        weights = [source.weight for source in config.data.sources.values()]
        with tempfile.TemporaryDirectory() as cache:
            plan = build_pack_plan(datasets, weights, config.data, cache_dir=Path(cache), num_rows=SEARCHED)
            loader = Loader(plan, datasets, config.data, global_batch_rows=SEARCHED, start_step=0, end_step=1)
            (batch,) = next(iter(loader))
    except InputError as error:
        return {}, f"The rows cannot be drawn here: {error}."
    names = list(config.data.sources)
    held = [set(source[target >= 0].tolist()) for source, target in zip(batch.source, batch.targets, strict=True)]
    picked = _covering(held, number)
    pictures = {row: draw_row(batch, row, tokenizer, sources=names) for row in picked}
    return pictures, (
        f"{len(picked)} of the first {len(held)} rows of the training plan, picked to show every source; the plan is "
        "the same for every run with this data and seed."
    )


def _covering(held: list[set[int]], number: int) -> list[int]:
    """Rows picked one by one, each for the most sources not shown yet, then for the most at all."""
    picked: list[int] = []
    while len(picked) < min(number, len(held)):
        seen = set().union(*(held[row] for row in picked))
        rest = [row for row in range(len(held)) if row not in picked]
        picked.append(max(rest, key=lambda row: (len(held[row] - seen), len(held[row]), -row)))
    return sorted(picked)


def data_uri(picture: Image.Image, colours: int = 256) -> str:
    """The picture as a PNG in a data URI; few colours are used, so that a palette keeps it small."""
    out = io.BytesIO()
    picture.quantize(colours).save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
