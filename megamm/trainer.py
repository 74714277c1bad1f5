"""The loop: batch -> loss -> gradients -> step -> log -> checkpoint."""

import sys
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megamm.config import Config
from megamm.data.balance import RowContents, row_costs
from megamm.data.loader import Loader, build_pack_plan, open_sources
from megamm.data.shards import fingerprints
from megamm.errors import InputError, RunError
from megamm.estimate.tokens import stats_of_sources
from megamm.exchange.start import start_from
from megamm.exchange.weights import model_shapes
from megamm.extras import check_extras
from megamm.files import write_json
from megamm.generation.scores import check_prompts, open_tasks, score_tasks
from megamm.model.context import ends_seen
from megamm.model.counts import TokenStats, count_parameters, exact_flops_per_token, flops_weights, paper_flops
from megamm.parallel.data import clip_gradients
from megamm.parallel.engine import Engine
from megamm.parallel.mesh import World, init_world, join, lost_contact
from megamm.resolve import resolve_config
from megamm.sequence import LABEL_KINDS, keys_seen, patches_per_image
from megamm.training import checkpoint, run_dir
from megamm.training.divergence import diverged
from megamm.training.evaluation import ValidationRows, validation_loss
from megamm.training.expert_metrics import expert_record
from megamm.training.metrics import MetricsLog
from megamm.training.optimizer import check_freeze, freeze, held_back, make_optimizer, set_learning_rate
from megamm.training.printed_log import PrintedLog
from megamm.training.profile import Profiler
from megamm.training.schedule import cooldown_start, learning_rate_factor
from megamm.training.signals import StopFlag, Stopped
from megamm.training.wandb_run import WandbRun


