#!/usr/bin/env bash
# Paddle's dropout in evaluation rounds its factor to single precision, and refuses a vector.
#
# paddlepaddle 3.3.1, CPU. Dropout(0.2, mode="downscale_in_infer"), the mode of paddle.vision's
# DenseNet, multiplies by 1 - p in evaluation:
#
#   float64, ones (2, 2)   0.800000011920929, which is 0.8 in float32, not 0.8
#   float64, ones (2,)     ValueError about a number of dimensions that must be between 0 and 1
#   x * (1 - 0.2), float64 0.8
#
# In training, vectors pass. So a network that works while it is trained may fail when it is tested,
# and a DenseNet-121 with dropout in double precision is 6e-8 of the largest logit off (3e-12 without
# dropout): who compares it with another library in double precision, to 1e-9, finds a difference
# that is in no weight.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    paddlepaddle==3.3.1 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import numpy as np
import paddle

dropout = paddle.nn.Dropout(0.2, mode="downscale_in_infer")
assert dropout(paddle.ones([2], "float64")).shape == [2]  # in training
dropout.eval()
ones = paddle.ones([2, 2], "float64")
found, plain = dropout(ones).numpy()[0, 0], (ones * (1 - 0.2)).numpy()[0, 0]
print(f"matrix: {found!r}, by multiplication: {plain!r}")
assert found == np.float64(np.float32(0.8)) != plain == 0.8
try:
    print("vector:", dropout(paddle.ones([2], "float64")))
    raise SystemExit("a vector is taken now")
except ValueError as error:
    print("vector: ValueError:", str(error).strip().splitlines()[0][:100])
P
