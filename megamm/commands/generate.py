"""Let a trained model go on from prompts with images: text to the terminal, or a JSONL of answers.

A line of --jsonl has "prompt" and "images" (a list of files, relative to the JSONL; or "image"). Each image stands
where the prompt says <image>, or before it. Other fields are kept in the answer. With --task the answers are scored:
  vqa      exact match with "answer" or "answers"
  choice   the most probable of "choices"; "answer" is the right one
  caption  CIDEr against "answer" or "answers" (needs the extra eval)
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megamm_laws.arguments import ArgumentParser
from rich.console import Console
from rich.progress import track

from megamm.errors import InputError, exit_on_error
from megamm.files import check_out, write_text


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="run directory, checkpoint, or folder of safetensors")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="text to go on from; may be empty")
    prompts.add_argument("--jsonl", metavar="FILE", help="a prompt per line")
    add("--image", nargs="+", default=[], metavar="FILE", help="images of --prompt")
    add("--out", metavar="FILE.jsonl", help="where the answers to --jsonl go (default: stdout)")
    add("--task", choices=("vqa", "choice", "caption"), help="score the answers to --jsonl")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = always the most probable token (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the tokens that make up this probability")
    add("--seed", type=int, default=0, metavar="S", help="of the draws (default: %(default)s)")
    add("--stop", metavar="TEXT", help="end an answer before this text")
    add("--batch-size", type=int, default=8, metavar="B", help="prompts at a time (default: %(default)s)")
    add("--no-cache", action="store_true", help="compute the whole row for every token: slow, the same text")
    add("--tokenizer", metavar="FILE", help="tokenizer.json; by default that of the run's prepared data")
    add("--fit", choices=("squash", "crop", "pad"), help="how images become square; by default as in the data")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
    arguments = parser.parse_args()
    for name in ("max_new_tokens", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is not positive")
    if arguments.jsonl is None and (arguments.out or arguments.task):
        parser.error("--out, --task: only with --jsonl")
    if arguments.jsonl is not None and arguments.image:
        parser.error("--image: only with --prompt; a line of --jsonl names its own images")
    return arguments


class Answerer:
    """Answers prompts as the command line says."""

    def __init__(self, arguments: argparse.Namespace):
        import torch  # slow: not for --help

        from megamm.generation.load import load_for_generation
        from megamm.generation.sampling import Sampling

        sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
        device = arguments.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.arguments = arguments
        self.loaded = load_for_generation(arguments.checkpoint, device, arguments.tokenizer, arguments.fit)
        self.options: dict[str, Any] = {
            "max_length": self.loaded.max_length,
            "sampling": sampling,
            "dtype": getattr(torch, arguments.dtype),
            "cache": not arguments.no_cache,
        }

    def prompt(self, text: str, images: list[Path | str], where: str):
        """A prompt that leaves room for an answer."""
        try:
            made = self.loaded.prompts.make(text, images)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if made.length >= self.loaded.max_length:
            raise InputError(
                f"{where}: {made.length} positions leave no room in the rows of {self.loaded.max_length} that the "
                "model was trained on; shorten the text or leave images out"
            )
        return made

    def pieces(self, prompt) -> Iterator[str]:
        """The answer to one prompt, piece by piece, as soon as its characters are whole."""
        from megamm.generation.generate import stream
        from megamm.sequence import EOS

        ids: list[int] = []
        said = ""
        for (token,) in stream(self.loaded.model, [prompt], self.arguments.max_new_tokens, **self.options):
            if token is None or token == EOS:
                break
            ids.append(token)
            text, ended = self._cut(self.loaded.tokenizer.decode(ids))
            whole = text if ended else self._whole(text)
            # What is printed cannot be taken back: where a further token changes it, the rest waits for the end.
            if whole.startswith(said):
                yield whole[len(said) :]
                said = whole
            if ended:
                return
        yield self._cut(self.loaded.tokenizer.decode(ids))[0][len(said) :]

    def answers(self, prompts: list, numbers: list[int]) -> list[str]:
        """The answers to some prompts; ``numbers``: of the prompts among all, on which draws depend."""
        from megamm.generation.generate import generate

        limit = self.arguments.max_new_tokens
        found = generate(self.loaded.model, prompts, limit, numbers=numbers, **self.options)
        return [self._cut(self.loaded.tokenizer.decode(ids))[0] for ids in found]

    def choose(self, prompt, choices: list[str]) -> int:
        """The number of the choice with the highest probability per token."""
        from megamm.generation.generate import log_likelihood

        ids = [self.loaded.tokenizer.encode(choice).tolist() for choice in choices]
        scores = log_likelihood(self.loaded.model, prompt, ids, self.options["dtype"])
        return max(range(len(ids)), key=lambda i: float(scores[i]) / max(1, len(ids[i])))

    def _cut(self, text: str) -> tuple[str, bool]:
        stop = self.arguments.stop
        return (text.split(stop)[0], True) if stop and stop in text else (text, False)

    def _whole(self, text: str) -> str:
        """Without what a later token may still change: half a character, or the beginning of the stop text."""
        text = text.rstrip("\ufffd")
        stop = self.arguments.stop or ""
        held = next((n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), 0)
        return text[: len(text) - held]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL of prompts.

    Raises:
        InputError: names the line and what is wrong with it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise InputError(f'{path}:{number}: expected a mapping with "prompt", a text')
        images = record.get("images", record.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise InputError(f"{path}:{number}: images: expected a list of files")
        records.append(
            {"record": record, "images": [path.parent / name for name in images], "where": f"{path}:{number}"}
        )
    if not records:
        raise InputError(f"{path}: no prompt in it")
    return records


def answer_file(answerer: Answerer, arguments: argparse.Namespace) -> None:
    """Answer the prompts of a JSONL, and score the answers."""
    records = read_records(Path(arguments.jsonl))
    check = {"choice": _check_choices, "vqa": _check_references, "caption": _check_references}.get(arguments.task)
    # All lines are checked, and all images read, before the first answer: that may take hours.
    for one in records if check else ():
        check(one)
    for one in records:
        one["prompt"] = answerer.prompt(one["record"]["prompt"], one["images"], one["where"])
    starts = range(0, len(records), arguments.batch_size)
    lines = []
    for start in track(starts, "answering", console=Console(stderr=True), transient=True, disable=len(starts) < 2):
        some = records[start : start + arguments.batch_size]
        if arguments.task == "choice":
            picked = [answerer.choose(one["prompt"], one["choices"]) for one in some]
            for one, number in zip(some, picked, strict=True):
                one["score"] = float(number == one["right"])
            texts = [one["choices"][number] for one, number in zip(some, picked, strict=True)]
        else:
            texts = answerer.answers([one["prompt"] for one in some], list(range(start, start + len(some))))
        for one, text in zip(some, texts, strict=True):
            one["text"] = text
            line = json.dumps(one["record"] | {"generated": text}, ensure_ascii=False)
            lines.append(line)
            if arguments.out is None:
                print(line, flush=True)
    if arguments.out is not None:
        write_text(arguments.out, "".join(line + "\n" for line in lines))
    if arguments.task:
        print(f"{arguments.task}: {_score(arguments.task, records):.4f} over {len(records)} prompts", file=sys.stderr)


def _check_choices(one: dict[str, Any]) -> None:
    from megamm.generation.tasks import choices_of

    one["choices"], one["right"] = choices_of(one["record"], one["where"])


def _check_references(one: dict[str, Any]) -> None:
    from megamm.generation.tasks import references_of

    one["references"] = references_of(one["record"], one["where"])


def _score(task: str, records: list[dict[str, Any]]) -> float:
    from megamm.generation.tasks import cider, vqa_accuracy

    if task == "caption":
        return cider([one["text"] for one in records], [one["references"] for one in records])
    if task == "vqa":
        return sum(vqa_accuracy(one["text"], one["references"]) for one in records) / len(records)
    return sum(one["score"] for one in records) / len(records)


def main() -> None:
    arguments = parse_arguments()
    if arguments.out is not None:
        check_out(arguments.out, folder=False)
    answerer = Answerer(arguments)
    if arguments.jsonl is not None:
        answer_file(answerer, arguments)
        return
    prompt = answerer.prompt(arguments.prompt, arguments.image, "--prompt")
    with ExitStack() as stack:
        stack.callback(print)  # the line ends also where Ctrl-C ends it
        for piece in answerer.pieces(prompt):
            print(piece, end="", flush=True)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
