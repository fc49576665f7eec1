"""Training, piece by piece: what a run is made of, its steps, evaluations, checkpoints and report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bt.assemble import Data, build_model, find_tokenizer, open_shards
from bt.config import Config, other_settings, prepare_run_dir, resolve_run_dir, resolve_sweep_dir
from bt.data.dataset import Loader
from bt.engine import checkpoint, distributed, heartbeat, report, watch
from bt.engine.compiled import compile_layers
from bt.engine.cost import measure_cost
from bt.engine.distributed import World
from bt.engine.evaluate import Measured, evaluate
from bt.engine.initial import load_weights, weights_file
from bt.engine.loop import NonFiniteLoss, StepReport, Trainer, Wishes, fit
from bt.engine.optimizer import build_optimizer, make_schedule
from bt.engine.parallel import make_parallel
from bt.engine.profiling import StepProfiler
from bt.engine.progress import Progress, table
from bt.engine.saver import Saver
from bt.engine.system import SystemMetrics
from bt.engine.tracking import Journal, Mirror
from bt.errors import CheckpointError, ConfigError, DataError, Stopped
from bt.tasks.base import Measuring

log = logging.getLogger("bt")
DEFAULT_THREADS = torch.get_num_threads()


class Training:
    """One training run from its configuration to its report."""

    def __init__(self, cfg: Config, world: World):
        self.cfg, self.world = cfg, world
        self.began = time.perf_counter()
        set_numerics(cfg)
        self.train_set = open_shards(cfg.data, cfg.data.train_split)
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
        self.stale = 0  # evaluations since the best one
        self.seconds = 0.0  # of earlier starts of this run
        self.images_seen = 0
        self.left_out: dict[str, Counter[str]] = {}  # bad images by "shard: reason"; train, and the last val and test
        self.said: set[str] = set()  # reasons that have been logged

    def evaluates(self) -> bool:
        return self.cfg.eval.every_steps is not None or self.cfg.eval.every_epochs is not None

    def prepare(self) -> None:
        """Loads weights, makes the run's directory (rank 0), and goes to the step to start from."""
        cfg = self.cfg
        if self.last is None and cfg.init_from:
            chosen = {"ignore_heads": cfg.checkpoint.ignore_heads, "encoders_only": cfg.checkpoint.encoders_only}
            self.say(str(load_weights(cfg.init_from, self.model, labels=self.train_set.labels, **chosen)))
            if others := other_settings(weights_file(cfg.init_from), cfg):
                self.say(f"otherwise than {cfg.init_from} was trained: {'; '.join(others)}")
        self.model.to(self.world.device)
        # Before layers are compiled and parameters are spread over ranks.
        self.cost = measure_cost(self.model, cfg.data.max_text_len) if self.world.main else None
        if cfg.trainer.compile:
            compile_layers(self.model, self.world.device)
        parallel = make_parallel(self.model, self.world, cfg.trainer.parallel)
        optimizer = build_optimizer(self.model, cfg.optimizer)
        schedule = make_schedule(cfg.optimizer, self.total_steps)
        state = checkpoint.resume(self.last, self.model, optimizer) if self.last else {}
        steps = distributed.gather_objects(state.get("step"))
        if len(set(steps)) > 1:
            raise CheckpointError(f"{self.run_dir}: ranks see different checkpoints there, of the steps {steps}")
        self.saver = Saver(self.run_dir, self.world, keep=cfg.checkpoint.keep, background=cfg.checkpoint.background)
        # What is on its way to the disk was good when it was taken; but the disk may be what hangs.
        watch.before_exit(lambda reason: self.saver.wait(60))
        self.batches = self.data.train(self.train_set, self.plan, state.get("step", 0), self.total_steps)
        self.trainer = Trainer(
            parallel,
            optimizer,
            schedule,
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
            self.best, self.stale, self.seconds = state["best"], state["stale"], state["seconds"]
            self.images_seen = state["images_seen"]
            self.left_out = {split: Counter(reasons) for split, reasons in state["left_out"].items()}
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
        micro = self.cfg.global_batch // (ranks * parts)
        for objective in self.model.objectives.values():
            if note := objective.note(micro, ranks, parts):
                self.say(note)
        if self.world.main and (note := self.data.pixel_note(self.train_set, self.cfg.data.train_transform)):
            self.say(note)
        self.say(str(self.cost))
        mirror = self.mirror()
        self.progress = Progress(total, step, shown=self.world.main)
        self.system = SystemMetrics() if self.cfg.tracking.system_metrics and self.world.main else None
        self.profiler = None
        if self.cfg.trainer.profile and self.world.main:
            self.profiler = StepProfiler(self.run_dir / "profile", self.world.device)
        self.heartbeat = heartbeat.Heartbeat(self.run_dir, step, total, self.world.main)
        try:
            if not self.out_of_patience():
                fit(
                    self.trainer,
                    self.batches,
                    total_steps=total,
                    accumulation=self.plan.accumulation,
                    global_batch=self.cfg.global_batch,
                    epoch_pairs=self.plan.pairs_per_epoch,
                    log_every=self.cfg.trainer.log_every,
                    on_log=self.on_log,
                    wants_save=self.wants_save,
                    after_step=self.after_step,
                )
            self.close_views()
            self.saver.wait()
            metrics = self.final_metrics()
        except BaseException as error:
            self.close_views()
            with contextlib.suppress(CheckpointError):
                self.saver.wait()
            if mirror:
                mirror.finish("KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED")
            if isinstance(error, NonFiniteLoss):
                raise NonFiniteLoss(f"{error}; last good checkpoint: {self.last_checkpoint()}") from error
            raise
        if self.world.main:
            self.report(metrics, mirror)
        return metrics.get(self.cfg.task.metric)

    def close_views(self) -> None:
        self.progress.close()
        if self.profiler is not None:
            self.profiler.close()

    def mirror(self) -> Mirror | None:
        if not self.world.main:
            return None
        tags = report.tracking_tags(self.world.device) | self.cost.tags() | {"world_size": str(self.world.size)}
        return Mirror(self.cfg.tracking, self.run_dir, self.cfg.name, tags, sweep_dir=resolve_sweep_dir())

    def on_log(self, step: StepReport) -> None:
        self.images_seen += step.images
        bad = self.left_out.get("train", Counter()) + Counter(step.skipped)
        # An epoch at least, so that the first bad image of a run does not count as a share of a handful.
        self.check_left_out("train", bad, max(self.images_seen + bad.total(), len(self.plan.index.samples)))
        if not self.world.main:
            return
        record = {"step": step.step, "epoch": round(step.epoch, 4)}
        record |= {f"{name}/train/loss": value for name, value in step.losses.items()}
        record |= {f"lr/{role}": value for role, value in step.learning_rates.items()}
        record |= {"pairs_per_second": step.pairs_per_second, "data_wait_share": step.data_wait_share}
        record |= self.system.sample() if self.system else {}
        self.journal.append(record)
        self.progress.report(step.step, step.epoch, step.losses, step.pairs_per_second, step.data_wait_share)

    def check_left_out(self, split: str, bad: Counter[str], images: int) -> None:
        """Notes what was left out of `images`, names each reason once, and stops when it is too much."""
        self.left_out[split] = bad
        if bad.total() > self.cfg.data.max_bad_share * images:
            share = f"more than data.max_bad_share={self.cfg.data.max_bad_share}"
            shown = ", ".join(f"{place} ({count})" for place, count in sorted(bad.items()))
            raise DataError(f"{bad.total()} of {images} images are bad, {share}: {shown}")
        for place in sorted(bad):
            reason = place.partition(": ")[2]
            if reason not in self.said and self.world.main:
                log.warning(f"left out a bad image of {place} (the first for this reason; report.json counts them)")
            self.said.add(reason)

    def wants_save(self) -> bool:
        """By the clock of rank 0, so that ranks never disagree."""
        every = self.cfg.checkpoint.every_minutes
        return self.world.main and every is not None and time.perf_counter() - self.saved_at > 60 * every

    def after_step(self, step: int, wishes: Wishes) -> bool:
        """Evaluates and saves where it is time to; False ends the training."""
        every, last = self.cfg.checkpoint.every_steps, step == self.total_steps
        self.heartbeat.step(step, wishes.stop or last)
        self.saver.check()
        if self.profiler is not None:
            self.profiler.step()
        if self.world.main:
            self.progress.step(step)
        if self.is_evaluation(step):
            self.save(self.evaluate(step))
        elif wishes.stop or wishes.save or last or (every and step % every == 0):
            self.save()
        if wishes.stop and not last:
            self.saver.wait()
            # A rank that ended now could take rank 0 along while it still writes.
            distributed.barrier()
            raise Stopped(f"stopped by a signal after step {step}; the same command goes on from there")
        if self.out_of_patience():
            self.say(f"no better evaluation in {self.stale} in a row (eval.patience): training ends at step {step}")
            return False
        return True

    def out_of_patience(self) -> bool:
        return self.cfg.eval.patience is not None and self.stale >= self.cfg.eval.patience

    def is_evaluation(self, step: int) -> bool:
        every, cfg = self.cfg.eval.every_steps, self.cfg
        if every is None and cfg.eval.every_epochs is not None:
            every = cfg.eval.every_epochs * self.plan.pairs_per_epoch / cfg.global_batch
        # An interval of a fractional number of steps: the first step at or past each multiple of it.
        return every is not None and (step == self.total_steps or step // every > (step - 1) // every)

    def evaluate(self, step: int) -> bool:
        """Evaluates on the validation split; True if it is the best so far."""
        cfg = self.cfg
        self.trainer.check_finite()
        metrics = self.measure(self.validation, "val", f"step {step}").metrics
        if cfg.task.metric not in metrics:
            found = f"there are {', '.join(metrics)}" if metrics else "the split has no labels"
            raise ConfigError(f"task.metric={cfg.task.metric} was not measured: {found}")
        value = metrics[cfg.task.metric]
        sign = 1 if cfg.task.mode == "max" else -1
        best = self.best is None or sign * value > sign * self.best["value"]
        self.stale = 0 if best else self.stale + 1
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
        state = {
            "config": self.cfg.recorded,
            "scaler": self.trainer.scaler.state_dict(),
            "best": self.best,
            "stale": self.stale,
            "seconds": self.elapsed(),
            "images_seen": self.images_seen,
            "left_out": {split: dict(bad) for split, bad in self.left_out.items()},
            "labels": self.train_set.labels,
        }
        watch.mark(self.trainer.step, "saving")
        self.saver.save(
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
            checkpoint.load_model(checkpoint.best_checkpoint(self.run_dir) / "model.safetensors", self.model)
        metrics = dict(self.best["metrics"]) if self.best else {}
        if self.test is not None:
            weights = f"step {self.best['step'] if self.best else self.trainer.step}"
            measured = self.measure(self.test, "test", weights, predictions=True)
            metrics |= measured.metrics
            if self.world.main:
                # A run that was killed here before has this line already.
                known = any(record.keys() >= measured.metrics.keys() for record in self.journal.records())
                if measured.metrics and not known:
                    self.journal.append({"step": self.trainer.step, **measured.metrics})
                write_predictions(self.run_dir, "test", self.model.objectives, measured)
        return metrics

    def measure(self, batches: Loader, split: str, weights: str, predictions: bool = False) -> Measured:
        """Measures a split; stops where too much of it is bad. weights: tells apart what the model holds by then."""
        watch.mark(self.trainer.step, f"evaluating {split}")
        how = Measuring(
            split,
            self.cfg.trainer.precision,
            self.run_dir / ".evaluation",
            f"{weights} {split}",
            self.cfg.eval.cache_bytes,
        )
        measured = evaluate(self.model, batches, self.world, how, predictions=predictions)
        self.check_left_out(split, measured.skipped, batches.images)
        return measured

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
            "cost": asdict(self.cost),
            "left_out": {split: dict(sorted(bad.items())) for split, bad in self.left_out.items()},
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
        tags = {key: str(content[key]) for key in ("seconds", "pairs_per_second")} | {"checkpoint": str(best.resolve())}
        mirror.finish("FINISHED", [path for path in (written, curves) if path], tags)
        self.say(f"finished; {written}")


def write_predictions(folder: Path, split: str, objectives: Mapping[str, Any], measured: Measured) -> None:
    """predictions-<split>.jsonl of all objectives, and what files they make of theirs, each whole or not at all."""
    rows = [row for found in measured.rows.values() for row in found]
    files = {f"predictions-{split}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)} if rows else {}
    for name, found in measured.rows.items():
        made = objectives[name].files(found, split) if found else {}
        files |= {file: json.dumps(value) + "\n" for file, value in made.items()}
    for file, text in files.items():
        temporary = folder / f".{file}"
        temporary.write_text(text)
        temporary.replace(folder / file)


def set_numerics(cfg: Config) -> None:
    """Everything is set, whatever a run before in the same process (a sweep) has left."""
    torch.set_num_threads(cfg.trainer.threads or DEFAULT_THREADS)
    torch.set_float32_matmul_precision(cfg.trainer.matmul_precision)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need on a GPU
    torch.use_deterministic_algorithms(cfg.trainer.deterministic)
    # Else every new tensor would be filled with NaN first, which costs time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False
