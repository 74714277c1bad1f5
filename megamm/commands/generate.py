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
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from megamm_laws.arguments import ArgumentParser
from rich.console import Console
from rich.progress import track

from megamm.config import Fit
from megamm.errors import exit_on_error
from megamm.extras import require
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
    add(
        "--fit",
        choices=get_args(Fit),
        help="how images become square, or native; by default as in the data",
    )
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


def load_answerer(arguments: argparse.Namespace):
    """The model, asked as the command line says."""
    import torch  # slow: not for --help

    from megamm.generation.answers import Answerer, AnswerOptions
    from megamm.generation.load import load_for_generation
    from megamm.generation.sampling import Sampling

    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=arguments.seed)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_for_generation(arguments.checkpoint, device, arguments.tokenizer, arguments.fit)
    options = AnswerOptions(
        max_length=loaded.max_length,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        sampling=sampling,
        dtype=getattr(torch, arguments.dtype),
        cache=not arguments.no_cache,
    )
    return Answerer(loaded.model, loaded.prompts, options)


def answer_file(answerer, questions: list, arguments: argparse.Namespace) -> None:
    """Answer the prompts of a JSONL, and score the answers."""
    from megamm.generation.questions import answer, score

    # All images are read before the first answer: answers may take hours.
    for one in questions:
        answerer.prompt(one.prompt, one.images, one.where)
    starts = range(0, len(questions), arguments.batch_size)
    answers: list[str] = []
    lines = []
    for start in track(starts, "answering", console=Console(stderr=True), transient=True, disable=len(starts) < 2):
        some = questions[start : start + arguments.batch_size]
        answers += answer(answerer, some)
        for one, text in zip(some, answers[start:], strict=True):
            line = json.dumps(one.record | {"generated": text}, ensure_ascii=False)
            lines.append(line)
            if arguments.out is None:
                print(line, flush=True)
    if arguments.out is not None:
        write_text(arguments.out, "".join(line + "\n" for line in lines))
    if arguments.task:
        found = score(arguments.task, questions, answers)
        print(f"{arguments.task}: {found:.4f} over {len(questions)} prompts", file=sys.stderr)


def main() -> None:
    arguments = parse_arguments()
    if arguments.out is not None:
        check_out(arguments.out, folder=False)
    if arguments.task == "caption":
        require("pycocoevalcap", "--task caption")
    if arguments.jsonl is not None:
        from megamm.generation.questions import read_questions  # brings torch along

        # Before the model, which may take minutes.
        questions = read_questions(Path(arguments.jsonl), arguments.task)
        answer_file(load_answerer(arguments), questions, arguments)
        return
    answerer = load_answerer(arguments)
    prompt = answerer.prompt(arguments.prompt, arguments.image, "--prompt")
    with ExitStack() as stack:
        stack.callback(print)  # the line ends also where Ctrl-C ends it
        for piece in answerer.pieces(prompt):
            print(piece, end="", flush=True)


def command() -> None:
    """The console script: :func:`main` under the exit-code contract."""
    exit_on_error(main)
