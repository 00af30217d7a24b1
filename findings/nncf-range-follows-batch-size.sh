#!/usr/bin/env bash
# nncf.quantize clips activations, and how much depends on how images are batched.
#
# nncf 3.4.0, openvino 2026.4.1. The same 100 images calibrate the same network, one convolution,
# once image by image, as the documentation's examples do, and once in one batch. Only the grouping
# differs, and a network that is quantised to the range of its activations has one answer.
#
#   100 batches of 1   the range ends at the mean of the images' largest values
#   1 batch of 100     it ends at the largest value
#
# The default collects a maximum for each batch and takes the mean of these maxima, whatever the
# batch size. Everything above is clipped: of the first kind half of the images lose their largest
# value. RangeEstimatorParametersSet.MINMAX makes both equal.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    nncf==3.4.0 openvino==2026.4.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'P'
import nncf
import numpy as np
import openvino
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from openvino import opset13 as ops

random = np.random.default_rng(0)
images = random.gamma(1, size=(100, 1, 8, 8)).astype("f")  # non-negative, as after a ReLU
weight = random.normal(size=(4, 1, 3, 3)).astype("f")


def largest(batch_size: int, **more) -> float:
    """Return where the range of the network's input ends."""
    given = ops.parameter([-1, 1, 8, 8], np.float32)
    nothing = [0, 0]
    result = ops.convolution(given, ops.constant(weight), [1, 1], nothing, nothing, [1, 1])
    model = openvino.Model([result], [given])
    batches = np.split(images, len(images) // batch_size)
    parameters = nncf.AdvancedQuantizationParameters(**more)
    model = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches),
                          advanced_parameters=parameters)
    (end,) = (node.input_value(2).get_node().data.item() for node in model.get_ops()
              if node.get_type_name() == "FakeQuantize"
              and node.input_value(0).get_node().get_type_name() == "Parameter")
    return end


top = images.max()
mean = images.max((1, 2, 3)).mean()
one, all_together = largest(1), largest(100)
exact = {"activations_range_estimator_params": RangeEstimatorParametersSet.MINMAX}
print(f"largest value {top:.3f}, mean of the images' largest {mean:.3f}")
print(f"range ends at {one:.3f} with batches of 1, at {all_together:.3f} with one batch of 100")
print(f"with MINMAX   {largest(1, **exact):.3f}                     {largest(100, **exact):.3f}")
assert abs(one - mean) < 1e-3 * mean and abs(all_together - top) < 1e-3 * top
assert abs(largest(1, **exact) - top) < 1e-3 * top
assert one < 0.8 * all_together
P
