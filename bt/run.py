"""A training run: from its configuration to its report."""

from __future__ import annotations

import errno
import json
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from bt.assemble import Data, build_model, find_tokenizer
from bt.config import Config, one_line, prepare_run_dir, resolve_run_dir, resolve_sweep_dir
from bt.data.dataset import Loader
from bt.data.shards import ShardSet
from bt.engine import checkpoint, distributed, heartbeat, report
from bt.engine.distributed import World
from bt.engine.initial import load_weights
from bt.engine.loop import NonFiniteLoss, StepReport, Stopped, Trainer, evaluate, fit
from bt.engine.optimizer import build_optimizer, make_schedule
from bt.engine.progress import Progress, table
from bt.engine.system import SystemMetrics
from bt.engine.tracking import Journal, Mirror
from bt.errors import ConfigError, DataError, UserError
from bt.tasks.base import TaskModel

log = logging.getLogger("bt")
DEFAULT_THREADS = torch.get_num_threads()


class Training:
    """One training run from its configuration to its report."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        self.began = time.perf_counter()
        set_numerics(cfg)
        self.train_set = ShardSet(cfg.data.dir, cfg.data.train_split, cfg.data.cache_dir)
        self.run_dir = resolve_run_dir(cfg)
        self.last = checkpoint.last_checkpoint(self.run_dir)
        self.tokenizer = find_tokenizer(cfg, self.run_dir, self.train_set)
        # Pre-trained weights that others would replace at once need not be there.
        pretrained = self.last is None and cfg.init_from is None
        self.model = build_model(cfg, self.tokenizer, self.train_set.labels, pretrained=pretrained)
        self.data = Data(cfg, world, self.model, self.tokenizer)
        self.plan = self.data.plan(self.train_set)
        # Opened now, so that a split that is missing or damaged is found before the first step.
        self.validation = self.data.evaluation(cfg.data.val_split) if self.evaluates() else None
        self.test = self.data.evaluation(cfg.data.test_split) if cfg.eval.test else None
        steps = [self.plan.steps(cfg.trainer.epochs)] if cfg.trainer.epochs else []
        self.total_steps = min(steps + ([cfg.trainer.max_steps] if cfg.trainer.max_steps else []))
        self.best: dict[str, Any] | None = None
        self.seconds = 0.0  # of earlier starts of this run
        self.images_seen, self.images_skipped = 0, 0

    def evaluates(self) -> bool:
        cfg = self.cfg
        if cfg.eval.every_steps is None and cfg.eval.every_epochs is None:
            return False
        if cfg.task.metric.split("/")[:2] not in [[name, "val"] for name in cfg.task.objectives]:
            allowed = ", ".join(f"{name}/val/..." for name in cfg.task.objectives)
            raise ConfigError(f"task.metric={cfg.task.metric} is measured by no objective: allowed are {allowed}")
        return True

    def prepare(self) -> None:
        """Loads weights, makes the run's directory (rank 0), and goes to the step to start from."""
        cfg = self.cfg
        if self.last is None and cfg.init_from:
            labels, ignore = self.train_set.labels, cfg.checkpoint.ignore_heads
            self.say(str(load_weights(cfg.init_from, self.model, ignore_heads=ignore, labels=labels)))
        self.model.to(self.world.device)
        optimizer = build_optimizer(self.model, cfg.optimizer)
        schedule = make_schedule(cfg.optimizer, self.total_steps)
        state = checkpoint.resume(self.last, self.model, optimizer) if self.last else {}
        self.trainer = Trainer(
            self.model,
            optimizer,
            schedule,
            self.world,
            seed=cfg.seed,
            precision=cfg.trainer.precision,
            grad_clip=cfg.trainer.grad_clip,
        )
        # Only now, when all that was asked for has been found to fit: a mistake leaves no directory behind.
        if self.world.main:
            prepare_run_dir(cfg)
            if not (self.run_dir / "tokenizer.json").exists():
                self.tokenizer.save(self.run_dir / "tokenizer.json")
        distributed.barrier()
        self.journal = Journal(self.run_dir)
        if state:
            self.trainer.step = state["step"]
            self.trainer.scaler.load_state_dict(state["scaler"])
            self.best, self.seconds = state["best"], state["seconds"]
            self.images_seen, self.images_skipped = state["images_seen"], state["images_skipped"]
        if self.world.main:
            self.journal.cut(self.trainer.step)
        self.saved_at = time.perf_counter()

    def say(self, line: str) -> None:
        if self.world.main:
            log.info(line)

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.began

    def run(self) -> float | None:
        """Trains to the end, evaluates the best checkpoint and writes the report; returns the objective metric."""
        self.prepare()
        step, total = self.trainer.step, self.total_steps
        self.say(
            f"{'continuing' if step else 'starting'} at step {step} of {total}, "
            f"{self.plan.pairs_per_epoch:,} pairs an epoch, {self.cfg.global_batch} a step; run_dir={self.run_dir}"
        )
        ranks, parts = self.world.size, self.plan.accumulation
        for objective in self.model.objectives.values():
            if note := objective.note(self.cfg.global_batch // (ranks * parts), ranks, parts):
                self.say(note)
        if self.world.main and (note := self.data.pixel_note(self.train_set, self.cfg.data.train_transform)):
            self.say(note)
        mirror = self.mirror()
        self.progress = Progress(total, step, shown=self.world.main)
        self.system = SystemMetrics() if self.cfg.tracking.system_metrics and self.world.main else None
        self.heartbeat = heartbeat.Heartbeat(self.run_dir, step, total, self.world.main)
        try:
            fit(
                self.trainer,
                self.data.train(self.train_set, self.plan, step, total),
                total_steps=total,
                accumulation=self.plan.accumulation,
                global_batch=self.cfg.global_batch,
                epoch_pairs=self.plan.pairs_per_epoch,
                log_every=self.cfg.trainer.log_every,
                on_log=self.on_log,
                after_step=self.after_step,
            )
            self.progress.close()
            metrics = self.final_metrics()
        except BaseException as error:
            self.progress.close()
            if mirror:
                mirror.finish("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            if isinstance(error, NonFiniteLoss):
                raise NonFiniteLoss(f"{error}; last good checkpoint: {self.last_checkpoint()}") from error
            raise
        if self.world.main:
            self.report(metrics, mirror)
        return metrics.get(self.cfg.task.metric)

    def mirror(self) -> Mirror | None:
        if not self.world.main:
            return None
        tags = report.tracking_tags(self.world.device)
        return Mirror(self.cfg.tracking, self.run_dir, self.cfg.name, tags, sweep_dir=resolve_sweep_dir())

    def on_log(self, step: StepReport) -> None:
        self.images_seen += step.images
        self.images_skipped += sum(step.skipped.values())
        # An epoch at least, so that the first bad image of a run does not count as a share of a handful.
        images = max(self.images_seen + self.images_skipped, len(self.plan.index.samples))
        self.check_skipped(step.skipped, self.images_skipped, images)
        if not self.world.main:
            return
        record = {"step": step.step, "epoch": round(step.epoch, 4)}
        record |= {f"{name}/train/loss": value for name, value in step.losses.items()}
        record |= {f"lr/{role}": value for role, value in step.learning_rates.items()}
        record |= {"pairs_per_second": step.pairs_per_second, "data_wait_share": step.data_wait_share}
        record |= self.system.sample() if self.system else {}
        self.journal.append(record)
        self.progress.report(step.step, step.epoch, step.losses, step.pairs_per_second)

    def check_skipped(self, reasons: Mapping[str, int], skipped: int, images: int) -> None:
        """Says what was left out of `images`, and stops when it is too much."""
        shown = ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        if skipped > self.cfg.data.max_bad_share * images:
            share = f"more than data.max_bad_share={self.cfg.data.max_bad_share}"
            raise DataError(f"{skipped} of {images} images are bad, {share}: {shown}")
        if reasons and self.world.main:
            log.warning(f"left out bad images: {shown}")

    def after_step(self, step: int, stop: bool) -> None:
        cfg, last = self.cfg.checkpoint, step == self.total_steps
        self.heartbeat.step(step, stop or last)
        if self.world.main:
            self.progress.step(step)
        if self.is_evaluation(step):
            self.save(self.evaluate(step))
        elif (
            stop
            or last
            or (cfg.every_steps and step % cfg.every_steps == 0)
            or (cfg.every_minutes and time.perf_counter() - self.saved_at > 60 * cfg.every_minutes)
        ):
            self.save()
        if stop and not last:
            raise Stopped(f"stopped by a signal after step {step}; the same command goes on from there")

    def is_evaluation(self, step: int) -> bool:
        every, cfg = self.cfg.eval.every_steps, self.cfg
        if every is None and cfg.eval.every_epochs is not None:
            every = cfg.eval.every_epochs * self.plan.pairs_per_epoch / cfg.global_batch
        # An interval of a fractional number of steps: the first step at or past each multiple of it.
        return every is not None and (step == self.total_steps or step // every > (step - 1) // every)

    def evaluate(self, step: int) -> bool:
        """Evaluates on the validation split; True if it is the best so far."""
        cfg, skipped = self.cfg, Counter()
        self.trainer.check_finite()
        precision = cfg.trainer.precision
        metrics = evaluate(self.model, self.validation, self.world, split="val", precision=precision, skipped=skipped)
        self.check_skipped(skipped, skipped.total(), self.validation.images)
        if cfg.task.metric not in metrics:
            raise ConfigError(f"task.metric={cfg.task.metric} was not measured: there are {', '.join(metrics)}")
        value = metrics[cfg.task.metric]
        sign = 1 if cfg.task.mode == "max" else -1
        best = self.best is None or sign * value > sign * self.best["value"]
        if best:
            self.best = {"metric": cfg.task.metric, "value": value, "step": step, "metrics": metrics}
        if self.world.main:
            epoch = step * cfg.global_batch / self.plan.pairs_per_epoch
            self.journal.append({"step": step, "epoch": round(epoch, 4), **metrics})
            shown = "  ".join(f"{name} {number:.4f}" for name, number in metrics.items())
            self.progress.say(f"evaluation at step {step}: {shown}{'  (best)' if best else ''}")
        return best

    def save(self, best: bool = False) -> None:
        self.trainer.check_finite()
        if self.world.main:
            state = {
                "config": self.cfg.recorded,
                "scaler": self.trainer.scaler.state_dict(),
                "best": self.best,
                "seconds": self.elapsed(),
                "images_seen": self.images_seen,
                "images_skipped": self.images_skipped,
                "labels": self.train_set.labels,
            }
            checkpoint.save(
                self.run_dir,
                step=self.trainer.step,
                model=self.model,
                optimizer=self.trainer.optimizer,
                state=state,
                best=best,
                tokenizer=self.run_dir / "tokenizer.json",
            )
        self.saved_at = time.perf_counter()

    def last_checkpoint(self) -> str:
        return str(checkpoint.last_checkpoint(self.run_dir) or "none was saved yet")

    def final_metrics(self) -> dict[str, float]:
        """The metrics of the best checkpoint: validation as measured then, and the test split, once."""
        if self.best is None:
            self.say("no evaluation was asked for: the last weights are the result")
        else:
            distributed.barrier()
            weights = checkpoint.read_tensors(checkpoint.best_checkpoint(self.run_dir) / "model.safetensors")
            self.model.load_state_dict(weights)
        metrics = dict(self.best["metrics"]) if self.best else {}
        if self.test is not None:
            skipped: Counter = Counter()
            precision = self.cfg.trainer.precision
            measured, predictions = measure(self.model, self.test, self.world, "test", precision, skipped)
            self.check_skipped(skipped, skipped.total(), self.test.images)
            metrics |= measured
            if self.world.main:
                # A run that was killed here before has this line already.
                if not any(record.keys() >= measured.keys() for record in self.journal.records()):
                    self.journal.append({"step": self.trainer.step, **measured})
                write_predictions(self.run_dir / "predictions-test.jsonl", predictions)
        return metrics

    def report(self, metrics: dict[str, float], mirror: Mirror) -> None:
        """report.json, the curves, the end of the tracked run, and a table."""
        counts = {role: 0 for role in ("base", "cross", "head")}
        for name, parameter in self.model.named_parameters():
            counts[self.model.parameter_role(name)] += parameter.numel()
        speeds = [line["pairs_per_second"] for line in self.journal.records() if "pairs_per_second" in line]
        content = {
            "name": self.cfg.name,
            "metrics": metrics,
            "best_step": self.best and self.best["step"],
            "steps": self.trainer.step,
            "seconds": self.elapsed(),
            "pairs_per_second": statistics.median(speeds) if speeds else None,
            "parameters": {"all": sum(counts.values()), **counts},
            "world_size": self.world.size,
            **report.peak_memory(self.world.device),
            **report.environment(self.world.device),
            **report.git_state(),
        }
        curves = report.plot_curves(self.run_dir)
        written = report.write_report(self.run_dir, content)
        shown = [(name, value) for name, value in metrics.items()]
        shown += [("seconds", content["seconds"]), ("parameters", content["parameters"]["all"])]
        print("\n" + table(shown, (f"result of the {'best' if self.best else 'last'} checkpoint", "value")) + "\n")
        best = checkpoint.best_checkpoint(self.run_dir) or checkpoint.last_checkpoint(self.run_dir)
        mirror.finish("FINISHED", [path for path in (written, curves) if path], {"checkpoint": str(best.resolve())})
        self.say(f"finished; {written}")


def measure(
    model: TaskModel, batches: Loader, world: World, split: str, precision: str, skipped: Counter
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics as "task/split/metric", and the predictions of all ranks in the split's order.

    split: how it is called in the metrics' names. skipped: see evaluate.
    """
    made: list[list[dict[str, Any]]] = []
    metrics = evaluate(model, batches, world, split=split, precision=precision, predictions=made, skipped=skipped)
    # Rank r had the batches r, r + ranks, ...
    rounds = zip_longest(*distributed.gather_objects(made), fillvalue=[])
    return metrics, [row for batches_of_round in rounds for batch in batches_of_round for row in batch]


def write_predictions(path: Path, predictions: list[dict[str, Any]]) -> None:
    if predictions:
        temporary = path.with_name(f".{path.name}")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in predictions))
        temporary.replace(path)


def set_numerics(cfg: Config) -> None:
    """Everything is set, whatever a run before in the same process (a sweep) has left."""
    torch.set_num_threads(cfg.trainer.threads or DEFAULT_THREADS)
    torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need on a GPU
    torch.use_deterministic_algorithms(cfg.trainer.deterministic)
    # Else every new tensor would be filled with NaN first, which costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False


def train(cfg: Config) -> float | None:
    """Runs the experiment, or says that it is finished; returns the objective metric of its best checkpoint."""
    world = distributed.join(cfg.trainer.device)
    try:
        run_dir = resolve_run_dir(cfg)
        finished = run_dir / "report.json"
        if (run_dir / "config.yaml").exists():
            prepare_run_dir(cfg)  # refuses another configuration, before anything heavy
        if finished.exists():
            metrics = json.loads(finished.read_text())["metrics"]
            if world.main:
                log.info(f"already finished: {finished}")
            return metrics.get(cfg.task.metric)
        return run_to_its_end(cfg, world, run_dir)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left on the disk of {error.filename or run_dir}") from error
    finally:
        distributed.leave()


def run_to_its_end(cfg: Config, world: World, run_dir: Path) -> float | None:
    """Trains, and leaves in the run's heartbeat how it ended."""
    try:
        value = Training(cfg, world).run()
    except BaseException as error:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        heartbeat.write_end(run_dir, "stopped" if stopped else "failed", one_line(error))
        raise
    if world.main:
        heartbeat.write_end(run_dir, "finished")
    return value
