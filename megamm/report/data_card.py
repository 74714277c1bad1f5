"""The data card: one page on a prepared dataset, for who wants to know what a model would be trained on."""

import base64
import json
from html import escape
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megamm.data.dataset_info import repeats_line
from megamm.data.shards import Example, ShardedDataset
from megamm.report.style import CSS
from megamm.report.tables import html_table, note

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser enforces that the page loads and runs nothing: texts and pictures come from anywhere."""
NUM_BARS = 24
NUM_SAMPLES = 8
MAX_CHARACTERS = 600
"""Of a sample's text."""
STYLE = """
.bars { display: flex; align-items: flex-end; gap: 2px; height: 110px; border-bottom: 1px solid var(--line); }
.bars i { flex: 1; background: var(--accent); min-height: 0; }
.ends { display: flex; justify-content: space-between; font-size: 12.5px; color: var(--muted); }
.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.samples { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); }
.document { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-wrap: anywhere; }
.document img { display: block; max-width: 160px; margin: 8px 0; image-rendering: auto; }
.document h3 { margin: 0 0 8px; font-size: 13px; color: var(--muted); font-weight: 500; }
"""


def data_card(path: Path | str) -> str:
    """The card of a prepared dataset, a whole HTML page.

    Raises:
        InputError: the dataset is missing or damaged.
    """
    path = Path(path)
    train = ShardedDataset(path, "train")
    info = train.info
    splits = {name: train if name == "train" else ShardedDataset(path, name) for name in info["splits"]}
    name = path.resolve().name
    sections = [
        ("Counts", _counts(info, splits)),
        ("Lengths of documents", _lengths(splits)),
        ("Samples", _samples(train)),
        ("Left out", _left_out(info)),
        ("How it was made", _made(info)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    total = sum(split["num_documents"] for split in info["splits"].values())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}: data card</title><link rel="icon" href="data:,"><style>{CSS}{STYLE}</style></head>
<body><header><h1>{escape(name)}</h1>
<p class="subtitle">{total:,} documents of kind {escape(info["kind"])}, prepared for training</p></header>
<main>{body}</main></body></html>
"""


def _counts(info: dict, splits: dict[str, ShardedDataset]) -> str:
    rows = []
    for name, split in info["splits"].items():
        tokens = split["num_text_tokens"] + split["num_patches"]
        cells = [split["num_documents"], split["num_images"], split["num_text_tokens"], split["num_patches"], tokens]
        size = sum(shard["num_bytes"] for shard in split["shards"])
        rows.append([escape(name), *(f"{cell:,}" for cell in cells), f"{size / 1e6:,.1f} MB"])
    heads = ["split", "documents", "images", "text tokens", "patches", "tokens in all", "on disk"]
    return html_table(heads, rows) + note(repeats_line(info) or "No document repeats another.")


def _lengths(splits: dict[str, ShardedDataset]) -> str:
    lengths = np.concatenate([np.asarray(split.lengths) for split in splits.values()])
    charts = [_bars("text tokens", lengths[:, 0])]
    if lengths[:, 1].any():
        charts.append(_bars("patches", lengths[:, 1]))
        charts.append(_bars("text tokens and patches", lengths.sum(1)))
    return f'<div class="charts">{"".join(charts)}</div>'


def _bars(title: str, values: np.ndarray) -> str:
    """A histogram of whole numbers, with the extremes and the median in words."""
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // NUM_BARS))  # whole numbers of equal right in each bar
    counts = np.bincount((values - low) // width)
    bars = "".join(
        f'<i style="height:{100 * count / counts.max():.1f}%" '
        f'title="{low + i * width:,} to {low + (i + 1) * width - 1:,}: {count:,} documents"></i>'
        for i, count in enumerate(counts.tolist())
    )
    middle = f"median {np.median(values):,.0f}, mean {values.mean():,.1f}"
    return (
        f'<figure><h3>{escape(title)} of a document</h3><div class="bars" role="img" aria-label="{middle}">{bars}</div>'
        f'<div class="ends"><span>{low:,}</span><span>{middle}</span><span>{high:,}</span></div></figure>'
    )


def _samples(dataset: ShardedDataset) -> str:
    """Documents at equal distances: the first ones of a folder are often alike."""
    tokenizer = Tokenizer.from_file(str(dataset.path / "tokenizer.json"))
    picked = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, NUM_SAMPLES)})
    documents = "".join(_document(dataset[index], tokenizer) for index in picked)
    told = note(f"{len(picked)} documents of train at equal distances, as the model gets them.")
    return f'{told}<div class="samples">{documents}</div>'


def _document(example: Example, tokenizer: Tokenizer) -> str:
    parts, start, left, images = [], 0, MAX_CHARACTERS, iter(example.images)
    for span in example.layout.tolist():
        if span < 0:
            data = next(images)
            kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
            uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            parts.append(f'<img alt="image of {-span} patches" src="{uri}">')
            continue
        text = tokenizer.decode(example.tokens[start : start + span].tolist()).strip()
        start += span
        if text and left > 0:
            parts.append(f"<p>{escape(text[:left])}{'…' if len(text) > left else ''}</p>")
            left -= len(text)
    size = f"{len(example.tokens):,} text tokens, {len(example.images)} images"
    return f'<div class="document"><h3>{escape(example.id)}: {size}</h3>{"".join(parts)}</div>'


def _left_out(info: dict) -> str:
    if not info["num_skipped"]:
        return "<p>Nothing was left out.</p>"
    rows = [[escape(reason), f"{count:,}"] for reason, count in info["skipped_by_reason"].items()]
    return html_table(["reason", "number"], rows) + note("Each is named in skipped.jsonl.")


def _made(info: dict) -> str:
    settings = json.dumps(info["settings"], indent=2, ensure_ascii=False)
    prints = json.dumps(info["fingerprints"], indent=2)
    return f"<h3>Settings</h3><pre>{escape(settings)}</pre><h3>Fingerprints</h3><pre>{escape(prints)}</pre>"
