"""Launching: two nodes on loopback, a rank that dies, exit codes, the example scripts, the Kubernetes manifest."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dataset_factory import make_dataset

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
SETTINGS = """
model: {width: 32, depth: 1, head_dim: 16, hidden_multiple: 16}
data: {row_length: 48, window_tokens: 4000, workers: 0, sources: {text: {path: %s/text}}}
schedule: {warmup_steps: 5}
train: {steps: %d, batch_rows: 4, log_every: 1, device: cpu}
eval: {rows: 4}
checkpoint: {every: 10}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("launch")
    make_dataset(place / "text", kind="text", num_documents=200)
    for name, steps in (("short", 8), ("long", 60)):
        (place / f"{name}.yaml").write_text(SETTINGS % (place, steps))
    return place


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **more}


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "loss" in r]


def torchrun(*arguments, module: str = "megamm.launch") -> list[str]:
    return list(map(str, [sys.executable, "-m", module, *arguments]))


def train(folder: Path, config: str, name: str) -> list[str]:
    return ["-m", "megamm.train", "--config", f"{folder}/{config}.yaml", f"--train.run_dir={folder}/{name}"]


def test_two_nodes_on_loopback_equal_one_node(folder):
    done = subprocess.run(
        torchrun("--standalone", "--nproc-per-node=2", *train(folder, "short", "one")),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    script = [LAUNCH / "torchrun.sh", folder / "short.yaml", f"--train.run_dir={folder}/two"]
    nodes = [
        subprocess.Popen(
            list(map(str, script)),
            stderr=subprocess.PIPE,
            text=True,
            env=environment(NODES="2", RANKS="1", HEAD="127.0.0.1:29731", JOB_ID="loopback"),
        )
        for _ in range(2)
    ]
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    assert losses(folder / "two") == losses(folder / "one")
    results = [json.loads((folder / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["megamm.launch", "torch.distributed.run"])
def test_a_rank_that_dies_is_replaced(folder, module):
    name = module.split(".")[0]
    if not (folder / "unbroken" / "result.json").exists():
        command = torchrun("--standalone", "--nproc-per-node=2", *train(folder, "long", "unbroken"))
        subprocess.run(command, env=environment(), check=True, timeout=300)
    command = torchrun(
        "--standalone", "--nproc-per-node=2", "--max-restarts=2", *train(folder, "long", name), module=module
    )
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while not list((folder / name).glob("checkpoints/step-*[0-9]")):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(_ranks_of(process.pid)[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert losses(folder / name) == losses(folder / "unbroken")


def _ranks_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"megamm.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_exit_codes_of_the_ranks_are_passed_on(folder):
    arguments = ["--standalone", "--nproc-per-node=1", "--no-python", "bash", "-c"]
    for code, passed in ((0, 0), (1, 1), (2, 2), (75, 75), (9, 1)):
        done = subprocess.run(torchrun(*arguments, f"exit {code}"), env=environment(), capture_output=True, text=True)
        assert done.returncode == passed, done.stderr[-2000:]
    stopped = environment(MEGAMM_STOPPED_CODE="203")
    assert subprocess.run(torchrun(*arguments, "exit 75"), env=stopped, capture_output=True).returncode == 203


def test_the_scripts_explain_themselves(tmp_path):
    for script, expected in (("torchrun.sh", "NODES     number of nodes"), ("slurm-study.sh", "STUDY.yaml OUT")):
        done = subprocess.run([LAUNCH / script], capture_output=True, text=True)
        assert done.returncode == 2 and expected in done.stdout and "set -" not in done.stdout
    done = subprocess.run([LAUNCH / "torchrun.sh", tmp_path / "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and "none.yaml: no such config" in done.stderr
    (tmp_path / "c.yaml").touch()
    done = subprocess.run(
        [LAUNCH / "torchrun.sh", tmp_path / "c.yaml"], capture_output=True, text=True, env=environment(NODES="2")
    )
    assert done.returncode == 2 and "HEAD: not set" in done.stderr


SLURM = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0")" in
scontrol) [ "$1" = show ] && printf 'node3\\nnode4\\n' || true ;;
srun) env | grep -E '^(NODES|HEAD|JOB_ID|SRUN_CPUS_PER_TASK)=' | sort >> "$CALLS"; exit "$SRUN_CODE" ;;
esac
"""


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_slurm_job_asks_to_be_queued_again_only_after_it_has_saved(tmp_path, code):
    for name in ("scontrol", "srun"):
        (tmp_path / name).write_text(SLURM)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    job = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_CPUS_PER_TASK": "7"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "SRUN_CODE": str(code)}
    done = subprocess.run([LAUNCH / "slurm.sbatch", "c.yaml", "--train.seed", "1"], env=environment(**job, **path))
    assert done.returncode == code
    lines = calls.read_text().splitlines()
    assert "srun --label --wait=0 examples/launch/torchrun.sh c.yaml --train.seed 1" in lines
    for expected in ("NODES=2", "HEAD=node3:23456", "JOB_ID=123456-0", "SRUN_CPUS_PER_TASK=7"):
        assert expected in lines
    assert ("scontrol requeue 123456" in lines) == (code == 75)


def _mismatches(value, schema: dict, where: str) -> list[str]:
    """What does not fit a schema of type, properties, required, items, enum, minimum and additionalProperties."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kinds = tuple(types[kind] for kind in schema["type"].split("|"))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        return [f"{where}: {value!r} is not of type {schema['type']}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    if "minimum" in schema and value < schema["minimum"]:
        return [f"{where}: {value} is below {schema['minimum']}"]
    found = []
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{where}.{name}: missing" for name in schema.get("required", []) if name not in value]
        for name, entry in value.items():
            inner = known.get(name, rest)
            found += _mismatches(entry, inner, f"{where}.{name}") if inner else [f"{where}.{name}: unknown"]
    if isinstance(value, list):
        found += [line for i, entry in enumerate(value) for line in _mismatches(entry, schema["items"], f"{where}.{i}")]
    return found


def test_the_kubernetes_manifest_fits_the_schema():
    schema = yaml.safe_load((ROOT / "tests" / "data" / "pytorchjob_schema.yaml").read_text())
    manifest = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    assert _mismatches(manifest, schema, "PyTorchJob") == []
    worker = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    settings = {entry["name"]: entry["value"] for entry in container["env"]}
    # The operator starts a pod again for exit codes of 128 and above only, and looks at the container `pytorch`.
    assert (container["name"], worker["restartPolicy"]) == ("pytorch", "ExitCode") and int(settings["STOPPED"]) >= 128
    assert settings["NODES"] == str(worker["replicas"]) and settings["RANKS"] == manifest["spec"]["nprocPerNode"]
    assert int(settings["RANKS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert settings["HEAD"] == f"{manifest['metadata']['name']}-worker-0:{container['ports'][0]['containerPort']}"
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert (ROOT / container["command"][0]).stat().st_mode & 0o111 and (ROOT / container["args"][0]).exists()
    broken = json.loads(json.dumps(manifest))
    broken["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] = "OnExit"
    del broken["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["image"]
    broken["spec"]["replicas"] = 4
    assert len(_mismatches(broken, schema, "PyTorchJob")) == 3
