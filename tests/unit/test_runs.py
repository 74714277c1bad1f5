"""Run tables: reading, checking, collecting and writing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megamm.errors import InputError
from megamm.scaling.collect import Options, collect
from megamm.scaling.runs import read_runs, write_runs

ROOT = Path(__file__).parents[2]


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def run_dir(folder: Path, name: str, **changes) -> Path:
    """A finished run directory as the trainer leaves it."""
    result = {
        "name": name,
        "architecture": "early",
        "mixture": "45-45-10",
        "steps": 100,
        "params": 1000000,
        "params_active": 1000000,
        "params_vision": 0,
        "tokens": 409600,
        "tokens_vision": 0,
        "flops": 6e6 * 409600,
        "loss": 3.5,
        "losses": {"text": {"loss": 4.0}, "pages": {"loss": 3.0, "kind": "interleaved"}, "stamps": {"loss": 3.5}},
        "batch_tokens": 4096,
        "branch_from": None,
        "trunk": False,
    } | changes
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {}\n")
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_flops_default_and_names(tmp_path):
    runs = read_runs(table(tmp_path, "params,tokens,loss,flops\n1e6,2e7,3.5,\n2e6,2e7,3.25,7e14\n"))
    assert runs.numbers("flops").tolist() == [6e6 * 2e7, 7e14]
    assert runs.names == ["line 2", "line 3"]


def test_blank_lines_and_byte_order_mark_are_accepted(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbfrun, params, tokens, loss\r\n\r\na, 1e6, 2e7, 3.5\r\n")
    runs = read_runs(path)
    assert runs.names == ["a"] and runs.lines == [3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params,loss\n1,2\n", ["line 1", "no column tokens"]),
        ("params,tokens,loss\n", ["no runs"]),
        ("run,params,tokens,loss\nr1,1e6,1e7,3\nr2,1e6,2e7,-3\n", ["line 3", "r2", "column loss", "-3"]),
        ("run,params,tokens,loss\nr1,1e6,1e7,nan\n", ["line 2", "r1", "column loss", "nan"]),
        ("run,params,tokens,loss\nr1,1e6,inf,3\n", ["line 2", "column tokens", "inf"]),
        ("run,params,tokens,loss\nr1,big,1e7,3\n", ["line 2", "column params", "'big'"]),
        ("run,params,tokens,loss\nr1,,1e7,3\n", ["line 2", "column params is empty"]),
        ("run,params,tokens,loss,loss_text\nr1,1e6,1e7,3,0\n", ["line 2", "column loss_text"]),
        ("run,params,tokens,loss\nr1,1e6,1e7,3\nr1,1e6,2e7,2.9\n", ["line 3", "column run", "line 2"]),
        ("params,tokens,loss\n1e6,1e7,3\n1e6,1e7,3\n", ["line 3", "line 2"]),
        ("params,tokens,loss\n1e6,1e7\n", ["line 2", "2 cells"]),
        ("params,tokens,loss,loss\n1,2,3,3\n", ["loss", "twice"]),
        ("params,tokens,loss,cooled\n1e6,1e7,3,maybe\n", ["line 2", "cooled", "'maybe'"]),
    ],
)
def test_bad_tables_name_line_run_and_column(tmp_path, text, expected):
    with pytest.raises(InputError) as caught:
        read_runs(table(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message and "runs.csv" in message
    for part in expected:
        assert part in message


def test_same_name_in_two_architectures_is_two_runs(tmp_path):
    text = "run,architecture,params,tokens,loss\nw64,early,1e6,1e7,3\nw64,late,1e6,1e7,3.1\n"
    assert list(read_runs(table(tmp_path, text)).groups("architecture")) == ["early", "late"]


def test_grouping_errors(tmp_path):
    runs = read_runs(table(tmp_path, "run,mixture,params,tokens,loss\na,x,1e6,1e7,3\nb,,1e6,2e7,3\n"))
    with pytest.raises(InputError, match=r"line 3 \(run b\): column 'mixture' is empty"):
        runs.groups("mixture")
    with pytest.raises(InputError, match="no column 'arch'"):
        runs.groups("arch")


def test_collect_round_trip(tmp_path):
    study = tmp_path / "study"
    trunk = run_dir(study / "trunks" / "t", "t", trunk=True, cooled=False, tokens=819200)
    run_dir(study / "runs" / "a", "a", branch_from=str(trunk))
    run_dir(study / "runs" / "b", "b", branch_from=str(trunk), tokens=819200, loss=3.2)
    run_dir(study / "runs" / "c", "c", flops=None, architecture="late")
    (study / "runs" / "d").mkdir()
    (study / "runs" / "d" / "config.yaml").write_text("{}")
    rows, left_out = collect([study, study / "runs"])
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    assert sum("unfinished" in line for line in left_out) == 1 and sum("not cooled" in x for x in left_out) == 1
    assert rows[0]["loss_text"] == 4.0 and rows[0]["loss_interleaved"] == 3.0 and rows[0]["loss_stamps"] == 3.5
    assert rows[0]["trunk"] == rows[1]["trunk"] == "study/trunks/t" and rows[2]["trunk"] is None
    out = tmp_path / "runs.csv"
    write_runs(out, rows)
    header = out.read_text().splitlines()[0]
    assert header == (
        "run,architecture,mixture,params,params_active,tokens,flops,loss,"
        "loss_text,loss_interleaved,loss_stamps,params_vision,tokens_vision,flops_convention,measured_on,checkpoint,"
        "cooled,trunk"
    )
    runs = read_runs(out)
    assert runs.numbers("loss").tolist() == [3.5, 3.2, 3.5]
    assert runs.rows[0]["cooled"] is True and runs.numbers("flops")[2] == 6e6 * 409600
    again, _ = collect([out])
    assert [(r["run"], r["loss"], r["trunk"]) for r in again] == [(r["run"], r["loss"], r["trunk"]) for r in rows]
    with_trunk, _ = collect([study], Options(include_uncooled=True))
    assert {row["trunk"] for row in with_trunk if row["run"] in "tab"} == {"study/trunks/t"}


def test_collect_merges_a_csv_and_refuses_one_name_for_two_runs(tmp_path):
    run_dir(tmp_path / "x" / "a", "a")
    other = table(tmp_path, "params,tokens,loss\n1e6,1e7,3\n")
    rows, _ = collect([tmp_path / "x", other])
    assert [row["run"] for row in rows] == ["a", "runs-2"]
    run_dir(tmp_path / "y" / "a", "a")
    with pytest.raises(InputError, match="run a is also in"):
        collect([tmp_path / "x", tmp_path / "y"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"loss": float("nan")}, "column loss: nan"), ({"tokens": None}, "no field tokens"), ({"params": "many"}, "many")],
)
def test_bad_results_name_the_file(tmp_path, change, expected):
    folder = run_dir(tmp_path / "a", "a", **change)
    with pytest.raises(InputError, match=expected) as caught:
        collect([tmp_path])
    assert str(folder / "result.json") in str(caught.value)


def tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "collect_runs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_tool(tmp_path):
    run_dir(tmp_path / "study" / "a", "a")
    run_dir(tmp_path / "study" / "t", "t", trunk=True, cooled=False)
    out = tmp_path / "runs.csv"
    done = tool(tmp_path / "study", "--out", out)
    assert done.returncode == 0 and "1 runs" in done.stdout
    assert "left out" in done.stderr and "not cooled" in done.stderr
    assert len(read_runs(out)) == 1
    before = out.read_text()
    (tmp_path / "study" / "a" / "result.json").write_text("{")
    done = tool(tmp_path / "study", "--out", out)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "result.json" in done.stderr
    assert out.read_text() == before
    done = tool(tmp_path / "missing", "--out", tmp_path / "new.csv")
    assert done.returncode == 2 and "does not exist" in done.stderr and not (tmp_path / "new.csv").exists()
