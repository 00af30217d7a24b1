"""What the training loop costs beyond the network: `python -m tools.overhead` with main.py's flags.

Two copies of one network train in one process, in turns of one step: one by Trainer with its loader
on synthetic images, one in a bare loop over one batch (forward, loss, backward, optimizer.step).
The ratio of their speeds is printed; 1 means that loading, augmentation, schedule, sums and
progress cost nothing.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import opts
from errors import RunError

WARM_UP, STEPS = 5, 60  # steps of each that do not count, and that do


def measure(opt: SimpleNamespace) -> list[tuple[float, float]]:
    """(seconds of a bare step, seconds of a step of the trainer), `STEPS` times."""
    import torch

    import datasets.factory
    import engine.device
    import models.factory
    import train
    from experiment import console
    from experiment.log import RunLog

    device = engine.device.select(opt.nGPU)
    engine.device.configure(opt.cudnn, opt.tf32)
    opt.nImages = opt.batchSize * (WARM_UP + STEPS)
    dtype = torch.float64 if opt.precision == "double" else torch.float32
    data = datasets.factory.create(opt, device, console.warn, dtype=dtype)
    model = models.factory.create(opt, len(data.classes))
    trainer = train.create(opt, copy.deepcopy(model), device, RunLog(None))
    bare = bare_step(
        trainer, model.to(device, trainer.dtype, memory_format=torch.channels_last), opt, data
    )
    times: list[tuple[float, float]] = []

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def after_step() -> None:
        nonlocal since
        ours = clock() - since
        start = clock()
        bare()
        times.append((clock() - start, ours))
        since = clock()

    since = clock()
    trainer.train(data.train, after_step)
    return times[WARM_UP:]


def bare_step(trainer, model, opt: SimpleNamespace, data) -> Callable[[], None]:
    """One training step of `model` with nothing around it, always on the same batch."""
    import torch
    import torch.nn.functional as F

    images, targets = next(iter(data.train.batches(epoch=1)))
    optimizer = torch.optim.SGD(
        model.parameters(),
        opt.LR,
        momentum=opt.momentum,
        weight_decay=opt.weightDecay,
        nesterov=opt.momentum > 0,
        fused=True,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with trainer.autocast():
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()

    return step


def main(argv: list[str]) -> int:
    """Print the ratio of the two speeds for the network that the flags describe."""
    try:
        opt = opts.parse(["--dataset", "synthetic", *argv])
        times = measure(opt)
    except RunError as error:
        print(error.report(), file=sys.stderr)
        return error.code
    bare, ours = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(bare / ours for bare, ours in times)
    print(f"bare loop  {opt.batchSize / bare:9.1f} images/s  (median of {len(times)} steps)")
    print(f"trainer    {opt.batchSize / ours:9.1f} images/s")
    print(f"ratio      {ratio:9.3f}             (median over pairs of steps)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
