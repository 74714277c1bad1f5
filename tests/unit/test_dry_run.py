"""The dry run says what the run would do, refuse or waste, without doing it."""

import pytest
from run_factory import make_sources

from megamm import dry_run
from megamm.config import load
from megamm.dry_run import describe_run
from megamm.errors import InputError
from megamm.train import refusal

SIZES = ("--model.vocab_size=512", "--model.image_size=32", "--model.patch_size=8")
RUN = (
    "--model.width=16",
    "--model.depth=1",
    "--train.batch_rows=8",
    "--data.row_length=64",
    "--schedule.warmup_steps=0",
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = make_sources(tmp_path_factory.mktemp("data"))
    return f"--data.sources={{caption: {{path: {folder}/caption}}, text: {{path: {folder}/text}}}}"


def lines(*settings: str) -> dict[str, list[str]]:
    """Texts of each heading."""
    found: dict[str, list[str]] = {}
    for line in describe_run(load(None, [*RUN, *settings])).splitlines():
        found.setdefault(line[:20].strip(), []).append(line[20:])
    return found


def test_data_need_not_be_prepared_where_the_sizes_are_said(tmp_path):
    missing = f"--data.sources.pages.path={tmp_path / 'nowhere'}"
    found = lines(missing, *SIZES, "--train.steps=10")
    assert found["data"][0].startswith("not prepared here") and "epochs" not in found
    with pytest.raises(InputError, match=r"model\.vocab_size: set it"):
        lines(missing, *SIZES[1:], "--train.steps=10")


def test_epochs_are_counted_and_too_many_are_said(sources):
    one, many = (lines(sources, f"--train.steps={steps}") for steps in (10, 1000))
    times = [float(part.split()[1]) for part in one["epochs"][0].split(", ")]
    assert len(times) == 2 and all(0.5 < value < 3 for value in times) and "warning" not in one
    assert [line.partition(":")[0] for line in many["warning"]] == ["data.sources.caption", "data.sources.text"]
    told = float(many["warning"][0].split("read ")[1].split()[0])
    assert told == pytest.approx(100 * times[0], rel=0.02)


def test_a_document_longer_than_a_row_is_an_error(sources):
    with pytest.raises(InputError, match=r"more than data\.row_length 20; prepare with --max-length 20 or raise"):
        lines(sources, "--train.steps=10", "--data.row_length=20")


def test_less_than_one_batch_is_an_error(sources):
    with pytest.raises(InputError, match=r"train\.tokens: 100000 is less than one batch"):
        lines(sources, "--train.tokens=1e5", "--train.batch_rows=2048")


@pytest.mark.parametrize(("warmup", "told"), [(5, False), (6, True), (11, True)])
def test_a_warm_up_that_eats_the_run_is_said(sources, warmup, told):
    found = lines(sources, "--train.steps=10", f"--schedule.warmup_steps={warmup}")
    assert bool(found.get("warning")) == told


@pytest.mark.parametrize("backend", ["flash", "flex"])
def test_a_backend_that_cannot_train_here_is_said(sources, backend):
    settings = (sources, "--train.steps=10", f"--model.attention.backend={backend}")
    if not dry_run.torch.cuda.is_available():
        (line,) = lines(*settings)["warning"]
        assert "no GPU: model.attention.backend: " in line
    with pytest.raises(InputError, match=r"model\.attention\.backend"):
        lines(*settings, "--train.device=cpu")
    assert "model.attention.backend" in refusal(load(None, [*RUN, *settings, "--train.device=cpu"]), 1)


def test_memory_is_compared_with_the_device(sources, monkeypatch):
    small, large = ((sources, "--train.steps=10", "--train.device=cpu", f"--train.batch_rows={n}") for n in (8, 800))
    monkeypatch.setattr(dry_run, "memory_per_rank", lambda kind, ranks: 50 * 2**20)
    assert not any("memory" in line for line in lines(*small).get("warning", []))
    (line,) = [line for line in lines(*large)["warning"] if line.startswith("memory")]
    assert "memory is 50.0 MiB" in line and "train.micro_rows" in line
