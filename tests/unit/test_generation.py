"""Generation: the cache against the whole row, sampling against a naive draw, the command line on a trained run."""

import contextlib
import copy
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from model_factory import PATCHES, model_config
from run_factory import trainer
from task_factory import make_words

from megamm.commands import generate as tool
from megamm.config import ExpertsConfig
from megamm.data.images import DEFAULT_FIT, preprocessing_fingerprint
from megamm.data.shards import Example
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.errors import InputError, exit_on_error
from megamm.exchange.convert import convert
from megamm.exchange.start import start_from
from megamm.generation.generate import generate, log_likelihood, stream
from megamm.generation.load import load_for_generation
from megamm.generation.prompts import Prompt, PromptMaker, prompt_batch, token_batch
from megamm.generation.sampling import NEVER, Sampler, Sampling
from megamm.generation.tasks import cider, vqa_accuracy
from megamm.model.cache import KeyValueCache
from megamm.model.multimodal import MultimodalModel
from megamm.sequence import BOS, EOS, IMAGE, IMAGE_END, Batch

VARIANTS = {
    "early": ("early", {}),
    "late": ("late", {}),
    "text": ("text", {}),
    "grouped queries": ("early", {"width": 64, "key_heads": 2}),
    "experts": ("early", {"experts": ExpertsConfig(num=4, top_k=2, shared_hidden=8)}),
    "feed-forward per modality": ("early", {"per_modality": "feed_forward"}),
    "mixture of transformers": ("late", {"per_modality": "block"}),
    "images on a grid": ("late", {"image_positions": "grid"}),
    "causal images": ("early", {"image_mask": "causal", "image_positions": "grid"}),
}


def make_model(variant: str) -> MultimodalModel:
    architecture, settings = VARIANTS[variant]
    return MultimodalModel(model_config(architecture, **copy.deepcopy(settings)), seed=3).double().requires_grad_(False)


