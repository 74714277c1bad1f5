"""Write the config of every model size of arXiv 2504.07951 beside this file: one dial, the width, turns all.

    python examples/nmm/generate.py

A config is not edited by hand; change this file and run it again. A test holds both together.
"""

from pathlib import Path

EARLY = {
    "275m": (800, 1.5e-3, 275e6),
    "464m": (1088, 1.5e-3, 464e6),
    "932m": (1632, 5e-4, 932e6),
    "1.6b": (2208, 4.2e-4, 1.63e9),
    "2.3b": (2624, 4e-4, 2.28e9),
    "3.4b": (3232, 3.5e-4, 3.35e9),
    "8b": (5120, 2.4e-4, 8.13e9),
}
"""Size -> width, peak learning rate, parameters; of MoE the active ones (the paper's table of early and MoE models)."""
LATE = {
    "290m": (768, 384, 1.5e-3, 290e6),
    "494m": (1024, 512, 1.5e-3, 494e6),
    "1b": (1536, 768, 5e-4, 1e9),
    "1.8b": (2048, 1024, 4.2e-4, 1.75e9),
    "2.4b": (2464, 1184, 3.8e-4, 2.43e9),
    "3.7b": (3072, 1536, 3.3e-4, 3.71e9),
}
"""Size -> width of the decoder, width of the vision tower, peak learning rate, parameters."""
TOKENS_PER_PARAMETER = 20
ROW, BATCH_ROWS = 1024, 2048

TEMPLATE = """\
# {title} of arXiv 2504.07951: {params:.3g} parameters{active}, 2M tokens a step. Made by generate.py.
# torchrun --nproc-per-node 8 -m megamm.train --config examples/nmm/{name}.yaml
model: {{{model}, depth: 24, vocab_size: 50432, image_size: 224, patch_size: 14}}
data:
  row_length: {row}
  workers: 4
  window_tokens: 10_000_000
  augment: {{crop_scale_min: 0.4, flip: true}}
  sources:
    caption: {{path: data/caption, weight: 45}}
    interleaved: {{path: data/interleaved, weight: 45}}
    text: {{path: data/text, weight: 10}}
optimizer: {{lr: {lr}}}
schedule: {{warmup_steps: 1000, cooldown: inverse_sqrt, cooldown_fraction: 0.2}}
train: {{run_dir: runs/{name}, tokens: {tokens}, batch_rows: {batch_rows}, micro_rows: {micro_rows}, dtype: bfloat16, \
recompute: {recompute}, compile: true}}
eval: {{every: 1000, rows: 256}}
checkpoint: {{every: 1000}}
"""


def configs() -> dict[str, str]:
    """Name of each file -> its text."""
    found = {}
    for size, (width, lr, params) in EARLY.items():
        found[f"early-{size}"] = _config(
            f"early-{size}", f"architecture: early, width: {width}", "Early fusion", lr, params
        )
        experts = f"architecture: early, width: {width}, experts: {{num: 8}}"
        found[f"moe-{size}"] = _config(f"moe-{size}", experts, "Early fusion with 8 experts, top-1,", lr, params)
    for size, (width, vision, lr, params) in LATE.items():
        model = f"architecture: late, width: {width}, vision: {{width: {vision}}}"
        found[f"late-{size}"] = _config(f"late-{size}", model, "Late fusion", lr, params)
    return {f"{name}.yaml": text for name, text in found.items()}


def _config(name: str, model: str, title: str, lr: float, params: float) -> str:
    mantissa, exponent = f"{lr:.1e}".split("e")
    return TEMPLATE.format(
        name=name,
        model=model,
        title=title,
        params=params,
        active=" active" if name.startswith("moe") else "",
        row=ROW,
        lr=f"{mantissa}e{int(exponent)}",
        tokens=f"{TOKENS_PER_PARAMETER * params / 1e9:g}e9",
        batch_rows=BATCH_ROWS,
        micro_rows=next(rows for most, rows in ((5e8, 16), (1.8e9, 8), (4e9, 4), (1e12, 2)) if params < most),
        recompute="none" if params < 5e8 else "per_op",
    )


def main() -> None:
    for name, text in configs().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
