"""Train and evaluate a network: SGD steps, epochs, evaluation, and the state to resume from.

main.py builds a Trainer's arguments; checkpoints.py saves its state; experiment/ prints and logs.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed.world import BatchShard, World
from engine import optimizer, schedule
from engine.cuda_graph import Capturer, StepRunner
from engine.gradients import GradientReducer
from engine.losses import LOSSES, mean_loss, network_logits
from engine.metrics import Metrics, Results
from engine.nonfinite import NonFiniteGuard
from engine.precision import PRECISIONS, autocast
from errors import NonFiniteError
from experiment.log import RunLog


class Metadata(NamedTuple):
    """Describe a run in its checkpoint, in plain values (numbers, strings, lists, dicts)."""

    settings: dict[str, object]  # flag name -> value
    data: dict[str, object]  # compared on resume, see datasets.factory.DataSplits
    overrides: list[str]  # one phrase for each change of a setting that --override allowed
    defaults: list[str] | None = None  # flags that nobody has chosen; None: an older version's run


class Trainer:
    """Train and evaluate a network; hold its optimizer, epoch, step and results.

    A Trainer runs steps, sums their losses and errors, and raises once it finds a loss or gradient
    that is not finite. The loader makes batches, StepRunner runs steps eagerly or as CUDA graphs,
    RunLog prints, and the callbacks of `train` and `evaluate` save or stop.

    Args:
        opt: the settings; reads epochNumber, tenCrop, precision, loss, the LR and optimizer flags.
        model: maps (N, C, H, W) to what engine/losses.py reads; moved to `device` and `precision`,
            channels last. Its buffer `progress`, if any, is set to the fraction of epochs done.
        world, shard: all processes, and this one's part of each batch; None: one, or no training.
        capturer: captures steps as CUDA graphs (engine/cuda_graph.py); if None, steps run eagerly.
    """

    def __init__(
        self,
        opt: SimpleNamespace,
        model: nn.Module,
        device: torch.device,
        log: RunLog,
        world: World | None = None,
        shard: BatchShard | None = None,
        capturer: Capturer | None = None,
    ):
        self.device, self.log = device, log
        self.world, self.shard = world or World(), shard
        self.precision, mode = opt.precision, PRECISIONS[opt.precision]
        self.dtype, self.num_crops = mode.dtype, 10 if opt.tenCrop else 1
        self.model = model.to(device, self.dtype, memory_format=torch.channels_last)
        self.schedule, self.loss = schedule.create(opt), LOSSES[opt.loss]
        # A captured step reads its LR from a float32 tensor on the GPU. Eager GPU steps use the
        # same tensor, so that both round the LR alike.
        lr_on_device = device.type == "cuda" or capturer is not None
        lr = torch.tensor(opt.LR, device=device) if lr_on_device else opt.LR
        self.optimizer = optimizer.create(opt, self.model, lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode.scales_loss)
        self.scaler.scale(torch.zeros((), device=device))  # it makes its state, outside of a step
        self._reducer = GradientReducer(list(model.parameters()), self.world)
        self._guard = NonFiniteGuard(device)
        if not self.scaler.is_enabled():
            # Fused SGD skips its update if found_inf is 1. GradScaler sets it; without one we do.
            self.optimizer.found_inf = self._guard.found_inf
        reset = partial(optimizer.reset_step, self.optimizer, self.scaler)
        self._runner = StepRunner(self.world, shard, capturer, log.warn_once, reset)

        self.metadata, self.results = Metadata({}, {}, []), Results()  # main.py sets metadata
        # Steps done: `step` in the epoch, `global_step` in the run.
        self.epoch, self.step, self.global_step = opt.epochNumber, 0, 0
        self.metrics, self.evaluated = Metrics(device), None  # the last evaluation, of all ranks
        self._eval_metrics = Metrics(device, len(getattr(model, "classifier", model).weight))
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.metrics.reset()
        self.time_s = self.data_s = 0.0

    def train(self, loader, on_step_end: Callable[[], None]) -> dict[str, float]:
        """Train to the end of the current epoch; return loss, errors (per cent), LR and speed.

        Args:
            loader: `batches(epoch, first_step)` yields images (N, C, H, W) and targets (N,).
            on_step_end: called after each step; may save a checkpoint, or raise to end the run.

        Raises:
            NonFiniteError: a loss or gradient is not finite; its step has not changed the weights.
        """
        self.model.train()
        steps = len(loader.sampler)
        self._guard.start(self.global_step)
        progress = self.log.progress("train", self.epoch, steps, self.step, self.metrics)
        begin = partial(self._advance_step, steps)
        with progress, _name_batch_on_error(self.epoch, loader.sampler):
            for stats in self._runner.run(self._train_step, loader, self.epoch, self.step, begin):
                # Time the steps only, not the callback, which may save a checkpoint.
                self.data_s += stats.data_s
                self.time_s += stats.time_s
                # It raises if a process has died, whose gradients a read would wait for forever.
                on_step_end()
                # On a GPU the check waits for queued steps: run it only when a line is printed.
                if self.device.type == "cpu" or progress.should_display():
                    self._timed_check_finite()
                progress.update(stats.num_images, stats.data_s, self._current_lr(steps))
            # Wait for the steps still queued on the GPU, then sum over all processes.
            self._timed_check_finite()
            metrics = self.metrics.all_reduced(self.world.all_reduce_)
            progress.finish(metrics, self._current_lr(steps))
        return {
            "lr": self._current_lr(steps),
            **{f"train_{name}": value for name, value in metrics.compute().items()},
            "images_per_s": metrics.count / self.time_s if self.time_s else 0.0,
            "data_wait": self.data_s / self.time_s if self.time_s else 0.0,
            "time_s": self.time_s,
        }

    def _current_lr(self, steps: int) -> float:
        """Return the LR of step `self.step`, or of step 1 if none has begun; `steps` per epoch."""
        return self.schedule.lr(self.epoch, max(self.step, 1), steps)

    def _advance_step(self, steps: int) -> None:
        """Count a step and set its learning rate, in Python, outside of a captured graph."""
        self.step += 1
        self.global_step += 1
        optimizer.set_lr(self.optimizer, self._current_lr(steps))
        if hasattr(self.model, "progress"):
            self.model.progress.fill_((self.epoch - 1) / self.schedule.num_epochs)

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        """Do one SGD step; never wait for the device, so that a CUDA graph can capture it."""
        self._guard.next_step()
        global_size = self.shard.global_size if self.shard else len(targets)
        if global_size == 0:
            return  # every image of the batch was unreadable and skipped

        # Forward: the mean loss over this process's images.
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits, loss = self._loss(images, targets)

        # Shards may differ in size: weight the losses to get the global batch's mean gradient.
        weighted = loss * self.shard.loss_weight if self.shard else loss
        scales_loss = self.scaler.is_enabled()
        if scales_loss:
            # GradScaler skips an update only if a gradient is not finite. After a non-finite loss,
            # found_inf is 1, and dividing by 1 - 1 = 0 makes every gradient non-finite.
            self._guard.record_nonfinite(~torch.isfinite(loss.detach()))
            weighted = self.scaler.scale(weighted / (1 - self._guard.found_inf))

        # Backward; average gradients over processes; test all losses and gradients for NaN and inf.
        weighted.backward()
        finite_loss, finite_gradients = self._reducer.reduce(loss)

        # Record a non-finite step on the device. With loss scaling, a gradient that overflows is
        # normal: the scaler skips the step and lowers its scale.
        self._guard.check_loss(finite_loss)
        is_finite = finite_loss if scales_loss else finite_loss & finite_gradients
        self._guard.record_nonfinite(~is_finite)

        # Update the weights; the fused kernel (or the scaler) skips a non-finite step.
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if len(targets):  # else a zero image stood in
            self.metrics.add(loss, logits.detach(), targets)

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (N, C) and mean loss; without images, those of a zero image and 0."""
        is_empty = not len(targets)
        if is_empty:  # but this process must join syncBN's collectives and draw dropout's seed
            images, targets = images.new_zeros(1, *images.shape[1:]), targets.new_zeros(1)
        outputs = self.model(images)
        loss = mean_loss(self.loss, outputs, targets)
        return network_logits(outputs), 0 * loss if is_empty else loss

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient was not finite (waits for the device)."""
        self._guard.check(self.epoch, self.step)

    def _timed_check_finite(self) -> None:
        since = time.perf_counter()
        self.check_finite()
        self.time_s += time.perf_counter() - since

    @torch.no_grad()
    def evaluate(
        self, loader, on_batch_end: Callable[[], None], phase: str = "val"
    ) -> dict[str, float]:
        """Return mean loss and errors (per cent) over `loader`, each image counted once."""
        # Running statistics differ between processes: evaluate with rank 0's, which are saved.
        self.world.broadcast_([*self.model.parameters(), *self.model.buffers()])
        self.model.eval()
        metrics = self._eval_metrics  # not self.metrics, which may hold part of an epoch
        metrics.reset()
        with self.log.progress(phase, self.epoch, len(loader.sampler), 0, metrics) as progress:
            for stats in self._runner.run(self._eval_step, loader, self.epoch):
                on_batch_end()
                progress.update(stats.num_images, stats.data_s)
            # Each process evaluated some of the batches: sum over processes.
            self.evaluated = metrics = metrics.all_reduced(self.world.all_reduce_)
            progress.finish(metrics)
        return {f"{phase}_{name}": value for name, value in metrics.compute().items()}

    def _eval_step(self, images: Tensor, targets: Tensor) -> None:  # N * crops images
        if not len(targets):
            return  # no batch is left for this process
        with autocast(self.device, self.precision):
            logits = self.model(images).to(self.dtype)  # (N * crops, C)
            logits = mean_over_crops(logits, self.num_crops)  # (N, C)
            loss = self.loss(logits, targets)
        self._eval_metrics.add(loss, logits, targets)

    def finish_epoch(self, train: dict, val: dict) -> dict:
        """Record the epoch's result, move to the next epoch, and return the epoch's log record."""
        record = {"epoch": self.epoch, **train, **val}
        self.results.add(record)
        self.epoch += 1
        self.step = 0
        self._start_epoch()
        return record

    @property
    def position(self) -> dict[str, int]:
        """Return the epoch, the steps done in it, and the steps done since the start of the run."""
        return {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}

    @property
    def is_between_epochs(self) -> bool:
        """Tell whether an epoch has ended and no step of the next one is done."""
        return self.step == 0 and self.results.last is not None

    def state_dict(self) -> dict:
        """Return all that an exact resume needs, as plain values and tensors.

        All processes must call it at the same step: it sums over them. Entries:
        fileio/checkpoint_schema.py.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "momentum": optimizer.state_by_name(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            **self.position,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "replicas": self.world.size,
            "sums": self.metrics.all_reduced(self.world.all_reduce_).state_dict(),
            "time_s": self.time_s,
            "data_s": self.data_s,
            "best": self.results.best,
            "last": self.results.last,
            **self.metadata._asdict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict()`; experiment/resume.py has checked that it fits this model."""
        self.model.load_state_dict(state["model"])
        optimizer.load_state_by_name(self.optimizer, self.model, state["momentum"])
        # --override may have changed the precision, and with it loss scaling.
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.results = Results(state["last"], state["best"])
        for name in ("epoch", "step", "global_step", "time_s", "data_s"):
            setattr(self, name, state[name])
        if state["sums"] and self.world.is_rank0:  # summed over all processes already
            self.metrics.load_state_dict(state["sums"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


@contextmanager
def _name_batch_on_error(epoch: int, sampler) -> Iterator[None]:
    """Add the dataset indices of the batch's images to a NonFiniteError that passes through."""
    try:
        yield
    except NonFiniteError as error:
        if step := error.details.pop("step", None):
            error.details["batch"] = sampler.step_indices(epoch, step - 1)
        raise


def mean_over_crops(logits: Tensor, num_crops: int) -> Tensor:
    """Average (N * num_crops, C) logits over the crops of each image: (N, C)."""
    # fb.resnet.torch sums over crops; the mean ranks classes alike and has a cross entropy.
    return logits.unflatten(0, (-1, num_crops)).mean(dim=1)