class Trainer:
    """One training run in one process of ``world``.

    Raises:
        InputError: bad settings or data, or a run directory of another config.
        RunError: another process is training there, or the loss became NaN.
        Stopped: by SIGTERM or SIGUSR1, from ``run``, after a checkpoint.
    """

    def __init__(self, config: Config, world: World | None = None):
        torch.manual_seed(config.train.seed)  # for whatever is drawn in a step; first values have a seed of their own
        # Before the layout, which needs what the data say. A rank whose data cannot be opened ends all of them here.
        with (world or join()).agree():
            self._open(config)
        self.world = world or init_world(config)
        self._check_same_data()
        self.params = count_parameters(config.model)
        stats = stats_of_sources(config) if self.world.layout.pipeline > 1 else None
        self.engine = Engine(config, len(self.sources), self.world, stats)
        self.model = self.engine.model
        # After the model is sharded, as the optimizer steps the shares; and before the optimizer, which passes over
        # what is frozen.
        self.held = freeze(self.model, config.optimizer)  # until optimizer.freeze_until
        self.optimizer = make_optimizer(self.model, config.optimizer, self.dtype)
        self._validation: dict[str, ValidationRows] = {}
        self.step = 0
        self.stop, self.stop_agreed = StopFlag(), False  # of this rank; of any rank, before the last step
        # Totals over all ranks: positions without padding, patches, labels, pairs that attention sees, and pairs of
        # patches of one image.
        self.totals = dict.fromkeys(("tokens", "patches", "labels", "pairs", "positions", "image_pairs"), 0)
        self.grad_norms = torch.zeros((), device=self.world.device)  # their sum: not finite if any was not
        experts = config.model.experts.num
        self.routed = torch.zeros(config.model.depth, experts, 2, dtype=torch.int64, device=self.world.device)
        # Sums and counts since the last line of the log, on the device: only that line waits for it.
        self.window = torch.zeros(2, len(self.sources), len(LABEL_KINDS), device=self.world.device)

    def _open(self, config: Config) -> None:
        """Open the data and complete the config by them."""
        if not config.data.sources:
            raise InputError("data.sources: empty; name at least one prepared dataset (see tools/prepare_data.py)")
        self.datasets, self._val_datasets = open_sources(config.data, "train"), open_sources(config.data, "val")
        self.fingerprints = {name: fingerprints(source.path) for name, source in config.data.sources.items()}
        # In place: the caller's config is completed, too.
        self.config = resolve_config(config)
        check_extras(self.config)
        self.tasks = open_tasks(self.config)
        if config.optimizer.freeze:
            check_freeze(model_shapes(self.config.model), config.optimizer)
        self.run_dir = Path(config.train.run_dir)
        self.steps = config.train.steps
        self.dtype = getattr(torch, config.train.dtype)
        self.sources = list(config.data.sources)

    def _check_same_data(self) -> None:
        """Ranks may read copies of the data on disks of their own, if all are of the same content."""
        # A collective, so outside of agree().
        first = self.world.broadcast(self.fingerprints)
        with self.world.agree():
            others = [name for name in self.sources if first.get(name) != self.fingerprints[name]]
            if others:
                raise InputError(
                    f"data.sources.{others[0]}.path: {self.config.data.sources[others[0]].path} has other data on rank "
                    f"{self.world.rank} than on rank 0; copy the dataset there again"
                )

    # ---- the run -------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Train to the end, from a checkpoint where there is one; returns what result.json holds."""
        try:
            # From here on: a signal that comes before the first step is heeded after it, with that step saved.
            with self.stop.listen(), run_dir.occupy(self.run_dir, self.world):
                return self._begin() or self._train()
        except RuntimeError as error:
            # An error of this rank's own must keep its traceback.
            if self.world.size == 1 or not lost_contact(error):
                raise
            raise RunError(
                f"rank {self.world.rank}: another rank has ended or does not answer ({str(error).splitlines()[0]}); "
                "its own message says why. Run the same command again to go on from the last checkpoint"
            ) from error

    def _train(self) -> dict:
        self.checkpoints = checkpoint.Checkpoints(
            self.run_dir, self.world, self.config.checkpoint.keep, self.config.checkpoint.steps
        )
        log = None
        try:
            with self.world.agree():
                # One rank writes the log, and a disk that is full there must still end all of them.
                if self.world.rank == 0:
                    first = cooldown_start(self.config.schedule, self.steps) if self.config.train.branch_from else 0
                    every, ends = self.config.train.log_every, self.step == self.steps
                    log = MetricsLog(self.run_dir, self.step, every, first, validates=ends)
                    if not sys.stderr.isatty():
                        log.also_write_to(PrintedLog(self.run_dir.name, self.step, self.steps))
                    if self.config.train.wandb:
                        log.also_write_to(WandbRun(self.run_dir, self.config))
            # A split, or an image of a task, that cannot be read is told of before the training.
            self.plan_validation()
            with self.world.agree():
                check_prompts(self.tasks, self.world)
            self._loop(log)
            return self._finish(log)
        finally:
            # Also after an error: a checkpoint that is being written is worth the wait.
            self.checkpoints.close()
            if log:
                log.close()

    def _loop(self, log: MetricsLog | None) -> None:
        config = self.config
        trunk = config.train.branch_from
        plan = build_pack_plan(
            self.datasets,
            [s.weight for s in config.data.sources.values()],
            config.data,
            cache_dir=self.run_dir / "pack_plan",
            other_dirs=[Path(trunk) / "pack_plan"] if trunk else [],
            num_rows=self.step * config.train.batch_rows + 1,
            world=self.world,
        )
        loader = Loader(
            plan,
            self.datasets,
            config.data,
            global_batch_rows=config.train.batch_rows,
            rank=self.world.data_rank,
            num_ranks=self.world.data_size,
            micro_rows=self.world.layout.micro_rows,
            work=self._row_work(),
            start_step=self.step,
            end_step=self.steps,
        )
        # Where the log's next line begins to count.
        marker = (time.perf_counter(), dict(self.totals), self.step)
        profiler = Profiler(self.run_dir, config.train.profile_steps, self.world.rank, self.world.device)
        # Closed however the loop ends: worker processes would outlive it otherwise, and a profile would be lost.
        with self._progress() as advance, closing(iter(loader)) as batches, closing(profiler):
            while self.step < self.steps:
                with self.world.agree():
                    # A save that failed on one rank, and a document damaged on another, are both found here, before the
                    # collectives of a step.
                    self.checkpoints.poll()
                    micro_batches = next(batches)
                profiler.before(self.step + 1)  # users count steps from 1
                grad_norm = self.train_step(micro_batches)
                profiler.after(self.step)
                advance(self.step)
                if self.step % config.train.log_every == 0 or self.step == self.steps:
                    with self.world.agree():
                        record = self._record(grad_norm, marker, loader.wait_seconds())
                        if log:
                            log.write(record)
                    marker = (time.perf_counter(), dict(self.totals), self.step)
                # Not at the last step, after which _finish validates.
                if config.eval.every and self.step % config.eval.every == 0 and self.step < self.steps:
                    # The time of a validation is not counted as training's, hence the new marker after it.
                    self._log_validation(log, self.validate(), scores=self.score_tasks())
                    marker = (time.perf_counter(), dict(self.totals), self.step)
                # After the log's line, so that a checkpoint never knows of a step that the log lost.
                if self._checkpoint_due() or self.stop_agreed:
                    self._save()
                if self.stop_agreed:
                    with self.world.agree():
                        # Only what has been written, and well, may be called saved.
                        self.checkpoints.wait()
                    raise Stopped(f"{self.run_dir}: told to stop, saved at step {self.step}; start it again to go on")

    def train_step(self, micro_batches: list) -> torch.Tensor:
        """One optimizer step on this rank's micro-batches; returns the gradient norm (a device scalar)."""
        # On the host, from batches on the CPU: the sum below goes over gloo and does not wait for the device.
        local = torch.tensor([self._count(batch) for batch in micro_batches], dtype=torch.int64).sum(0)
        # Of every rank, while counts are taken from one of those that share rows: a signal may reach any of them.
        stop = torch.tensor([self.stop.raised])
        counts: list[int] = self.world.all_reduce(torch.cat((local * self.world.is_first_of_rows, stop))).tolist()
        self.stop_agreed = counts.pop() > 0
        for name, value in zip(self.totals, counts, strict=True):  # in the order of _count
            self.totals[name] += value
        # FSDP averages gradients over ranks; losses are means over the labels of the global batch, those of routers
        # over its positions.
        ranks = self.world.layout.dp_replicate * self.world.layout.shard_ranks
        # counts[2] are labels, counts[0] positions without padding. max: a batch without labels has a loss of 0, not
        # NaN.
        scale, auxiliary_scale = (ranks / max(1, count) for count in (counts[2], counts[0]))
        factor = learning_rate_factor(self.config.schedule, self.step, self.steps)
        set_learning_rate(self.optimizer, factor)
        self.window += self.world.all_reduce(self.engine.step(micro_batches, scale, auxiliary_scale))
        # Before the norm: what is not stepped must not weigh in the clipping.
        for parameter in self.held if self._holds(self.step) else []:
            parameter.grad = None
        # The norm is logged also where nothing is clipped.
        clip = self.config.optimizer.clip or float("inf")
        grad_norm = clip_gradients(self.model.parameters(), clip, self.world)
        self.grad_norms += grad_norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # After the step, so that the bias follows from the counts of all its passes and ranks.
        routed = self.engine.take_expert_counts()
        if routed is not None:
            self.routed += routed
            if self.config.model.experts.bias_rate:
                self.engine.move_expert_bias(routed)
        self.step += 1
        return grad_norm

    def _holds(self, step: int) -> bool:
        """Whether the step of this number, the first is 0, leaves ``held`` as it is."""
        until = self.config.optimizer.freeze_until
        return until is not None and step < until

    def plan_validation(self) -> dict[str, ValidationRows]:
        """The rows of each source that validation reads, planned once."""
        config = self.config
        if not self._validation:
            # Beside the training plan: the name of an index says which plan it is of.
            options = {"cache_dir": self.run_dir / "pack_plan", "world": self.world}
            self._validation = {
                name: ValidationRows(dataset, config.data, config.eval.rows, **options)
                for name, dataset in zip(self.sources, self._val_datasets, strict=True)
            }
        return self._validation

    def validate(self, swapped: bool = False) -> dict[str, dict[str, float]]:
        """Losses of each source on its val split (see ``validation_loss``).

        Args:
            swapped: with each image replaced by the one before it; sources without images are left out.
        """
        return {
            name: validation_loss(self.engine, rows.passes(self.world, swapped), self.world)
            for name, rows in self.plan_validation().items()
            if rows.has_images or not swapped
        }

    def score_tasks(self) -> dict[str, float]:
        """How good the answers to the prompts of each of ``eval.tasks`` are."""
        return score_tasks(self.tasks, self.model, self.config.model, self.world)

    # ---- logging -------------------------------------------------------------------------------------

    def _count(self, batch) -> tuple[int, ...]:
        """What ``totals`` counts, of one micro-batch on the CPU."""
        width = keys_seen(batch.lo, ends_seen(self.config.model, batch))
        return (
            int((width > 0).sum()),
            batch.patches.shape[0],
            batch.num_labels(),
            int(width.sum()),
            batch.tokens.numel(),
            int(batch.grids.long().prod(1).square().sum()),
        )

    def flops(self, totals: dict) -> tuple[float, float]:
        """(paper's 6ND form, exact operations) for what ``totals`` counts."""
        if not totals["positions"]:
            return 0.0, 0.0
        names = ("patches", "labels", "pairs", "image_pairs")
        stats = TokenStats(**{name: totals[name] / totals["positions"] for name in names})
        exact = exact_flops_per_token(self.config.model, stats) * totals["positions"]
        return paper_flops(self.params, totals["tokens"], totals["patches"]), exact

    def _row_work(self) -> Callable[[RowContents], np.ndarray] | None:
        """FLOPs of rows, by which they are dealt where ranks wait for each other."""
        layout = self.world.layout
        # Nobody waits for anybody: rows stay in order.
        if layout.data_ranks * layout.pipeline == 1:
            return None
        weights = flops_weights(self.config.model)._asdict()
        return partial(row_costs, row_length=self.config.data.row_length, **weights)

    def _record(self, grad_norm: torch.Tensor, marker: tuple, waited: float) -> dict:
        """A line of metrics.jsonl; losses are means over the labels since the line before."""
        # A clone, since on the CPU cpu() copies nothing, and the window is set to zero next.
        sums, counts = self.window.clone().cpu()
        self.window.zero_()
        loss, norm = (sums.sum() / counts.sum()).item(), grad_norm.item()
        # NaN alone is not equal to itself.
        if loss != loss or norm != norm or norm == float("inf"):
            what = f"loss {loss}, gradient norm {norm} between steps {marker[2]} and {self.step}"
            raise diverged(self.config, what)
        seconds = time.perf_counter() - marker[0]
        since = {k: v - marker[1][k] for k, v in self.totals.items()}
        flops, flops_exact = self.flops(self.totals)
        speed = self.flops(since)[1] / seconds
        record = {"step": self.step, "tokens": self.totals["tokens"], "loss": loss}
        for s, source in enumerate(self.sources):
            if counts[s].sum() > 0:
                record[f"loss/{source}"] = (sums[s].sum() / counts[s].sum()).item()
            for m, kind in enumerate(LABEL_KINDS):
                if counts[s, m] > 0:
                    record[f"loss/{source}/{kind}"] = (sums[s, m] / counts[s, m]).item()
        record |= {
            # The rate of the step just taken, which is counted already.
            "lr": self.config.optimizer.lr * learning_rate_factor(self.config.schedule, self.step - 1, self.steps),
            "grad_norm": norm,
            "flops": flops,
            "flops_exact": flops_exact,
            "padding": 1 - since["tokens"] / since["positions"],
            "tokens_per_second": since["tokens"] / seconds,
            "flops_per_second": speed,
            "loader_wait": waited / seconds,
        }
        if self.config.model.experts.num:
            record |= expert_record(self.routed)
            self.routed.zero_()
        if self.config.train.peak_flops:
            # peak_flops is of one rank, speed of all.
            record["mfu"] = speed / self.config.train.peak_flops / self.world.size
        return record

    def _log_validation(
        self, log: MetricsLog | None, losses: dict, prefix: str = "val", scores: dict[str, float] | None = None
    ) -> None:
        flat = {f"{prefix}/{s}/{k}": v for s, values in losses.items() for k, v in values.items()}
        flat |= {f"task/{name}": score for name, score in (scores or {}).items()}
        with self.world.agree():
            if log:
                log.write({"step": self.step, "tokens": self.totals["tokens"], **flat})

    @contextmanager
    def _progress(self):
        """A progress bar on rank 0's terminal."""
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        hidden = self.world.rank != 0 or not sys.stderr.isatty()
        with Progress(*columns, disable=hidden) as progress:
            task = progress.add_task(self.run_dir.name, total=self.steps, completed=self.step)
            yield lambda step: progress.update(task, completed=step)

    # ---- the run directory ---------------------------------------------------------------------------

    def _begin(self) -> dict | None:
        """Take the run up where it stands; returns the result of a finished one."""
        result = self.world.decide(self._look)
        # Nothing is opened or written for a run that has ended.
        if result:
            return result
        path = self._find_start()
        if path is None:
            # Only without a checkpoint: a resumed run or a branch has its start in it.
            start_from(self.model, self.config, self.world)
        else:
            # Steps are numbered from 0, so step N's checkpoint comes after step number N - 1. If that one still held
            # them, there is no state of theirs to load.
            with held_back(self.held if self._holds(checkpoint.step_of(path) - 1) else []):
                state = checkpoint.load(path, self.model, self.optimizer, self.world)
            # The window, too: the first line after a resumption is that of an unbroken run.
            self.step, self.totals = state["step"], state["totals"]
            # A checkpoint from before images of unlike shape: all of them were full squares.
            full = patches_per_image(self.config.model.image_size, self.config.model.patch_size)
            self.totals.setdefault("image_pairs", self.totals["patches"] * full)
            self.window = torch.tensor(state["window"], device=self.world.device)
        self.world.decide(self._claim, path)
        return None

    def _look(self) -> dict | None:
        """What rank 0 finds in the run directory: the result, if it is finished."""
        # Before the result is looked at: that of other settings is not this run's.
        run_dir.check_settings(self.run_dir, self.config)
        run_dir.check_data(self.run_dir, self.fingerprints)
        return run_dir.finished(self.run_dir, self.config)

    def _claim(self, path: Path | None) -> None:
        if path is not None and path.is_relative_to(self.run_dir):
            checkpoint.settle_on(path)  # first: later checkpoints may be of a shorter run's cool-down
        run_dir.claim(self.run_dir, self.config, run_dir.run_facts(self.params, self.world, self.fingerprints))

    def _find_start(self) -> Path | None:
        """This run's newest checkpoint, or that of the trunk that it branches from; None to start at step 0."""
        # A lengthened run shares its steps with the shorter one only up to that one's cool-down.
        shared = self.world.decide(run_dir.constant_until, self.run_dir, self.config)
        path = checkpoint.newest_whole(self.run_dir, self.world, up_to=shared)
        if path is not None:
            return path
        # There are checkpoints, but all of them are of the cool-down.
        if self.world.decide(checkpoint.list_checkpoints, self.run_dir):
            raise InputError(
                f"train.steps: {self.run_dir} cannot be lengthened to {self.steps} steps: its cool-down began at step "
                f"{shared}, and no checkpoint up to there is kept. Use a new train.run_dir; with checkpoint.steps "
                f"[{cooldown_start(self.config.schedule, self.steps)}] that run can be lengthened later"
            )
        trunk = self.config.train.branch_from
        return self._find_branch_point(Path(trunk)) if trunk else None

    def _find_branch_point(self, trunk: Path) -> Path:
        """The trunk's newest whole checkpoint up to the branch's cool-down: the steps between are the trunk's own."""
        start = cooldown_start(self.config.schedule, self.steps)
        wanted = trunk / "checkpoints" / checkpoint.step_name(start)
        self.world.decide(run_dir.check_branch, trunk, self.config, self.fingerprints)
        path = checkpoint.newest_whole(trunk, self.world, up_to=start)
        if path is None:
            raise InputError(
                f"train.branch_from: {wanted} does not exist; train the trunk with checkpoint.steps [{start}] first"
            )
        return path

    def _checkpoint_due(self) -> bool:
        c = self.config.checkpoint
        # The last step is `final`'s alone to decide, also where `every` divides it.
        if self.step == self.steps:
            return c.final
        return self.step in c.steps or bool(c.every and self.step % c.every == 0)

    def _save(self) -> None:
        with self.world.agree():
            # Waits for the device, but a checkpoint with NaN would replace the good ones.
            if not bool(torch.isfinite(self.window).all() & torch.isfinite(self.grad_norms)):
                what = f"the loss or gradient is not finite at step {self.step}, no checkpoint written"
                raise diverged(self.config, what)
            # For people: where the data go on follows from the step.
            row = self.step * self.config.train.batch_rows
            state = {"next_row": row, "totals": self.totals, "window": self.window.tolist()}
            self.checkpoints.save(self.step, self.model, self.optimizer, state)

    def _finish(self, log: MetricsLog | None) -> dict:
        """Final validation and result.json."""
        losses, scores = self.validate(), self.score_tasks()
        self._log_validation(log, losses, scores=scores)
        result = self._result(losses) | {"tasks": scores}
        if self.config.eval.swap_images:
            result["losses_swapped"] = self.validate(swapped=True)
            self._log_validation(log, result["losses_swapped"], "val_swapped")
        with self.world.agree():
            self.checkpoints.wait()
            if self.world.rank == 0:
                # Last of all: whoever finds it may rely on log and checkpoints.
                write_json(self.run_dir / "result.json", result)
        return result

    def _result(self, losses: dict) -> dict:
        config, totals = self.config, self.totals
        flops, flops_exact = self.flops(totals)
        weights = [s.weight for s in config.data.sources.values()]
        shares = (f"{name} {round(100 * w / sum(weights), 1):g}" for name, w in zip(self.sources, weights, strict=True))
        return {
            "name": self.run_dir.name,
            "architecture": config.variant,
            "mixture": ", ".join(shares),
            "width": config.model.width,
            "depth": config.model.depth,
            "steps": self.steps,
            "params": self.params.total,
            "params_active": self.params.active,
            "params_vision": self.params.vision,
            "tokens": totals["tokens"],
            "tokens_vision": totals["patches"],
            "flops": flops,
            "flops_exact": flops_exact,
            "loss": sum(v["loss"] for v in losses.values()) / len(losses),
            "losses": losses,
            "batch_tokens": config.train.batch_rows * config.data.row_length,
            "lr": config.optimizer.lr,
            "sweep": config.train.sweep,
            "cooled": config.schedule.cooldown != "none",
            "branch_from": config.train.branch_from,
            # A pretrained tower alone is neither.
            "init": "llm" if config.start.weights else None if config.start.vision_weights else "native",
            "start": config.start.weights,
            "fingerprints": self.fingerprints,
        }
