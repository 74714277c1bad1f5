"""Write a plan: plan.json for programs, plan.md for decision makers, train.yaml for megamm.train where it can."""

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megamm_laws.pictures.units import count, power

from megamm.config import Config
from megamm.errors import InputError
from megamm.files import write_json, write_text
from megamm.planning.inputs import PlanRequest
from megamm.planning.sizes import Buildable
from megamm.planning.transfer import SPAN
from megamm.settings import build, merge
from megamm.yaml_text import dump_yaml

KIND_WORDS = 4
"""Of a long warning of a fit, on the page."""
BATCH_ROWS = 2048
FEWEST_STEPS = 2000
WARMUP_STEPS = 1000


def write_plan(folder: Path | str, plan: dict[str, Any], request: PlanRequest, base: dict[str, Any]) -> list[Path]:
    """Write the files into ``folder``, each whole or not at all; ``base`` is the base config's mapping.

    Where the plan says that its model cannot be trained by megamm there is no train.yaml, and one of an earlier plan
    is removed, as it would be taken for this one's.

    Raises:
        InputError: ``folder`` is a file, or the config that results is not valid.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out names a folder")
    plan = dict(plan)
    model = plan.pop("build")
    page, config = to_markdown(plan), folder / "train.yaml"
    if plan["no_train_config"]:
        config.unlink(missing_ok=True)
    else:
        values = train_values(plan, model, request, base)
        # Only to check it, before anything is written.
        build(Config, values, where="train.yaml")
        size = f"{plan['model']['params']:,} parameters, {count(plan['model']['tokens'])} tokens"
        header = f"# {size}; written by plan_training.py\n"
        write_text(config, header + dump_yaml(values))
    write_text(folder / "plan.md", page)
    write_json(folder / "plan.json", plan)  # last: whoever finds it finds the rest
    written = [folder / "plan.json", folder / "plan.md"]
    return written if plan["no_train_config"] else [*written, config]


def train_values(plan: dict[str, Any], model: Buildable, request: PlanRequest, base: dict[str, Any]) -> dict[str, Any]:
    """The training config: ``base`` with the planned model, length, learning rate and layout.

    The batch is that of ``base``, or 2048 rows, halved until the run has 2000 steps.
    """
    config, tokens = model.config, plan["model"]["tokens"]
    names = ("architecture", "width", "depth", "head_dim", "hidden_multiple", "vocab_size", "image_size", "patch_size")
    shape: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.architecture == "late":
        shape["vision"] = dataclasses.asdict(config.vision)
    train = {"run_dir": "runs/full", "tokens": float(f"{tokens:.6g}"), "dtype": "bfloat16", "compile": True}
    row_length = (base.get("data") or {}).get("row_length", 1024)
    rows = (base.get("train") or {}).get("batch_rows", BATCH_ROWS)
    if "batch_rows" not in (base.get("train") or {}):
        while rows > 8 and tokens / (rows * row_length) < FEWEST_STEPS:
            rows //= 2
    train["batch_rows"] = rows
    steps = max(1, int(tokens / (rows * row_length)))
    if request.gpus:
        train["peak_flops"] = request.gpus[0].peak_flops
    values = {
        "model": shape,
        "data": {"row_length": row_length},
        "optimizer": {"lr": plan["model"]["peak_lr"]},
        "schedule": {"warmup_steps": min(WARMUP_STEPS, max(1, steps // 20))},
        "train": train,
    }
    if request.tensor_parallel > 1:
        values["parallel"] = {"tensor": request.tensor_parallel}
    result = copy.deepcopy(base)
    # The plan says how long to train, in tokens: the base's own steps must not stand beside them.
    (result.get("train") or {}).pop("steps", None)
    return merge(result, values)


# -------------------------------------------------------------------------------------------------- plan.md


def to_markdown(plan: dict[str, Any]) -> str:
    """The plan on one page."""
    budget, best, model = plan["budget"], plan["optimum"], plan["model"]
    lines = [
        f"# Training plan: {_budget(budget)}",
        "",
        *_refusal(plan),
        f"Group **{plan['group']}**, {plan['loss_column']} in nats per token; 95% intervals in brackets.",
        "",
        "| | compute-optimal | buildable model |",
        "| --- | --- | --- |",
        f"| FLOPs of the full run | {power(best['flops'])}{_ends(budget['flops']['interval'], power)} | the same |",
        f"| parameters | {_big(best['params'])} | {count(model['params'])} ({model['params']:,}) |",
        f"| tokens | {_big(best['tokens'])} | {count(model['tokens'])} |",
        f"| loss, by the law | {_loss(best['loss'])} | {_loss(model['loss'])} |",
        f"| loss of one run | | {_loss(model['loss_of_one_run'])} |",
        "",
        f"Model: {model['architecture']}, width {model['width']}, depth {model['depth']}, {model['heads']} heads of "
        f"{model['head_dim']}"
        + (f", vision width {model['vision_width']}" if model["vision_width"] else "")
        + f"; layout: tensor {model['layout']['tensor']} x data {model['layout']['data']}."
        + (" Not to be trained as it is: see the warnings." if plan["no_train_config"] else ""),
        "",
    ]
    lines += _choices(plan) + _hardware(plan) + _tradeoffs(plan) + _stages(plan)
    lines += ["## Assumptions", "", *(f"- {_escape(text)}" for text in plan["assumptions"]), ""]
    refused = tuple(f"no train.yaml: {text}" for text in plan["refused"])
    refused += tuple("extrapolation: " for text in plan["refused"] if text.startswith("extrapolation: "))
    warnings = [text for text in plan["warnings"] if not text.startswith(refused)]  # those are said at the top
    if warnings:
        lines += ["## Warnings", "", *(f"- {_escape(text)}" for text in _folded(warnings)), ""]
    return "\n".join(lines)


def _refusal(plan: dict[str, Any]) -> list[str]:
    """Before anything else: whether the rest is to be acted on."""
    if not plan["refused"]:
        return []
    reasons = [f"- {_escape(text)}" for text in plan["refused"]]
    return ["**Do not train by this plan.** It is written for a look, without a train.yaml:", "", *reasons, ""]


def _budget(budget: dict[str, Any]) -> str:
    if budget["given"] == "flops":
        return f"{power(budget['amount'])} FLOPs"
    return f"{_amount(budget['amount'])} {'GPU-hours' if budget['given'] == 'gpu_hours' else 'money'}"


def _folded(warnings: list[str]) -> list[str]:
    """Warnings with those of a fit in one line, by the words that each begins with: fits.md has them in full."""
    found: list[str] = []
    kinds: dict[str, Counter[str]] = {}
    for text in warnings:
        source, _, said = text.partition(": ")
        if not source.startswith("from the fit"):
            found.append(text)
            continue
        kind = re.split(r"[:;,=]", said)[0].split()
        short = " ".join(kind) if len(kind) <= KIND_WORDS else f"{' '.join(kind[:KIND_WORDS])} ..."
        kinds.setdefault(source, Counter())[short] += 1
    for source, of_source in kinds.items():
        listed = "; ".join(kind if times == 1 else f"{kind} ({times})" for kind, times in of_source.items())
        found.append(f"{source} (in full in fits.md): {listed}")
    return found


def _choices(plan: dict[str, Any]) -> list[str]:
    if len(plan["choices"]) < 2:
        return []
    lines = ["## Between the groups, at the same budget", "", "| group | N* | loss |", "| --- | --- | --- |"]
    lines += [f"| {_escape(c['group'])} | {_big(c['params'])} | {_loss(c['loss'])} |" for c in plan["choices"]]
    return [*lines, "", *(f"- {_escape(c['verdict'])}" for c in plan["choices"] if "verdict" in c), ""]


def _hardware(plan: dict[str, Any]) -> list[str]:
    if not plan["hardware"]:
        return []
    efficiency = plan["efficiency"]
    exact = "" if efficiency["interval"] else " (exact by assumption)"
    lines = [f"## The full run at an MFU of {efficiency['mfu']:.1%}{_ends(efficiency['interval'])}{exact}", ""]
    lines += [
        "| GPU | GPU-hours | days | money | MWh | least GPUs for the state |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for b in plan["hardware"]:
        money = "no price given" if b["money"] is None else _cost(b, "money")
        lines.append(
            f"| {b['gpu']} | {_cost(b, 'gpu_hours')} | {_cost(b, 'days')} on {b['num_gpus']} | {money} "
            f"| {_cost(b, 'megawatt_hours')} | {b['least_gpus']} |"
        )
    return [*lines, ""]


def _tradeoffs(plan: dict[str, Any]) -> list[str]:
    half, twice = (entry["excess_loss"] for entry in plan["wrong_size"])
    lines = [
        "## Trade-offs",
        "",
        f"- **A wrong size**, at the same budget: half of N* costs {_number(half, '.2%')} of the loss, twice N* "
        f"{_number(twice, '.2%')}.",
    ]
    if serving := plan["serving"]:
        best = serving["optimum"]
        lines += [
            f"- **Serving {count(serving['served_tokens'])} tokens**: cheapest for the same loss is N "
            f"{_big(best['params'])} on {_big(best['tokens'])} tokens; it saves {_percent(best['saved'])} of training "
            "and serving.",
        ]
    if repeated := plan["repeated_data"]:
        if repeated["short"]:
            split = repeated["best_split"]
            lines.append(
                f"- **{count(repeated['unique_tokens'])} unique tokens are short**: best is N {_big(split['params'])}, "
                f"{_number(split['epochs'])} epochs, loss {_loss(split['loss'])}; repetition costs "
                f"{_loss(repeated['loss_to_repetition'])} nats."
            )
        else:
            lines.append(
                f"- {count(repeated['unique_tokens'])} unique tokens suffice ({repeated['epochs']:.2f} epochs)."
            )
    data = plan["data_preparation"]
    if data["cpu_hours"] is None:
        lines.append(f"- **Data preparation**: {count(data['unique_tokens'])} tokens; not costed (give --prep-rate).")
    else:
        money = "" if data["money"] is None else f", {_amount(data['money'])} money"
        lines.append(
            f"- **Data preparation**: {count(data['unique_tokens'])} tokens, {_amount(data['cpu_hours'])} "
            f"CPU-hours{money} (at the stated rate)."
        )
    return [*lines, f"- **Native against LLM-initialised**: {_transfer(plan['transfer'])}", ""]


def _transfer(entry: dict[str, Any]) -> str:
    if "break_even_tokens" not in entry:
        return f"{entry['status']}."
    found = [f"{entry['status']}."]
    labels = {
        "llm_for_nothing": f"the LLM for nothing, gain below {entry['negligible_gain']:.2%} of the loss",
        "pretraining_counted": "the LLM's pretraining counted",
    }
    for key, value in entry["break_even_tokens"].items():
        ends = ", ".join(_token_bound(*end) for end in zip(value["interval"], value["interval_range"]))
        certain = "" if value["draws_agree"] >= 0.975 else f"; the side in only {value['draws_agree']:.0%} of draws"
        middle = _token_bound(value["tokens"], value["tokens_range"])
        where = f"no worse {value['native_ahead']} {middle} tokens"
        if value["interval_range"] == [value["tokens_range"]] * 2 and value["status"] != "break-even":
            worse = {"everywhere": "no worse anywhere", "nowhere": "worse everywhere"}[value["status"]]
            where = f"{worse} from {count(SPAN[0])} to {count(SPAN[1])} tokens, break-even"
        elif value["tokens"] is None:  # the draws do not agree that it lies out of range
            where = f"no worse {value['native_ahead']} the break-even, {middle} tokens"
        found.append(f"Native is {where} [{ends}] ({labels[key]}{certain}).")
    return " ".join(found)


def _token_bound(tokens: float | None, where: str) -> str:
    if tokens is not None:
        return count(tokens)
    return f"below {count(SPAN[0])}" if where == "below" else f"above {count(SPAN[1])}"


def _stages(plan: dict[str, Any]) -> list[str]:
    total, given = plan["total"], plan["budget"]["given"]
    within = f"{total['share_of_budget']:.1%} of the budget"
    if given == "flops":
        within = "pilot, mid run and branched cool-downs come on top of the budget, which is the full run's"
    lines = [f"## Stages: {power(total['flops'])} FLOPs{_costs(total)} in all, {within}", ""]
    for i, stage in enumerate(plan["stages"], 1):
        runs = stage["runs"]
        sizes, tokens = (
            " to ".join(dict.fromkeys(count(f([run[name] for run in runs])) for f in (min, max)))
            for name in ("params", "tokens")
        )
        number = "" if len(runs) == 1 else f"{len(runs)} runs, "
        lines += [
            f"{i}. **{stage['stage'].capitalize()}** ({power(stage['flops'])} FLOPs{_costs(stage)}): {number}{sizes} "
            f"parameters on {tokens} tokens. {_first_upper(stage['prediction'])}. Decides {stage['decides']}. "
            f"{_first_upper(stage['stop_rule'])}.",
        ]
    if plan["pilot_advice"]:
        lines += ["", f"{_first_upper(plan['pilot_advice'])}."]
    return [*lines, ""]


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _costs(entry: dict[str, Any]) -> str:
    """Money, or GPU-hours where no price is known, with its interval; nothing without a GPU."""
    if entry["gpu_hours"] is None:
        return ""
    return f", {_cost(entry, 'gpu_hours')} GPU-hours" if entry["money"] is None else f", {_cost(entry, 'money')} money"


def _cost(entry: dict[str, Any], name: str) -> str:
    ends = entry[f"{name}_interval"]
    return _amount(entry[name]) + ("" if ends is None else f" [{_amount(ends[0])}, {_amount(ends[1])}]")


def _ends(interval: Sequence[float | None] | None, form: str | Callable[[float], str] = ".3g") -> str:
    """The ends of an interval in brackets; ``form`` is a format or writes one number."""
    if interval is None:
        return ""
    write = form if callable(form) else lambda x: format(x, form)
    return f" [{', '.join('no bound' if x is None else write(x) for x in interval)}]"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(entry: dict[str, Any], form: str = ".3g") -> str:
    return ("inf" if entry["value"] is None else f"{entry['value']:{form}}") + _ends(entry["interval"], form)


def _big(entry: dict[str, Any]) -> str:
    """Parameters or tokens: 73B."""
    return ("inf" if entry["value"] is None else count(entry["value"])) + _ends(entry["interval"], count)


def _loss(entry: dict[str, Any]) -> str:
    return _number(entry, ".4f")


def _percent(entry: dict[str, Any]) -> str:
    return _number(entry, ".1%")


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