def prompt(spans: list[list[int] | None], seed: int = 0) -> Prompt:
    """Of text tokens, and of images (None)."""
    tokens, layout = [BOS], [1]
    for span in spans:
        layout += [-PATCHES, 1] if span is None else []
        text = [IMAGE_END] if span is None else span
        tokens += text
        if span is not None:
            layout[-1] += len(text)
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (PATCHES * sum(s is None for s in spans), 192), dtype=np.uint8)
    example = Example(id="", tokens=np.array(tokens, np.int32), layout=np.array(layout, np.int32), images=[])
    grids = np.full((len(patches) // PATCHES, 2), 2, np.int32)
    return Prompt(example=example, patches=patches, grids=grids)


PROMPTS = [
    prompt([None, [9, 10]]),
    prompt([[7, 8, 9, 10, 11, 12, 13]]),
    prompt([[20], None, [21, 22], None], seed=1),
    prompt([]),
]


def whole_logits(model: MultimodalModel, one: Prompt) -> torch.Tensor:
    return model.logits(prompt_batch([one]), torch.float64)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_are_those_of_the_whole_row(variant):
    """Ragged prompts at once, then a token at a time; rows that end do not disturb the others."""
    model, rows = make_model(variant), list(PROMPTS)
    cache = KeyValueCache(model, len(rows), 32, torch.float64, "cpu")
    found = cache.logits(prompt_batch(rows))
    lengths = torch.tensor([row.length for row in rows])
    active = torch.tensor([True] * len(rows))
    for step in range(4):
        for b, row in enumerate(rows):
            if active[b]:
                assert torch.allclose(found[b].double(), whole_logits(model, row)[-1], atol=1e-5), (variant, step, b)
        tokens = torch.tensor([30 + step + b for b in range(len(rows))])
        active[step] = step != 1  # each ends at another step, the first twice over
        found = cache.logits(token_batch(tokens, lengths, active, 192))
        rows = [r.with_text([int(t)]) if on else r for r, t, on in zip(rows, tokens, active, strict=True)]
        lengths += active
    assert model.logits(prompt_batch(rows), torch.float64).isfinite().all()  # the model is as it was


@pytest.mark.parametrize("variant", ["early", "late", "mixture of transformers", "images on a grid", "causal images"])
def test_an_image_may_enter_after_text(variant):
    """In pieces at other places than the whole: text, an image, text; positions of the image see each other."""
    model = make_model(variant)
    whole = prompt_batch([PROMPTS[2]])
    length = PROMPTS[2].length
    cache = KeyValueCache(model, 1, length, torch.float64, "cpu")
    for start, stop in ((0, 2), (2, 2 + PATCHES), (2 + PATCHES, 5 + PATCHES), (5 + PATCHES, length)):
        is_mine = (whole.patch_index >= start) & (whole.patch_index < stop)
        part = {name: getattr(whole, name)[:, start:stop] for name in ("tokens", "positions", "targets", "source")}
        part |= {name: getattr(whole, name)[:, start:stop] for name in ("label_kind", "lo", "hi")}
        index = whole.patch_index[is_mine] - start
        none = torch.zeros(0, dtype=torch.int64)
        images = {"patches": whole.patches[is_mine], "grids": whole.grids[: int(is_mine.any())]}
        found = cache.logits(Batch(**part, **images, patch_index=index, label_index=none))
        assert torch.allclose(found[0].double(), whole_logits(model, PROMPTS[2])[stop - 1], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sampling": Sampling(temperature=0.8, top_p=0.9, seed=4)}])
def test_answers_depend_neither_on_the_batch_nor_on_the_cache(options):
    model = make_model("early")
    options = {"max_length": 30, "dtype": torch.float64, **options}
    together = generate(model, PROMPTS, 12, **options)
    assert together == generate(model, PROMPTS, 12, cache=False, **options)
    for number in (3, 0, 2):
        assert [together[number]] == generate(model, [PROMPTS[number]], 12, numbers=[number], **options)
    assert len({tuple(ids) for ids in together}) > 1
    assert not {token for ids in together for token in ids} & set(NEVER)
    if options.get("sampling"):
        other = Sampling(temperature=0.8, top_p=0.9, seed=5)
        assert generate(model, PROMPTS, 12, **options | {"sampling": other}) != together


def test_rows_end_at_a_stop_token_and_at_the_length_of_a_row():
    model = make_model("early")
    options = {"max_length": 14, "dtype": torch.float64}
    free = generate(model, PROMPTS, 40, stop=(), **options)
    assert [len(ids) for ids in free] == [14 - p.length for p in PROMPTS]
    stop = free[1][2]
    first = free[1].index(stop)
    assert generate(model, PROMPTS, 40, stop=(stop,), **options)[1] == free[1][:first]
    steps = list(stream(model, PROMPTS, 40, stop=(stop,), **options))
    assert [step[1] for step in steps] == [*free[1][: first + 1], *[None] * (len(steps) - first - 1)]
    assert list(stream(model, [prompt([[7] * 13])], 5, **options)) == []  # no room at all


def test_draws_follow_the_probabilities():
    """Against the definition, written with loops; and tokens outside of the nucleus are never drawn."""
    logits = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0, 2.0, 0.5, 1.5, -3.0]])
    temperature, top_p, draws = 0.7, 0.8, 4000
    weights = {i: float(np.exp(logits[0, i].item() / temperature)) for i in range(9) if i not in NEVER}
    total, kept = sum(weights.values()), {}
    for i in sorted(weights, key=lambda i: -weights[i]):
        if sum(kept.values()) / total >= top_p:
            break
        kept[i] = weights[i]
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=1), [0])
    counts = Counter(int(sampler.choose(logits.clone())) for _ in range(draws))
    assert set(counts) == set(kept)
    for i, weight in kept.items():
        share = weight / sum(kept.values())
        assert abs(counts[i] / draws - share) < 4 * (share * (1 - share) / draws) ** 0.5
    assert int(Sampler(Sampling(), [0]).choose(logits.clone())) == 5


def test_bad_sampling_is_refused():
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(InputError, match=r"--(temperature|top-p): "):
            Sampling(**wrong)


