"""The loop: batch -> loss -> gradients -> step -> log -> checkpoint."""

import json
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megamm.config import AugmentConfig, Config
from megamm.data.loader import Loader, build_plan, open_sources
from megamm.data.tokens import MODALITIES
from megamm.errors import InputError, RunError
from megamm.files import write_json
from megamm.model.multimodal import MultimodalModel
from megamm.parallel.data import set_gradient_sync, shard_over_data
from megamm.parallel.mesh import World, init_world
from megamm.resolve import resolve_config
from megamm.scaling.flops import TokenStats, count_parameters, exact_flops_per_token, paper_flops
from megamm.training import checkpoint, run_dir
from megamm.training.evaluation import validation_loss
from megamm.training.metrics import MetricsLog
from megamm.training.optimizer import make_optimizer, set_learning_rate
from megamm.training.schedule import cooldown_start, learning_rate_factor


class Trainer:
    """One training run in one process of ``world``.

    Raises:
        InputError: bad settings or data, or a run directory of another config.
        RunError: another process is training there, or the loss became NaN.
    """

    def __init__(self, config: Config, world: World | None = None):
        torch.manual_seed(config.train.seed)
        if not config.data.sources:
            raise InputError("data.sources: empty; name at least one prepared dataset (see tools/prepare_data.py)")
        self.world = world or init_world(config)
        self.datasets = open_sources(config.data, "train")
        self.config = resolve_config(config)
        self.run_dir = Path(config.train.run_dir)
        self.steps = config.train.steps
        self.dtype = getattr(torch, config.train.dtype)
        self.sources = list(config.data.sources)
        if config.train.batch_rows % self.world.size:
            raise InputError(
                f"train.batch_rows: {config.train.batch_rows} is not a multiple of the {self.world.size} ranks"
            )
        self.params = count_parameters(config.model)
        self.model = MultimodalModel(config.model, len(self.sources)).to(self.world.device)
        shard_over_data(self.model, self.world.mesh, self.dtype)
        if config.train.compile:
            for block in [*getattr(self.model.vision, "blocks", []), *self.model.blocks]:
                block.compile()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.step = 0
        # Totals over all ranks: positions without padding, patches, labels, and pairs that attention sees.
        self.totals = {"tokens": 0, "patches": 0, "labels": 0, "pairs": 0, "positions": 0}
        self.grad_norms = torch.zeros((), device=self.world.device)  # their sum: not finite if any was not
        self.window = torch.zeros(2, len(self.sources), len(MODALITIES), device=self.world.device)

    # ---- the run -------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Train to the end, from a checkpoint where there is one; returns what result.json holds."""
        with run_dir.lock(self.run_dir) if self.world.rank == 0 else nullcontext():
            result = self.run_dir / "result.json"
            if self.world.rank == 0:
                run_dir.claim(self.run_dir, self.config, self.params, self.world.size, self.world.device)
            self.world.barrier()
            if result.exists():
                return json.loads(result.read_text())
            self._restore()
            log = MetricsLog(self.run_dir, self.step) if self.world.rank == 0 else None
            try:
                self._loop(log)
                return self._finish(log)
            finally:
                if log:
                    log.close()

    def _loop(self, log: MetricsLog | None) -> None:
        config = self.config
        plan = build_plan(
            self.datasets, [s.weight for s in config.data.sources.values()], config.data,
            cache_dir=self.run_dir / "pack_plan", num_rows=self.steps * config.train.batch_rows, world=self.world,
        )  # fmt: skip
        loader = Loader(
            plan, self.datasets, config.data, global_batch_rows=config.train.batch_rows, rank=self.world.rank,
            num_ranks=self.world.size, micro_rows=config.train.micro_rows, start_step=self.step, end_step=self.steps,
        )  # fmt: skip
        marker = (time.perf_counter(), dict(self.totals), self.step)
        with self._progress() as advance:
            for micro_batches in loader:
                grad_norm = self.train_step(micro_batches)
                advance(self.step)
                if self.step % config.train.log_every == 0 or self.step == self.steps:
                    record = self._record(grad_norm, marker, loader.wait_seconds())
                    marker = (time.perf_counter(), dict(self.totals), self.step)
                    if log:
                        log.write(record)
                if config.eval.every and self.step % config.eval.every == 0 and self.step < self.steps:
                    self._log_validation(log, self.validate())
                    marker = (time.perf_counter(), dict(self.totals), self.step)
                if self._checkpoint_due():
                    self._save()

    def train_step(self, micro_batches: list) -> torch.Tensor:
        """One optimizer step on this rank's micro-batches; returns the gradient norm (a device scalar)."""
        counts = torch.tensor([self._count(batch) for batch in micro_batches], dtype=torch.int64).sum(0)
        counts = self.world.all_reduce(counts).tolist()
        for name, value in zip(self.totals, counts, strict=True):
            self.totals[name] += value
        # FSDP averages gradients over ranks; the loss is a sum over all labels of the global batch.
        scale = self.world.size / max(1, counts[2])
        factor = learning_rate_factor(self.config.schedule, self.step, self.steps)
        set_learning_rate(self.optimizer, factor)
        split = torch.zeros_like(self.window)
        for i, batch in enumerate(micro_batches):
            set_gradient_sync(self.model, i == len(micro_batches) - 1)
            output = self.model(batch.to(self.world.device), self.dtype)
            (output.loss * scale).backward()
            split += torch.stack((output.sums, output.counts))
        self.window += self.world.all_reduce(split)
        clip = self.config.optimizer.clip or float("inf")
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        self.grad_norms += grad_norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return grad_norm

    def validate(self, swapped: bool = False) -> dict[str, dict[str, float]]:
        """Losses of each source on its val split (see ``validation_loss``)."""
        config, results = self.config, {}
        per_rank = -(-config.eval.rows // self.world.size)
        micro = min(per_rank, config.train.micro_rows or config.train.batch_rows // self.world.size)
        model = config.model
        patches = (model.image_size // model.patch_size) ** 2 if swapped else 0
        for name, dataset in zip(self.sources, open_sources(config.data, "val"), strict=True):
            if swapped and not dataset.info["splits"]["val"]["num_images"]:
                continue
            data = replace(
                config.data,
                sources={name: config.data.sources[name]},
                workers=0,
                augment=AugmentConfig(),
            )
            rows = per_rank * self.world.size
            plan = build_plan(
                [dataset], [1.0], data, cache_dir=self.run_dir / "pack_plan", num_rows=rows, world=self.world
            )
            loader = Loader(
                plan, [dataset], data, global_batch_rows=rows, rank=self.world.rank, num_ranks=self.world.size,
                micro_rows=micro, start_step=0, end_step=1,
            )  # fmt: skip
            batches = [batch for step in loader for batch in step]
            results[name] = validation_loss(self.model, batches, self.world, self.dtype, patches)
        return results

    # ---- logging -------------------------------------------------------------------------------------

    @staticmethod
    def _count(batch) -> tuple[int, int, int, int, int]:
        """What ``totals`` counts, of one micro-batch on the CPU."""
        width = (batch.hi - batch.lo + 1).clamp(min=0)
        return (
            int((width > 0).sum()), batch.patches.shape[0], batch.num_labels(), int(width.sum()), batch.tokens.numel()
        )  # fmt: skip

    def flops(self, totals: dict) -> tuple[float, float]:
        """(paper's 6ND form, exact operations) for what ``totals`` counts."""
        if not totals["positions"]:
            return 0.0, 0.0
        stats = TokenStats(**{k: totals[k] / totals["positions"] for k in ("patches", "labels", "pairs")})
        exact = exact_flops_per_token(self.config.model, stats) * totals["positions"]
        return paper_flops(self.params, totals["tokens"], totals["patches"]), exact

    def _record(self, grad_norm: torch.Tensor, marker: tuple, waited: float) -> dict:
        """A line of metrics.jsonl; losses are means over the labels since the line before."""
        sums, counts = self.window.clone().cpu()
        self.window.zero_()
        loss, norm = (sums.sum() / counts.sum()).item(), grad_norm.item()
        if loss != loss or norm != norm or norm == float("inf"):
            raise RunError(
                f"{self.run_dir}: loss {loss}, gradient norm {norm} between steps {marker[2]} and {self.step}; "
                f"the last checkpoint is good. Lower optimizer.lr or lengthen schedule.warmup_steps"
            )
        seconds = time.perf_counter() - marker[0]
        since = {k: v - marker[1][k] for k, v in self.totals.items()}
        flops, flops_exact = self.flops(self.totals)
        speed = self.flops(since)[1] / seconds
        record = {"step": self.step, "tokens": self.totals["tokens"], "loss": loss}
        for s, source in enumerate(self.sources):
            if counts[s].sum() > 0:
                record[f"loss/{source}"] = (sums[s].sum() / counts[s].sum()).item()
            for m, modality in enumerate(MODALITIES):
                if counts[s, m] > 0:
                    record[f"loss/{source}/{modality}"] = (sums[s, m] / counts[s, m]).item()
        record |= {
            "lr": self.config.optimizer.lr * learning_rate_factor(self.config.schedule, self.step - 1, self.steps),
            "grad_norm": norm,
            "flops": flops,
            "flops_exact": flops_exact,
            "padding": 1 - since["tokens"] / since["positions"],
            "tokens_per_second": since["tokens"] / seconds,
            "flops_per_second": speed,
            "loader_wait": waited / seconds,
        }
        if self.config.train.peak_flops:
            record["mfu"] = speed / self.config.train.peak_flops / self.world.size
        return record

    def _log_validation(self, log: MetricsLog | None, losses: dict, prefix: str = "val") -> None:
        if log:
            flat = {f"{prefix}/{s}/{k}": v for s, values in losses.items() for k, v in values.items()}
            log.write({"step": self.step, "tokens": self.totals["tokens"], **flat})

    @contextmanager
    def _progress(self):
        """A progress bar on rank 0's terminal."""
        columns = (
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        hidden = self.world.rank != 0 or not sys.stderr.isatty()
        with Progress(*columns, disable=hidden) as progress:
            task = progress.add_task(self.run_dir.name, total=self.steps, completed=self.step)
            yield lambda step: progress.update(task, completed=step)

    # ---- the run directory ---------------------------------------------------------------------------

    def _restore(self) -> None:
        """Go on from this run's newest checkpoint, or from the trunk that it branches from."""
        path = checkpoint.latest(self.run_dir)
        if path is None and self.config.train.branch_from:
            start = cooldown_start(self.config.schedule, self.steps)
            path = Path(self.config.train.branch_from) / "checkpoints" / checkpoint.step_name(start)
            if not path.exists():
                raise InputError(
                    f"train.branch_from: {path} does not exist; train the trunk with checkpoint.steps [{start}] first"
                )
        if path is None:
            return
        state = checkpoint.load(path, self.model, self.optimizer, self.world)
        self.step, self.totals = state["step"], state["totals"]
        self.window = torch.tensor(state["window"], device=self.world.device)

    def _checkpoint_due(self) -> bool:
        c = self.config.checkpoint
        if self.step == self.steps:
            return c.final
        return self.step in c.steps or bool(c.every and self.step % c.every == 0)

    def _save(self) -> None:
        if not bool(torch.isfinite(self.window).all() & torch.isfinite(self.grad_norms)):
            raise RunError(
                f"{self.run_dir}: the loss or gradient is not finite at step {self.step}; no checkpoint written. "
                "Lower optimizer.lr or lengthen schedule.warmup_steps"
            )
        state = {"totals": self.totals, "window": self.window.tolist()}
        checkpoint.save(self.run_dir, self.step, self.model, self.optimizer, state, self.world)
        if self.world.rank == 0:
            checkpoint.remove_old(self.run_dir, self.config.checkpoint.keep, self.config.checkpoint.steps)

    def _finish(self, log: MetricsLog | None) -> dict:
        """Final validation and result.json."""
        losses = self.validate()
        self._log_validation(log, losses)
        result = self._result(losses)
        if self.config.eval.swap_images:
            result["losses_swapped"] = self.validate(swapped=True)
            self._log_validation(log, result["losses_swapped"], "val_swapped")
        if self.world.rank == 0:
            write_json(self.run_dir / "result.json", result)
        self.world.barrier()
        return result

    def _result(self, losses: dict) -> dict:
        config, totals = self.config, self.totals
        flops, flops_exact = self.flops(totals)
        weights = [s.weight for s in config.data.sources.values()]
        shares = (f"{name} {round(100 * w / sum(weights), 1):g}" for name, w in zip(self.sources, weights, strict=True))
        return {
            "name": self.run_dir.name,
            "architecture": config.model.architecture,
            "mixture": ", ".join(shares),
            "width": config.model.width,
            "depth": config.model.depth,
            "steps": self.steps,
            "params": self.params.total,
            "params_active": self.params.total,
            "params_vision": self.params.vision,
            "tokens": totals["tokens"],
            "tokens_vision": totals["patches"],
            "flops": flops,
            "flops_exact": flops_exact,
            "loss": sum(v["loss"] for v in losses.values()) / len(losses),
            "losses": losses,
            "batch_tokens": config.train.batch_rows * config.data.row_length,
            "lr": config.optimizer.lr,
            "cooled": config.schedule.cooldown != "none",
            "branch_from": config.train.branch_from,
        }
