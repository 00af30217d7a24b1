#!/usr/bin/env bash
# OpenVINO runs a model whose weights and inputs are float32 in bfloat16, unless told not to.
#
# openvino 2026.4.1, on a CPU with avx512_bf16 or amx_bf16; on others the two results are equal. A
# model of one 256 x 256 product, float32 throughout, as read or as saved with
# compress_to_fp16=False:
#
#   compile_model(model, "CPU")                                      2e-3 of the largest result off
#   compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) below 1e-6
#
# The hint's default is bf16 on such a CPU, whatever the model says; "f16" gives bf16 as well. So the
# same file, on two machines, gives results that differ in the third digit, and a check that passes on
# an older CPU fails on a newer one.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check openvino==2026.4.1 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import numpy as np
import openvino
from openvino import opset13 as ops

rng = np.random.default_rng(0)
weights, x = (rng.normal(size=(256, 256)).astype(np.float32) for _ in range(2))
given = ops.parameter([256, 256], np.float32)
model = openvino.Model([ops.matmul(given, ops.constant(weights), False, False)], [given])
wanted = x.astype(np.float64) @ weights.astype(np.float64)
found = {}
for hint in (None, "f32"):
    settings = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    off = np.abs(compiled([x])[0] - wanted).max() / np.abs(wanted).max()
    used = compiled.get_property("INFERENCE_PRECISION_HINT")
    print(f"hint {hint}: computes in {used}, {off:.1e} of the largest off")
    found[hint] = off
flags = open("/proc/cpuinfo").read()
assert found["f32"] < 1e-6
if "avx512_bf16" in flags or "amx_bf16" in flags:
    assert found[None] > 1e-4
P
