"""Convert weights: a megamm run or checkpoint to a Hugging Face folder, and back to a folder that a run can start from.

Weights are read and written one tensor at a time. What has no Hugging Face layout is written with --to megamm: plain
safetensors under our names (docs/exchange.md).
"""

from pathlib import Path

from megamm_laws.arguments import ArgumentParser

from megamm.errors import exit_on_error
from megamm.files import check_out


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="run directory, checkpoint, Hugging Face folder, or a folder of --to megamm")
    add("--to", required=True, choices=("hf", "megamm"), help="Hugging Face's layout, or our names")
    add("--out", required=True, metavar="DIR", help="new folder")
    families = ("llama", "qwen2", "qwen3", "llava")
    add("--family", choices=families, help="layout of --to hf; by default the one that fits the model")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of what is written (%(default)s)",
    )
    add("--shard-gb", type=float, default=5.0, metavar="N", help="10^9 bytes of a file at most (%(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.shard_gb < 1e6:
        parser.error(f"argument --shard-gb: {arguments.shard_gb} is not a number above zero")
    check_out(arguments.out, folder=True)
    from megamm.exchange.convert import convert  # torch is slow to import

    shard_bytes = max(1, int(arguments.shard_gb * 1e9))
    family = convert(arguments.source, arguments.to, arguments.out, arguments.family, arguments.dtype, shard_bytes)
    print(f"{family} -> {Path(arguments.out)}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
