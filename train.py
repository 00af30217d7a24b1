"""The training loop: one SGD step, an epoch of training, an evaluation, the state of a run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.world import BatchShard, World
from engine import optimizer
from engine.cuda_graph import Capturer, StepRunner
from engine.gradients import GradientReducer
from engine.metrics import Metrics, Results
from engine.nonfinite import NonFiniteGuard
from engine.precision import PRECISIONS, autocast
from engine.schedule import LRSchedule
from errors import NonFiniteError
from experiment.log import RunLog


class Metadata(NamedTuple):
    """What a checkpoint says of its run, as plain values.

    Args:
        settings: by the names of flags.
        data: facts that a resumed run must find again, see datasets.factory.DataSplits.
        overrides: what the run was continued with otherwise, in words.
    """

    settings: dict[str, object]
    data: dict[str, object]
    overrides: list[str]


class Trainer:
    """A network in training: its optimizer, its position in the run and its results so far.

    Args:
        model: moved to `device`, to channels-last memory, and to float64 if precision is double.
        make_optimizer: of the network on its device, from its learning rate.
        precision: single, double, half or bf16.
        num_crops: evaluate the mean of this many consecutive outputs per image.
        world: the replicas of the network, this one alone or one of several.
        shard: this replica's part of each batch; None for one replica.
        capturer: captures steps over resident data, see engine/cuda_graph.py; None: all eager.

    Attributes:
        metadata: of the run, which `state_dict` holds as well.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: LRSchedule,
        *,
        make_optimizer: Callable[[nn.Module, float | Tensor], torch.optim.Optimizer],
        precision: str,
        device: torch.device,
        log: RunLog,
        num_crops: int = 1,
        world: World | None = None,
        shard: BatchShard | None = None,
        capturer: Capturer | None = None,
    ):
        self.world, self.shard = world or World(), shard
        self.precision, mode = precision, PRECISIONS[precision]
        self.device, self.dtype, self.num_crops = device, mode.dtype, num_crops
        self.model = model.to(device, self.dtype, memory_format=torch.channels_last)
        self.schedule, self.log = schedule, log
        # A captured step cannot see a Python number change, so the LR lies in device memory; on
        # every GPU, so that captured or not makes no difference (there it is rounded to float32).
        on_device = device.type == "cuda" or capturer is not None
        lr = torch.tensor(schedule.base_lr, device=device) if on_device else schedule.base_lr
        self.optimizer = make_optimizer(self.model, lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode.scales_loss)
        self._reducer = GradientReducer(list(model.parameters()), self.world)
        self._guard = NonFiniteGuard(device)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self._guard.found_inf
        self._runner = StepRunner(self.world, shard, capturer, log.warn_once)

        self.metadata = Metadata({}, {}, [])
        self.epoch, self.step, self.global_step = 1, 0, 0  # step: done in this epoch
        self.results = Results()
        self.metrics, self._eval_metrics = Metrics(device), Metrics(device)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.metrics.reset()
        self.time_s = self.data_s = 0.0

    def train(self, loader, on_step_end: Callable[[], None]) -> dict[str, float]:
        """Finish the current epoch from wherever it stands; its means, rate and speed.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            on_step_end: called after each step; may save, may raise to stop.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are from before that step.
        """
        self.model.train()
        steps = len(loader.sampler)
        self._guard.start(self.global_step)
        progress = self.log.progress("train", self.epoch, steps, self.step, self.metrics)
        with progress, _name_batch_on_error(self.epoch, loader.sampler):
            begin = partial(self._begin_step, steps)
            for stats in self._runner.run(self._train_step, loader, self.epoch, self.step, begin):
                self.data_s += stats.data_s
                self.time_s += stats.time_s
                # Before the device is read, which waits for ever for a peer that is lost.
                on_step_end()
                # On the CPU reading costs nothing; a GPU is read when something is shown.
                if self.device.type == "cpu" or progress.should_display():
                    self._timed_check_finite()
                progress.update(stats.num_images, stats.data_s, self._current_lr(steps))
            self._timed_check_finite()  # waits for the steps that are still on their way
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
        """The learning rate of the step that was begun last."""
        return self.schedule.lr(self.epoch, max(self.step, 1), steps)

    def _begin_step(self, steps: int) -> None:
        """What of a step is not captured: count it, and set its rate."""
        self.step += 1
        self.global_step += 1
        optimizer.set_lr(self.optimizer, self._current_lr(steps))

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        self._guard.next_step()
        if not (self.shard.global_size if self.shard else len(targets)):
            return  # every image of it was skipped
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits, loss = self._loss(images, targets)
        weighted = loss * self.shard.loss_weight if self.shard else loss
        scales_loss = self.scaler.is_enabled()
        if scales_loss:
            # Loss scaling skips a step by its gradients alone: once a loss was bad, dividing by
            # zero spoils them; until then dividing by one changes nothing.
            self._guard.record_nonfinite(~torch.isfinite(loss.detach()))
            weighted = self.scaler.scale(weighted / (1 - self._guard.found_inf))
        weighted.backward()
        finite_loss, finite_gradients = self._reducer.reduce(loss)
        self._guard.check_loss(finite_loss)
        # Gradients that overflow are usual with loss scaling, which then lowers its scale.
        self._guard.record_nonfinite(
            ~finite_loss if scales_loss else ~(finite_loss & finite_gradients)
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if len(targets):
            self.metrics.add(loss, logits.detach(), targets)

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their mean loss; of one empty image and 0 where there are none."""
        if len(targets):
            logits = self.model(images)  # (N, C)
            return logits, F.cross_entropy(logits, targets)
        # The other replicas wait for this one in each batch normalisation and in dropout's draws.
        logits = self.model(images.new_zeros(1, *images.shape[1:]))
        return logits, 0 * logits.sum()

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient was not finite yet (waits for the device)."""
        found = self._guard.first_nonfinite_step()
        if found:
            nonfinite_step, what = found
            step = self.step - (self.global_step - nonfinite_step)
            raise NonFiniteError(
                f"{what} is not finite at epoch {self.epoch}, step {step}",
                "lower --LR, or --precision single; the last checkpoint is from before",
                step=step,
            )

    def _timed_check_finite(self) -> None:
        """The same as a part of the epoch's time."""
        since = time.perf_counter()
        self.check_finite()
        self.time_s += time.perf_counter() - since

    @torch.no_grad()
    def evaluate(
        self, loader, on_batch_end: Callable[[], None], phase: str = "val"
    ) -> dict[str, float]:
        """Loss and errors of the network over every image of `loader`, each counted once.

        Of the first replica's network, whose running statistics are the ones that are saved.
        """
        self.world.broadcast_([*self.model.parameters(), *self.model.buffers()])
        self.model.eval()
        metrics = self._eval_metrics
        metrics.reset()
        with self.log.progress(phase, self.epoch, len(loader.sampler), 0, metrics) as progress:
            for stats in self._runner.run(self._eval_step, loader, self.epoch):
                on_batch_end()
                progress.update(stats.num_images, stats.data_s)
            metrics = metrics.all_reduced(self.world.all_reduce_)
            progress.finish(metrics)
        return {f"{phase}_{name}": value for name, value in metrics.compute().items()}

    def _eval_step(self, images: Tensor, targets: Tensor) -> None:
        if not len(targets):
            return
        with autocast(self.device, self.precision):
            logits = self.model(images).to(self.dtype)  # (N * crops, C)
            logits = mean_over_crops(logits, self.num_crops)  # (N, C)
            loss = F.cross_entropy(logits, targets)
        self._eval_metrics.add(loss, logits, targets)

    # ------------------------------------------------------------------------- results and state

    def finish_epoch(self, train: dict, val: dict) -> dict:
        """Close the current epoch: note its result, move on, return its log record."""
        record = {"epoch": self.epoch, **train, **val}
        self.results.add(record)
        self.epoch += 1
        self.step = 0
        self._start_epoch()
        return record

    @property
    def position(self) -> dict[str, int]:
        """Epoch, steps done in it, and steps done in all."""
        return {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch has just ended and the next has not begun."""
        return self.step == 0 and self.results.last is not None

    def state_dict(self) -> dict:
        """Everything that continuing exactly needs, as plain values and tensors.

        All replicas have to call it at the same step. fileio/checkpoint_schema.py lists it.
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
        """Continue from `state_dict()`; names and shapes were compared before."""
        self.model.load_state_dict(state["model"])
        optimizer.load_state_by_name(self.optimizer, self.model, state["momentum"])
        # With --override loss scaling may be on where it was off, or off.
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.results = Results(state["last"], state["best"])
        for name in ("epoch", "step", "global_step", "time_s", "data_s"):
            setattr(self, name, state[name])
        if state["sums"] and self.world.is_rank0:  # they are those of all replicas
            self.metrics.load_state_dict(state["sums"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


@contextmanager
def _name_batch_on_error(epoch: int, sampler) -> Iterator[None]:
    """Let the error about a step that is not finite name the images of its batch."""
    try:
        yield
    except NonFiniteError as error:
        if step := error.details.pop("step", None):
            error.details["batch"] = sampler.step_indices(epoch, step - 1)
        raise


def mean_over_crops(logits: Tensor, num_crops: int) -> Tensor:
    """(N * num_crops, C) -> (N, C)."""
    # It ranks classes as the sum of fb.resnet.torch does, and has a loss.
    return logits.unflatten(0, (-1, num_crops)).mean(dim=1)


def create_trainer(
    opt: SimpleNamespace,
    model: nn.Module,
    device: torch.device,
    log: RunLog,
    world: World | None = None,
    shard: BatchShard | None = None,
    capturer: Capturer | None = None,
) -> Trainer:
    """The trainer that the settings describe, at the run's first epoch."""
    trainer = Trainer(
        model,
        LRSchedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones),
        make_optimizer=partial(optimizer.create, opt),
        precision=opt.precision,
        device=device,
        log=log,
        num_crops=10 if opt.tenCrop else 1,
        world=world,
        shard=shard,
        capturer=capturer,
    )
    trainer.epoch = opt.epochNumber
    return trainer
