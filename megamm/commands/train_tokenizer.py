"""Train a byte-level BPE tokenizer on the text of pages, captions, text files, tables or generated scenes.

Example: tools/train_tokenizer.py pages/ captions.jsonl scenes:caption --vocab-size 4096 --out tokenizer.json
"""

import argparse
from collections.abc import Iterator

from megamm_laws.arguments import ArgumentParser, not_negative
from rich.console import Console
from rich.progress import Progress

from megamm.data.documents import Document, Text
from megamm.data.readers import KINDS, open_inputs
from megamm.data.tokenizer import train_tokenizer
from megamm.errors import exit_on_error
from megamm.files import check_out


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="folder, file, or scenes:caption, scenes:interleaved, scenes:text"
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="number of ids, at least 261")
    parser.add_argument("--out", required=True, metavar="tokenizer.json", help="file to write")
    parser.add_argument("--kind", choices=("auto", *KINDS), default="auto", help="which files of a folder to read")
    parser.add_argument("--num-documents", type=int, default=10_000, help="documents of a scenes: input")
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of scenes: inputs")
    arguments = parser.parse_args()
    check_out(arguments.out, folder=False)

    # Small pictures: only the text is used.
    inputs = open_inputs(
        arguments.inputs,
        arguments.kind,
        num_documents=arguments.num_documents,
        seed=arguments.seed,
        image_size=32,
    )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("reading text", total=inputs.num_tasks)

        def texts() -> Iterator[str]:
            for task in progress.track(inputs.tasks, task_id=bar):
                for item in task():
                    if isinstance(item, Document):
                        yield "".join(span.text for span in item.spans if isinstance(span, Text))

        size = train_tokenizer(texts(), arguments.vocab_size, arguments.out)
    fewer = f" (fewer than the {arguments.vocab_size} asked for: little text)" if size < arguments.vocab_size else ""
    print(f"{arguments.out}: {size} ids{fewer}")


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
