"""Run tables: reading, checking, collecting and writing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from megamm_laws.runs import conventions
from megamm_laws.runs.collect import CollectOptions, collect, read_facts
from megamm_laws.runs.table import read_runs, suspected_duplicates, table_warnings, write_runs

from megamm.errors import InputError

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
        "lr": 0.001,
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
        ("params,tokens,loss,params_vision\n1e6,1e7,3,-1\n", ["line 2", "column params_vision", "zero or more"]),
        (
            "run,params,tokens,loss,flops_convention\na,1e6,1e7,3,paper\nb,1e6,2e7,3,exact\n",
            ["line 3", "run b", "flops_convention: exact", "line 2", "paper", "--flops-convention"],
        ),
        (
            "run,params,tokens,loss,measured_on\na,1e6,1e7,3,validation\nb,1e6,2e7,3,\nc,1e6,4e7,3,training\n",
            ["line 4", "run c", "measured_on: training", "line 2 (run a) has validation", "--loss"],
        ),
        (
            "run,params,tokens,loss,trunk\na,1e6,1e7,3,t\nb,1000000,1e7,3.0,u\n",
            ["line 3 (run b)", "column run", "line 2 (run a)", "duplicated run"],
        ),
        ("run,params,tokens,loss\nr1,1e300,1e7,3\n", ["line 2 (run r1)", "column params: 1e300", "1e-06 to 1e+40"]),
        ("run,params,tokens,loss\nr1,1e6,1e-300,3\n", ["line 2 (run r1)", "column tokens: 1e-300"]),
    ],
)
def test_bad_tables_name_line_run_and_column(tmp_path, text, expected):
    with pytest.raises(InputError) as caught:
        read_runs(table(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message and "runs.csv" in message
    for part in expected:
        assert part in message


def test_equal_losses_of_two_seeds_or_groups_are_no_duplicate(tmp_path):
    seeds = "run,seed,params,tokens,loss\na-0,0,1e6,1e7,3\na-1,1,1e6,1e7,3\n"
    groups = "run,architecture,params,tokens,loss\na,early,1e6,1e7,3\nb,late,1e6,1e7,3\n"
    for text in (seeds, groups):
        assert len(read_runs(table(tmp_path, text))) == 2


def test_warnings_of_runs_that_did_not_finish(tmp_path):
    head, rest = "run,params,tokens,loss,cooled,checkpoint\n", "c,1e6,4e7,3.1,true,final\n"
    runs = read_runs(table(tmp_path, head + "a,1e6,1e7,3.5,,intermediate\nb,1e6,2e7,3.3,false,final\n" + rest))
    early, uncooled = table_warnings(runs)
    assert "1 of 3 runs are intermediate checkpoints (the first: line 2 (run a))" in early
    assert "1 of 3 runs were not cooled down (the first: line 3 (run b))" in uncooled
    assert table_warnings(read_runs(table(tmp_path, head + rest))) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1e9,2e10,1.2e8", "FLOPs are not .1 to 10 times 6ND: FLOPs in TFLOP?"),  # 1.2e20
        ("1e9,2e10,1.2e5", "FLOPs in PFLOP?"),
        ("1e9,2e10,3e22", "FLOPs of another count, or params or tokens in another unit?"),
        ("1300,2e10,", "fewer than 1e+04 parameters: params in thousands?"),
        ("1.3,2e10,", "fewer than 1e+04 parameters: params in millions or billions?"),
        (
            "1e9,2e6,",
            "tokens per parameter outside 0.01 to 1e+06: tokens in millions or billions, or counted in steps?",
        ),
        ("1e5,2e12,", "tokens per parameter outside 0.01 to 1e+06: params in thousands or millions?"),
        ("1e9,2e10,1.2e20", None),
        ("2e4,1e8,", None),
    ],
)
def test_slips_of_units_are_warned_of(tmp_path, row, expected):
    path = table(tmp_path, f"run,params,tokens,flops,loss\na,{row},3\nb,1e9,1e10,6e19,2.9\n")
    lines = table_warnings(read_runs(path))
    assert (len(lines) == 0) if expected is None else ("1 of 2 runs: " in lines[0] and expected in lines[0])


@pytest.mark.parametrize(
    ("text", "embedding"),
    [
        ("model:\n  width: 8\n  vocab_size: 100\ndata:\n  width: 5\n", 1600),
        ("train: {}\nmodel:\n  tied_embeddings: true\n  width: 8\n  vocab_size: 100\n", 800),
        ("model: {width: 8, vocab_size: 100}\n", 1600),
        ("model:\n  width: 8\n  vocab_size: null\n", None),
    ],
)
def test_vocabulary_tables_are_counted_from_the_settings(tmp_path, text, embedding):
    (run_dir(tmp_path / "a", "a") / "config.yaml").write_text(text)
    (row,) = collect([tmp_path])[0]
    assert row.get("params_embedding") == embedding and row.get("params_head") == (800 if embedding else None)


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
    for file in ("config.yaml", "run.json"):
        (study / "runs" / "d" / file).write_text("{}")
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
        "cooled,trunk,lr,batch_tokens"
    )
    runs = read_runs(out)
    assert runs.numbers("loss").tolist() == [3.5, 3.2, 3.5]
    assert runs.rows[0]["cooled"] is True and runs.numbers("flops")[2] == 6e6 * 409600
    again, _ = collect([out])
    assert [(r["run"], r["loss"], r["trunk"]) for r in again] == [(r["run"], r["loss"], r["trunk"]) for r in rows]
    with_trunk, _ = collect([study], CollectOptions(include_uncooled=True))
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
    [
        ({"loss": float("nan")}, "column loss: nan"),
        ({"tokens": None}, "no field tokens"),
        ({"params": "many"}, "many"),
        ({"losses": [1]}, "losses: expected a mapping of sources, found \\[1\\]"),
        ({"branch_from": 5}, "branch_from: 5 is not the folder"),
    ],
)
def test_bad_results_name_the_file(tmp_path, change, expected):
    folder = run_dir(tmp_path / "a", "a", **change)
    with pytest.raises(InputError, match=expected) as caught:
        collect([tmp_path])
    assert str(folder / "result.json") in str(caught.value)


def tool(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "collect_runs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


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


# ---------------------------------------------------------------------------------------------- conventions

LATE = {
    "run": "late-1",
    "architecture": "late",
    "params": 1000.0,
    "params_active": 1000.0,
    "params_embedding": 300.0,
    "params_head": 150.0,
    "params_vision": 200.0,
    "tokens": 50.0,
    "tokens_vision": 20.0,
    "flops_exact": 123456.0,
}


@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("paper", 1000, 6 * (800 * 50 + 200 * 20)),  # DESIGN of the ladder: 6 (N_v D_v + N D)
        ("6nd", 1000, 6 * 1000 * 50),
        ("active", 1000, 6 * (800 * 50 + 200 * 20)),
        ("decoder", 1000, 6 * 800 * 50),
        ("no-embedding", 700, 6 * (500 * 50 + 200 * 20)),
        ("with-head", 850, 6 * (650 * 50 + 200 * 20)),
        ("exact", 1000, 123456),
    ],
)
def test_conventions_count_late_fusion(name, params, flops):
    row = conventions.convert_row(LATE, name)
    assert (row["params"], row["flops"], row["flops_convention"]) == (params, flops, name)
    back = conventions.convert_row(row, "paper")
    assert (back["params"], back["flops"]) == (1000, 6 * (800 * 50 + 200 * 20))


def test_conventions_count_active_experts():
    row = {"architecture": "moe", "params": 1000.0, "params_active": 300.0, "tokens": 50.0}
    assert conventions.convert_row(row, "paper")["flops"] == 6 * 300 * 50
    assert conventions.convert_row(row, "active")["params"] == 300
    assert conventions.convert_row(row, "6nd")["flops"] == 6 * 1000 * 50
    assert conventions.convert_row(conventions.convert_row(row, "active"), "6nd")["params"] == 1000


@pytest.mark.parametrize(
    ("architecture", "name", "column"),
    [
        ("early", "no-embedding", "params_embedding"),
        ("early", "exact", "flops_exact"),
        ("late", "paper", "params_vision"),
        ("moe", "paper", "params_active"),
    ],
)
def test_a_missing_count_names_run_and_column(tmp_path, architecture, name, column):
    path = table(tmp_path, f"run,architecture,params,tokens,loss\na,{architecture},1e6,1e7,3\n")
    with pytest.raises(InputError, match=rf"line 2: run a: column {column} is missing.*--facts"):
        collect([path], CollectOptions(convention=name))


def test_tables_of_two_conventions_are_refused_and_can_be_converted(tmp_path):
    exact = [conventions.convert_row(LATE | {"loss": 3.0, "mixture": "m"}, "exact")]
    paper = [conventions.convert_row(LATE | {"loss": 2.9, "mixture": "m", "run": "late-2"}, "paper")]
    write_runs(tmp_path / "exact.csv", exact)
    write_runs(tmp_path / "paper.csv", paper)
    paths = [tmp_path / "exact.csv", tmp_path / "paper.csv"]
    with pytest.raises(InputError, match=r"run late-2: column flops_convention: paper, but .*late-1 has exact: mixed"):
        collect(paths)
    rows, _ = collect(paths, CollectOptions(convention="decoder"))
    assert [row["flops"] for row in rows] == [6 * 800 * 50] * 2
    write_runs(tmp_path / "both.csv", exact + paper)
    with pytest.raises(InputError, match=r"both\.csv: line 3 \(run late-2\): column flops_convention"):
        read_runs(tmp_path / "both.csv")
    with pytest.raises(InputError, match=r"both\.csv line 3: run late-2: column flops_convention"):
        collect([tmp_path / "both.csv"])
    assert collect([tmp_path / "both.csv"], CollectOptions(convention="decoder"))[0][1]["flops"] == 6 * 800 * 50


def test_given_flops_are_named_by_what_they_agree_with(tmp_path):
    path = table(tmp_path, "run,params,tokens,loss,flops\na,1e6,1e7,3,6e13\n")
    assert collect([path])[0][0]["flops_convention"] == "paper"
    path = table(tmp_path, "run,params,tokens,loss,flops\na,1e6,1e7,3,7e13\n")
    assert collect([path])[0][0]["flops_convention"] == "given"
    path = table(tmp_path, "run,architecture,params,tokens,loss\na,late,1e6,1e7,3\n")
    assert collect([path])[0][0]["flops_convention"] == "6nd"


def test_a_convention_named_without_flops_counts_them(tmp_path):
    log = tmp_path / "history.jsonl"
    log.write_text('{"_step": 1, "val/loss": 3.0, "tokens": 1e7, "params": 1e6}\n')
    row = collect([log], CollectOptions(facts={"*": {"flops_convention": "6nd"}}))[0][0]
    assert row["flops"] == 6e13 and row["flops_convention"] == "6nd"
    with pytest.raises(InputError, match="column flops_convention: 'foo' is unknown; known: paper"):
        collect([log], CollectOptions(facts={"*": {"flops_convention": "foo"}}))
    with pytest.raises(InputError, match="column flops is missing"):
        collect([log], CollectOptions(facts={"*": {"flops_convention": "given"}}))


def test_conversions_are_shown():
    lines = conventions.conversion_lines([conventions.convert_row(LATE, "paper")])
    assert "late: counted as decoder, FLOPs x0.9091" in lines
    assert "late: counted as no-embedding, FLOPs x0.6591, params x0.7" in lines
    assert not any("active" in line or "paper" in line for line in lines)


def test_intermediate_checkpoints_of_our_runs(tmp_path):
    folder = run_dir(tmp_path / "a", "a", params_vision=1000, tokens_vision=204800, flops_exact=9e11)
    lines = [
        {"step": 50, "tokens": 204800, "loss": 4.1, "flops": 1e12, "flops_exact": 5e11},
        {"step": 50, "tokens": 204800, "val/text/loss": 4.2, "val/text/text": 4.2, "val/pages/loss": 3.8},
        {"step": 100, "tokens": 409600, "loss": 3.5, "flops": 2e12, "flops_exact": 1e12},
        {"step": 100, "tokens": 409600, "val/text/loss": 4.0, "val/pages/loss": 3.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    rows, _ = collect([tmp_path], CollectOptions(include_intermediate=True))
    assert [(r["run"], r["checkpoint"], r["cooled"]) for r in rows] == [
        ("a@50", "intermediate", False),
        ("a", "final", True),
    ]
    early = rows[0]
    assert early["loss"] == 4.0 and early["tokens_vision"] == 102400 and early["trunk"] == "a"
    assert (early["flops"], early["flops_exact"]) == (1e12, 5e11)
    assert len(collect([tmp_path])[0]) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"step": 50, "tok', "line 1: not JSON"),
        ("[1]", "line 1: expected a JSON object"),
        ('{"step": 50, "val/text/loss": 4.2}', "line 1: no field tokens"),
        ('{"tokens": 204800, "val/text/loss": 4.2}', "line 1: no field step"),
        ('{"step": 50, "tokens": 204800, "val/text/loss": NaN}', "line 1: column loss_text: nan is not a finite"),
        ('{"step": 50, "tokens": "many", "val/text/loss": 4.2}', "line 1: column tokens: 'many' is not a number"),
        ('{"step": 50, "tokens": 204800, "val/text/loss": [4]}', r"line 1: column loss_text: \[4\] is not a number"),
    ],
)
def test_damaged_metrics_name_the_line(tmp_path, line, expected):
    folder = run_dir(tmp_path / "a", "a")
    (folder / "metrics.jsonl").write_text(line + '\n{"step": 100, "tokens": 409600, "val/text/loss": 4.0}\n')
    with pytest.raises(InputError, match=rf"metrics\.jsonl: {expected}"):
        collect([tmp_path], CollectOptions(include_intermediate=True))
    assert len(collect([tmp_path])[0]) == 1


def test_a_run_under_two_names_is_noticed(tmp_path):
    path = table(tmp_path, "run,params,tokens,loss\na,1e6,1e7,3.25\nb,1e6,1e7,3.25\nc,1e6,1e7,3.2501\n")
    assert suspected_duplicates(collect([path])[0], ["a", "b", "c"]) == [
        "runs a and b have the same params, tokens and loss: one run twice?"
    ]
    done = tool(path, "--out", tmp_path / "out.csv")
    assert done.returncode == 0 and "note: runs a and b have the same" in done.stderr


def test_facts_file(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("run,params,architecture\na,2e6,early\nb,,late\n")
    assert read_facts(path) == {"a": {"params": 2e6, "architecture": "early"}, "b": {"architecture": "late"}}
    for text, message in (
        ("name,params\na,1\n", "line 1: no column run"),
        ("run,params\na,1\na,2\n", "line 3: run a twice"),
        ("run,params\na,1,7\n", "line 2: expected 2 cells as the header has, found more"),
        ("run,params\na\n", "line 2: expected 2 cells as the header has, found 1"),
        ("run,params\na,-1\n", r"line 2 \(run a\): column params: -1"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_facts(path)
    path.write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match=r"facts\.csv: not UTF-8 text"):
        read_facts(path)
    path.write_text("run,params\na," + "1" * 200_000 + "\n")
    with pytest.raises(InputError, match=r"facts\.csv: line 1: not valid CSV"):
        read_facts(path)


def test_facts_of_a_run_that_is_not_there_are_told(tmp_path):
    path = table(tmp_path, "run,params,tokens,loss\na,1e6,1e7,3\n")
    rows, left_out = collect([path], CollectOptions(facts={"a": {"width": "64"}, "A": {"width": "32"}}))
    assert rows[0]["width"] == "64" and left_out == ["facts of run A: no run of that name was taken in"]
    with pytest.raises(InputError, match="none of these runs was found: A; found a"):
        collect([path], CollectOptions(facts={"A": {"width": "32"}}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--set", "params=1", "--set", "params=2"), "--set: params is given twice"),
        (("--map", "loss=x", "--map", "lr=x"), "--map: x is given twice"),
    ],
)
def test_one_name_given_twice(tmp_path, given, expected):
    done = tool(table(tmp_path, "run,params,tokens,loss\na,1e6,1e7,3\n"), "--out", tmp_path / "o.csv", *given)
    assert done.returncode == 2 and expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_tool_converts_and_shows_it(tmp_path):
    run_dir(tmp_path / "study" / "a", "a", flops_exact=1.2e13)
    out = tmp_path / "runs.csv"
    done = tool(tmp_path / "study", "--out", out, "--flops-convention", "exact", "--set", "width=64")
    assert done.returncode == 0 and "counted as exact" in done.stdout
    assert "convention: early: counted as paper, FLOPs x0.2048" in done.stderr
    row = read_runs(out).rows[0]
    assert row["flops"] == 1.2e13 and row["width"] == "64"
    done = tool(tmp_path / "study", "--out", out, "--set", "width")
    assert done.returncode == 2 and "--set: width is not of the form NAME=VALUE" in done.stderr
