"""The training loop: schedules, one SGD step, an epoch of training, an evaluation."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.world import Share, World
from engine.cuda_graph import WARM_UP, Recorder, ReplayedStep, Step
from engine.gradients import Gradients
from engine.metrics import Sums
from engine.precision import autocast
from engine.schedule import Schedule
from errors import NonFiniteError
from experiment.log import RunLog


class Trainer:
    """A network in training: its optimizer, its position in the run and its results so far.

    Args:
        model: moved to `device`, to channels-last memory, and to float64 if precision is double.
        precision: single, double, half or bf16.
        num_crops: evaluate the mean of this many consecutive outputs per image.
        world: the replicas of the network, this one alone or one of several.
        share: what this replica has of each batch; None for one replica.
        recorder: records steps over resident data, see engine/cuda_graph.py; None: all run eagerly.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        momentum: float,
        weight_decay: float,
        precision: str,
        device: torch.device,
        log: RunLog,
        num_crops: int = 1,
        world: World | None = None,
        share: Share | None = None,
        recorder: Recorder | None = None,
    ):
        self.world, self.share = world or World(), share
        self.dtype = torch.float64 if precision == "double" else torch.float32
        self.model = model.to(device, self.dtype, memory_format=torch.channels_last)
        self.schedule, self.log = schedule, log
        self.device, self.precision, self.num_crops = device, precision, num_crops
        self._recorder = recorder
        self._replayed: dict[tuple, ReplayedStep] = {}
        self._practised: Counter[str] = Counter()  # how often each kind of step was done
        # A recorded step cannot see a Python number change, so the rate lies in device memory; on
        # every GPU, so that recorded or not makes no difference (there it is rounded to float32).
        on_device = device.type == "cuda" or recorder is not None
        self._rate = torch.tensor(schedule.base, device=device) if on_device else schedule.base
        # Parity: one group, so that weight decay acts on BN and biases as well.
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=self._rate,
            momentum=momentum,
            dampening=0,
            weight_decay=weight_decay,
            nesterov=momentum > 0,
            fused=True,
        )
        if momentum > 0:
            # Before the first step, in the memory format of each parameter: the fused kernel
            # reads both linearly, and leaves a fresh buffer undefined if it skips that step.
            for parameter in model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "half")
        self._gradients = Gradients(list(model.parameters()), self.world.size, self.world.sum_)
        # 1 from the first step whose loss or gradient is not finite: the fused kernel then changes
        # nothing, and the step number waits on the device until somebody reads it.
        self._bad = torch.zeros((), device=device)
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        self._clock = torch.zeros((), dtype=torch.int64, device=device)  # global_step, over there
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self._bad

        self._chosen: Callable[[int, int], list[int]] = lambda epoch, step: []  # of a batch
        self.epoch, self.step, self.global_step = 1, 0, 0  # step: done in this epoch
        self.best: dict | None = None
        self.last: dict | None = None
        self.sums, self._test_sums = Sums(device), Sums(device)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.sums.reset()
        self.time_s = self.data_s = 0.0

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass in this run's precision."""
        return autocast(self.device, self.precision)

    def train(self, loader, after_step: Callable[[], None]) -> dict[str, float]:
        """Finish the current epoch from wherever it stands; its means, rate and speed.

        Args:
            loader: `batches(epoch, start)` yields (images, targets) on the device.
            after_step: called after each step; may save, may raise to stop.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are from before that step.
        """
        self.model.train()
        self._chosen = loader.deal.chosen
        steps = len(loader.deal)
        rate = self.schedule.rate(self.epoch, max(self.step, 1), steps)
        self._clock.fill_(self.global_step)
        progress = self.log.phase("train", self.epoch, steps, self.step, self.sums)
        with progress:
            works = self._works(loader, self._train_step, self.step)
            for count, work, data_s, since in _timed(works):
                self.step += 1
                self.global_step += 1
                rate = self.schedule.rate(self.epoch, self.step, steps)
                self._set_rate(rate)
                work()
                self.data_s += data_s
                self.time_s += time.perf_counter() - since
                # Before the device is read, which waits for ever for a peer that is lost.
                after_step()
                # On the CPU reading costs nothing; a GPU is read when something is shown.
                if self.device.type == "cpu" or progress.is_due():
                    since = time.perf_counter()
                    self.check_finite()
                    self.time_s += time.perf_counter() - since
                progress.update(count, data_s, rate)
            since = time.perf_counter()
            self.check_finite()  # waits for the steps that are still on their way
            self.time_s += time.perf_counter() - since
            sums = self.sums.over_all(self.world.sum_)
            progress.finish(sums, rate)
        return {
            "lr": rate,
            **{f"train_{name}": value for name, value in sums.read().items()},
            "images_per_s": sums.count / self.time_s if self.time_s else 0.0,
            "data_wait": self.data_s / self.time_s if self.time_s else 0.0,
            "time_s": self.time_s,
        }

    def _works(self, loader, step: Step, start: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """The images of each step from `start` on, over all replicas, and what does the step."""
        deal = loader.deal
        self._practise(step, 0)
        if self._recorder and deal.full_steps:
            # The last batch may be smaller, so another shape: it runs eagerly like all the others.
            replayed = self._replay_of(loader, step)
            replayed.seek(self.epoch, start)
            while start < deal.full_steps:
                self._begin_step([deal.width] * deal.size)
                yield deal.stride, replayed
                start += 1
                self._practise(step, 1)
        if start < len(deal):
            for images, targets in loader.batches(self.epoch, start):
                counts = self.world.numbers(len(targets))
                self._begin_step(counts)
                yield sum(counts), partial(step, images, targets)
                self._practise(step, 1)

    def _practise(self, step: Step, times: int) -> None:
        """Count steps: after the first few they take as long in every process."""
        self._practised[step.__name__] += times
        self.world.is_patient = self._practised[step.__name__] <= WARM_UP + 1

    def _begin_step(self, counts: list[int]) -> None:
        if self.share:
            self.share.set(counts)

    def _replay_of(self, loader, step: Step) -> ReplayedStep:
        key = (id(loader), step.__name__)
        if key not in self._replayed:
            self._replayed[key] = ReplayedStep(loader, step, self._recorder, self._stop_recording)
        return self._replayed[key]

    def _stop_recording(self, reason: str) -> None:
        # What failed once would leave more behind each time. Still by way of ReplayedStep: other
        # eager steps have one exchange more, which the other processes would not have.
        self._recorder = lambda work: work
        self.log.warn_once(f"a step cannot be recorded as a CUDA graph: {reason}; it runs eagerly")

    def _set_rate(self, rate: float) -> None:
        if isinstance(self._rate, Tensor):
            self._rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        self._clock += 1
        if self._is_empty(targets):
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits, loss = self._loss(images, targets)
        weighted = loss * self.share.weight if self.share else loss
        if self.scaler.is_enabled():
            # Loss scaling skips a step by its gradients alone: once a loss was bad, dividing by
            # zero spoils them; until then dividing by one changes nothing.
            self._mark(~torch.isfinite(loss.detach()))
            weighted = self.scaler.scale(weighted / (1 - self._bad))
        weighted.backward()
        finite_loss, finite_gradients = self._gradients.finish(loss)
        is_first = (self._bad_step < 0) | (self._bad_step == self._clock)
        self._bad_loss |= ~finite_loss & is_first  # what came later is its consequence
        # Gradients that overflow are usual with loss scaling, which then lowers its scale.
        self._mark(~finite_loss if self.scaler.is_enabled() else ~(finite_loss & finite_gradients))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if len(targets):
            self.sums.add(loss, logits.detach(), targets)

    def _is_empty(self, targets: Tensor) -> bool:
        """Whether no replica has an image of the step: every one of them was skipped."""
        return not (self.share.total if self.share else len(targets))

    def _loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their mean loss; of one empty image and 0 where there are none."""
        if len(targets):
            logits = self.model(images)  # (N, C)
            return logits, F.cross_entropy(logits, targets)
        # The other replicas wait for this one in each batch normalisation and in dropout's draws.
        logits = self.model(images.new_zeros(1, *images.shape[1:]))
        return logits, 0 * logits.sum()

    def _mark(self, bad: Tensor) -> None:
        """Keep the number of the first bad step, and from then on change no weight."""
        first = bad & (self._bad_step < 0)
        torch.where(first, self._clock, self._bad_step, out=self._bad_step)
        self._bad.masked_fill_(bad, 1.0)

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient was not finite yet (waits for the device)."""
        bad_step = self._bad_step.item()
        if bad_step >= 0:
            step = self.step - (self.global_step - bad_step)
            what = "loss" if self._bad_loss.item() else "a gradient"
            raise NonFiniteError(
                f"{what} is not finite at epoch {self.epoch}, step {step}",
                "lower --LR, or --precision single; the last checkpoint is from before",
                batch=self._chosen(self.epoch, step - 1),
            )

    @torch.no_grad()
    def test(self, loader, after_batch: Callable[[], None], phase: str = "val") -> dict[str, float]:
        """Loss and errors of the network over every image of `loader`, each counted once.

        Of the first replica's network, whose running statistics are the ones that are saved.
        """
        self.take_from_first()
        self.model.eval()
        sums = self._test_sums
        sums.reset()
        with self.log.phase(phase, self.epoch, len(loader.deal), 0, sums) as progress:
            for count, work, data_s, _ in _timed(self._works(loader, self._test_step, 0)):
                work()
                after_batch()
                progress.update(count, data_s)
            sums = sums.over_all(self.world.sum_)
            progress.finish(sums)
        return {f"{phase}_{name}": value for name, value in sums.read().items()}

    def take_from_first(self) -> None:
        """Make the networks of all replicas that of the first one."""
        with torch.no_grad():
            self.world.take_from_first([*self.model.parameters(), *self.model.buffers()])

    def _test_step(self, images: Tensor, targets: Tensor) -> None:
        if not len(targets):
            return
        with self.autocast():
            logits = self.model(images).to(self.dtype)  # (N * crops, C)
            logits = mean_over_crops(logits, self.num_crops)  # (N, C)
            loss = F.cross_entropy(logits, targets)
        self._test_sums.add(loss, logits, targets)

    def finish_epoch(self, train: dict, val: dict) -> dict:
        """Close the current epoch: update best and last, move on, return its log record."""
        record = {"epoch": self.epoch, **train, **val}
        self.last = {name: record[name] for name in ("epoch", "val_loss", "val_top1", "val_top5")}
        finite = math.isfinite(record["val_loss"])  # an error computed from NaN is no result
        if finite and (self.best is None or self.last["val_top1"] < self.best["val_top1"]):
            self.best = self.last
        self.epoch += 1
        self.step = 0
        self._start_epoch()
        return record

    def results(self) -> dict[str, float]:
        """The errors of the last and of the best epoch, by flat names such as `best_top1`."""
        return {
            f"{which}_{name.removeprefix('val_')}": value
            for which, result in (("last", self.last), ("best", self.best))
            for name, value in (result or {}).items()
        }

    @property
    def position(self) -> dict[str, int]:
        """Epoch, steps done in it, and steps done in all."""
        return {"epoch": self.epoch, "step": self.step, "global_step": self.global_step}

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch has just ended and the next has not begun."""
        return self.step == 0 and self.last is not None

    @property
    def is_best(self) -> bool:
        """Whether the epoch that ended last is the best so far."""
        return self.best is not None and self.best == self.last

    def state_dict(self) -> dict:
        """Everything that continuing exactly needs, as plain values and tensors.

        All replicas have to call it at the same step.
        """
        momentum = {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if "momentum_buffer" in self.optimizer.state[parameter]
        }
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "model": self.model.state_dict(),
            "momentum": momentum,
            "scaler": self.scaler.state_dict(),
            "rng": rng,
            **self.position,
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "replicas": self.world.size,
            "sums": self.sums.over_all(self.world.sum_).state_dict(),
            "time_s": self.time_s,
            "data_s": self.data_s,
            "best": self.best,
            "last": self.last,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict()`; names and shapes were compared before."""
        self.model.load_state_dict(state["model"])
        for name, parameter in self.model.named_parameters():
            # With --override, momentum and loss scaling may be on where they were off, or off.
            if name in state["momentum"] and self.optimizer.state[parameter]:
                # Copied, not replaced, to keep the memory format that the fused kernel reads.
                buffer = self.optimizer.state[parameter]["momentum_buffer"]
                buffer.copy_(state["momentum"][name])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in ("epoch", "step", "global_step", "time_s", "data_s", "best", "last"):
            setattr(self, name, state[name])
        if state["sums"] and self.world.is_first:  # they are those of all replicas
            self.sums.load_state_dict(state["sums"])
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)


def mean_over_crops(logits: Tensor, num_crops: int) -> Tensor:
    """(N * num_crops, C) -> (N, C)."""
    # It ranks classes as the sum of fb.resnet.torch does, and has a loss.
    return logits.unflatten(0, (-1, num_crops)).mean(dim=1)


def _timed(pairs: Iterator[tuple]) -> Iterator[tuple]:
    """Each pair with the seconds spent waiting for it and the time when the waiting began."""
    since = time.perf_counter()
    for first, second in pairs:
        yield first, second, time.perf_counter() - since, since
        since = time.perf_counter()


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
        momentum=opt.momentum,
        weight_decay=opt.weightDecay,
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