def test_likelihood_of_answers():
    model, answers = make_model("early"), [[9, 10, 11], [12], [13, 14]]
    found = log_likelihood(model, PROMPTS[0], answers, torch.float64)
    for answer, got in zip(answers, found, strict=True):
        want, row = 0.0, PROMPTS[0]
        for token in answer:
            want += whole_logits(model, row)[-1].log_softmax(-1)[token].item()
            row = row.with_text([token])
        assert got.item() == pytest.approx(want, abs=1e-9)


def test_metrics_of_tasks():
    assert vqa_accuracy("The Red!", ["red"]) == 1 and vqa_accuracy("blue", ["red", "green"]) == 0
    ten = ["red"] * 2 + ["blue"] * 8
    assert vqa_accuracy("red", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    references = [["a red square on a table"], ["two green circles in the sky"], ["a dog sleeps under a tree"]]
    right = cider([some[0] for some in references], references)
    assert right == pytest.approx(10.0) and cider(["a", "red", "two"], references) < right / 10


# ---- the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run, with pictures and questions beside it."""
    folder = make_words(tmp_path_factory.mktemp("generation"))
    trainer(folder, folder / "run", **{"train.steps": 6, "eval.rows": 2}).run()
    return folder


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the tool, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["generate.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            exit_on_error(tool.main)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def test_an_answer_is_printed_the_same_with_and_without_cache(run):
    options = ["--prompt", "red <image> blue", "--image", run / "a.png", "--max-new-tokens", 12, "--temperature", 1]
    code, text, err = call(run / "run", *options)
    assert code == 0 and text.endswith("\n") and len(text) > 3, err
    assert call(run / "run", *options, "--no-cache")[:2] == (0, text)
    newest = (run / "run" / "checkpoints" / "latest").read_text().strip()
    assert call(run / "run" / "checkpoints" / newest, *options)[:2] == (0, text)
    assert call(run / "run", *options, "--seed", 9)[1] != text
    stop = text.strip()[2]
    assert call(run / "run", *options, "--stop", stop)[1].rstrip("\n") == text.split(stop)[0]


def test_a_file_of_prompts(run):
    lines = [
        {"prompt": "", "images": ["a.png"], "id": 7},
        {"prompt": "red <image> and <image>", "images": ["a.png", "b.png"]},
        {"prompt": "blue", "image": "b.png"},
    ]
    (run / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--jsonl", run / "in.jsonl", "--max-new-tokens", 8, "--temperature", 1, "--seed", 2]
    code, text, err = call(run / "run", *options)
    answers = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and [{k: a[k] for k in line} for a, line in zip(answers, lines, strict=True)] == lines, err
    assert all(isinstance(answer["generated"], str) for answer in answers)
    assert call(run / "run", *options, "--batch-size", 2, "--out", run / "out.jsonl")[0] == 0
    assert [json.loads(line) for line in (run / "out.jsonl").read_text().splitlines()] == answers


def test_tasks_are_scored(run):
    lines = [{"prompt": "red", "choices": ["blue", "green circle"], "answer": n, "answers": ["blue"]} for n in (0, 1)]
    (run / "task.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, text, err = call(run / "run", "--jsonl", run / "task.jsonl", "--task", "choice")
    assert code == 0 and "choice: 0.5000 over 2 prompts" in err
    assert {json.loads(line)["generated"] for line in text.splitlines()} <= {"blue", "green circle"}
    for task in ("vqa", "caption"):
        code, _, err = call(run / "run", "--jsonl", run / "task.jsonl", "--task", task, "--max-new-tokens", 4)
        assert code == 0 and f"{task}: 0.0000 over 2 prompts" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x <image>"], "1 places <image> for 0 images"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png: cannot be read"),
        (["--prompt", "red " * 100], "leave no room in the rows of 64"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: -1 is not a number from 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: 0 is not positive"),
        (["--prompt", "x", "--task", "vqa"], "only with --jsonl"),
        (["--jsonl", "{run}/bad.jsonl"], "bad.jsonl:2: expected a mapping with"),
        (["--jsonl", "{run}/odd.jsonl", "--task", "choice"], "odd.jsonl:1: choices: expected a list"),
        (["--prompt", "x", "--tokenizer", "{run}/a.png"], "a.png: not a tokenizer.json"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message):
    (run / "bad.jsonl").write_text('{"prompt": "a"}\n["b"]\n')
    (run / "odd.jsonl").write_text('{"prompt": "a"}\n')
    code, _, err = call(run / "run", *[str(a).format(run=run) for a in arguments])
    assert code == 2 and message in err and "Traceback" not in err


def test_the_run_itself_says_its_tokenizer_and_fit(run, tmp_path):
    """Whether its data are at hand, only its record is, or only the data are; images as the source with images."""
    record = json.loads((run / "run" / "run.json").read_text())
    record["fingerprints"]["caption"]["preprocessing"] = preprocessing_fingerprint(16, 8, "crop")  # text: the default
    shutil.copytree(run / "run", tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert load_for_generation(tmp_path / "run").prompts.fit == "crop"
    (tmp_path / "run" / "run.json").unlink()
    assert load_for_generation(tmp_path / "run").prompts.fit == DEFAULT_FIT

    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(run), "/nowhere"))
    with pytest.raises(InputError, match="--tokenizer"):
        load_for_generation(tmp_path / "run")
    for with_record in (False, True):
        if with_record:
            del record["fingerprints"]["text"]
            (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        loaded = load_for_generation(tmp_path / "run", tokenizer=run / "tokenizer.json")
        assert loaded.prompts.fit == ("crop" if with_record else DEFAULT_FIT)
    train_tokenizer(["other words altogether " * 9], 300, tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="not the tokenizer on which"):
        load_for_generation(tmp_path / "run", tokenizer=tmp_path / "tokenizer.json")


def test_images_of_several_fits_need_a_choice(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    record = json.loads((run / "run" / "run.json").read_text())
    record["fingerprints"]["more"] = record["fingerprints"]["caption"] | {
        "preprocessing": preprocessing_fingerprint(16, 8, "squash")
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"--fit: .*caption: pad, more: squash"):
        load_for_generation(tmp_path / "run")
    assert load_for_generation(tmp_path / "run", fit="squash").prompts.fit == "squash"


def test_prompts_are_what_preparation_makes(run):
    """Squashed, stored as it is stored, cut into patches; the tokens around it."""
    made = PromptMaker(Tokenizer(run / "tokenizer.json"), 16, 8, "squash").make("red <image> blue", [run / "a.png"])
    assert made.example.layout[1] == -PATCHES and made.patches.shape == (PATCHES, 192)
    assert (made.patches.reshape(-1, 3) == [255, 0, 0]).all()
    batch = prompt_batch([made])
    assert (batch.tokens == IMAGE).sum() == PATCHES and batch.tokens[0, 0] == BOS and EOS not in batch.tokens
    assert batch.tokens[0, int(batch.patch_index[-1]) + 1] == IMAGE_END


def test_experts_are_chosen_as_at_the_end_of_training(run, tmp_path):
    """The bias that balances them is no parameter, but part of what was learnt: also in a folder of safetensors."""
    experts = {"model.experts.num": 4, "model.experts.hidden": 8, "model.experts.bias_rate": 0.05}
    trained = trainer(run, tmp_path / "run", **experts, **{"train.steps": 6, "eval.rows": 2})
    trained.run()
    convert(tmp_path / "run", "megamm", tmp_path / "folder")
    wanted = trained.model.state_dict()
    assert any(name.endswith("bias") and tensor.abs().max() > 0.04 for name, tensor in wanted.items())
    for place, tokenizer in (("run", None), ("folder", run / "tokenizer.json")):
        found = load_for_generation(tmp_path / place, tokenizer=tokenizer).model.state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    again = {"start.weights": tmp_path / "folder", "train.steps": 1, "train.seed": 5, "optimizer.lr": 1e-9}
    begun = trainer(run, tmp_path / "begun", **experts, **again)
    start_from(begun.model, begun.config, begun.world)
    assert all(torch.equal(begun.model.state_dict()[name], tensor) for name, tensor in wanted.items())
