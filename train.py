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

from distributed.world import Share, World
from engine import optimizer
from engine.cuda_graph import Recorder, StepRunner
from engine.gradients import Gradients
from engine.metrics import Results, Sums
from engine.nonfinite import NonFiniteGuard
from engine.precision import PRECISIONS, autocast
from engine.schedule import Schedule
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
        share: what this replica has of each batch; None for one replica.
        recorder: records steps over resident data, see engine/cuda_graph.py; None: all run eagerly.

    Attributes:
        metadata: of the run, which `state_dict` holds as well.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        make_optimizer: Callable[[nn.Module, float | Tensor], torch.optim.Optimizer],
        precision: str,
        device: torch.device,
        log: RunLog,
        num_crops: int = 1,
        world: World | None = None,
        share: Share | None = None,
        recorder: Recorder | None = None,
    ):
        self.world, self.share = world or World(), share
        self.precision, kind = precision, PRECISIONS[precision]
        self.device, self.dtype, self.num_crops = device, kind.dtype, num_crops
        self.model = model.to(device, self.dtype, memory_format=torch.channels_last)
        self.schedule, self.log = schedule, log
        # A recorded step cannot see a Python number change, so the rate lies in device memory; on
        # every GPU, so that recorded or not makes no difference (there it is rounded to float32).
        on_device = device.type == "cuda" or recorder is not None
        lr = torch.tensor(schedule.base, device=device) if on_device else schedule.base
        self.optimizer = make_optimizer(self.model, lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=kind.scales_loss)
        self._gradients = Gradients(list(model.parameters()), self.world)
        self._guard = NonFiniteGuard(device)
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self._guard.found_inf
        self._runner = StepRunner(self.world, share, recorder, log.warn_once)

        self.metadata = Metadata({}, {}, [])
        self.epoch, self.step, self.global_step = 1, 0, 0  # step: done in this epoch
        self.results = Results()
        self.sums, self._test_sums = Sums(device), Sums(device)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.sums.reset()
        self.time_s = self.data_s = 0.0

    def train(self, loader, after_step: Callable[[], None]) -> dict[str, float]:
        """Finish the current epoch from wherever it stands; its means, rate and speed.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            after_step: called after each step; may save, may raise to stop.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are from before that step.
        """
        self.model.train()
        steps = len(loader.sampler)
        self._guard.start(self.global_step)
        progress = self.log.phase("train", self.epoch, steps, self.step, self.sums)
        with progress, _naming_images(self.epoch, loader.sampler):
            begin = partial(self._begin_step, steps)
            for done in self._runner.run(self._train_step, loader, self.epoch, self.step, begin):
                self.data_s += done.data_s
                self.time_s += done.time_s
                # Before the device is read, which waits for ever for a peer that is lost.
                after_step()
                # On the CPU reading costs nothing; a GPU is read when something is shown.
                if self.device.type == "cpu" or progress.is_due():
                    self._check_finite_in_time()
                progress.update(done.num_images, done.data_s, self._rate(steps))
            self._check_finite_in_time()  # waits for the steps that are still on their way
            sums = self.sums.over_all(self.world.sum_)
            progress.finish(sums, self._rate(steps))
        return {
            "lr": self._rate(steps),
            **{f"train_{name}": value for name, value in sums.read().items()},
            "images_per_s": sums.count / self.time_s if self.time_s else 0.0,
            "data_wait": self.data_s / self.time_s if self.time_s else 0.0,
            "time_s": self.time_s,
        }

    def _rate(self, steps: int) -> float:
        """The learning rate of the step that was begun last."""
        return self.schedule.rate(self.epoch, max(self.step, 1), steps)

    def _begin_step(self, steps: int) -> None:
        """What of a step is not captured: count it, and set its rate."""
        self.step += 1
        self.global_step += 1
        optimizer.set_rate(self.optimizer, self._rate(steps))

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        self._guard.next_step()
        if not (self.share.total if self.share else len(targets)):
            return  # every image of it was skipped
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits, loss = self._loss(images, targets)
        weighted = loss * self.share.weight if self.share else loss
        scaled = self.scaler.is_enabled()
        if scaled:
            # Loss scaling skips a step by its gradients alone: once a loss was bad, dividing by
            # zero spoils them; until then dividing by one changes nothing.
            self._guard.mark(~torch.isfinite(loss.detach()))
            weighted = self.scaler.scale(weighted / (1 - self._guard.found_inf))
        weighted.backward()
        finite_loss, finite_gradients = self._gradients.finish(loss)
        self._guard.check_loss(finite_loss)
        # Gradients that overflow are usual with loss scaling, which then lowers its scale.
        self._guard.mark(~finite_loss if scaled else ~(finite_loss & finite_gradients))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if len(targets):
            self.sums.add(loss, logits.detach(), targets)

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
        found = self._guard.first_bad_step()
        if found:
            bad_step, what = found
            step = self.step - (self.global_step - bad_step)
            raise NonFiniteError(
                f"{what} is not finite at epoch {self.epoch}, step {step}",
                "lower --LR, or --precision single; the last checkpoint is from before",
                step=step,
            )

    def _check_finite_in_time(self) -> None:
        """The same as a part of the epoch's time."""
        since = time.perf_counter()
        self.check_finite()
        self.time_s += time.perf_counter() - since

    @torch.no_grad()
    def test(self, loader, after_batch: Callable[[], None], phase: str = "val") -> dict[str, float]:
        """Loss and errors of the network over every image of `loader`, each counted once.

        Of the first replica's network, whose running statistics are the ones that are saved.
        """
        self.world.take_from_first([*self.model.parameters(), *self.model.buffers()])
        self.model.eval()
        sums = self._test_sums
        sums.reset()
        with self.log.phase(phase, self.epoch, len(loader.sampler), 0, sums) as progress:
            for done in self._runner.run(self._test_step, loader, self.epoch):
                after_batch()
                progress.update(done.num_images, done.data_s)
            sums = sums.over_all(self.world.sum_)
            progress.finish(sums)
        return {f"{phase}_{name}": value for name, value in sums.read().items()}

    def _test_step(self, images: Tensor, targets: Tensor) -> None:
        if not len(targets):
            return
        with autocast(self.device, self.precision):
            logits = self.model(images).to(self.dtype)  # (N * crops, C)
            logits = mean_over_crops(logits, self.num_crops)  # (N, C)
            loss = F.cross_entropy(logits, targets)
        self._test_sums.add(loss, logits, targets)

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
            "sums": self.sums.over_all(self.world.sum_).state_dict(),
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
        if state["sums"] and self.world.is_first:  # they are those of all replicas
            self.sums.load_state_dict(state["sums"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


@contextmanager
def _naming_images(epoch: int, sampler) -> Iterator[None]:
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


def create(
    opt: SimpleNamespace,
    model: nn.Module,
    device: torch.device,
    log: RunLog,
    world: World | None = None,
    share: Share | None = None,
    recorder: Recorder | None = None,
) -> Trainer:
    """The trainer that the settings describe, at the run's first epoch."""
    trainer = Trainer(
        model,
        Schedule(opt.lrShape, opt.LR, opt.nEpochs, opt.milestones),
        make_optimizer=partial(optimizer.create, opt),
        precision=opt.precision,
        device=device,
        log=log,
        num_crops=10 if opt.tenCrop else 1,
        world=world,
        share=share,
        recorder=recorder,
    )
    trainer.epoch = opt.epochNumber
    return trainer
