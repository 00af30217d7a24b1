#!/usr/bin/env bash
# ONNX Runtime's entropy calibration clips nothing: it gives the ranges of MinMax, bit for bit.
#
# onnxruntime 1.31.1, onnx 1.23.2. The method is asked for to keep a few far values from widening a
# scale. One convolution is calibrated on normal noise in which one value of 4,096 is 20 times as
# large:
#
#   CalibrationMethod.MinMax       scale of the input as wide as the largest value
#   CalibrationMethod.Entropy      the same scales, the same file
#   CalibrationMethod.Percentile   (99.9) a scale 9 times as fine
#
# By default it counts values in 128 bins and looks for the best threshold for 128 levels: there is
# one candidate, all of them (later batches of larger values may add bins). No warning is given, and
# none of the options that quantize_static passes on to a calibrator changes the number of bins.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6 sympy==1.14.0
cd "$work"
venv/bin/python - <<'P'
import types

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, quantize_static

random = np.random.default_rng(0)
weight = numpy_helper.from_array(random.normal(size=(4, 1, 3, 3)).astype("f"), "weight")
images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 1, 64, 64])
result = helper.make_tensor_value_info("result", TensorProto.FLOAT, ["n", 4, 62, 62])
node = helper.make_node("Conv", ["images", "weight"], ["result"], kernel_shape=[3, 3])
graph = helper.make_graph([node], "one", [images], [result], [weight])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
          "one.onnx")
batch = random.normal(size=(20, 1, 64, 64)).astype("f")
batch[:, 0, 32, 32] *= 20
files, scales = {}, {}
for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy, CalibrationMethod.Percentile):
    batches = iter([{"images": batch}])
    reader = types.SimpleNamespace(get_next=lambda: next(batches, None))
    options = {"CalibPercentile": 99.9} if method is CalibrationMethod.Percentile else {}
    quantize_static("one.onnx", f"{method.name}.onnx", reader, calibrate_method=method,
                    extra_options=options)
    found = onnx.load(f"{method.name}.onnx")
    values = {each.name: numpy_helper.to_array(each) for each in found.graph.initializer}
    files[method], scales[method] = found.SerializeToString(), values["images_scale"].item()
    print(f"{method.name:10} scale of the input {scales[method]:.4f}, largest value "
          f"{np.abs(batch).max():.1f}")
assert files[CalibrationMethod.Entropy] == files[CalibrationMethod.MinMax]
assert scales[CalibrationMethod.Percentile] < 0.3 * scales[CalibrationMethod.Entropy]
P
