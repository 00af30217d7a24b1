#!/usr/bin/env bash
# ncnn rounds the weights of fully connected layers to half precision, though the file has float32.
#
# ncnn 1.0.20261020, x86. Files of one layer whose weights are float32 (what pnnx writes with fp16=0),
# on an input in float32:
#
#                     options as they are              use_fp16_storage = False
#   InnerProduct      5e-4 of the largest result off   below 1e-6
#   Convolution 1x1   below 1e-6                       below 1e-6
#
# So fp16=0 at conversion alone does not give single precision: a whole network is off by what its
# classifier is, and since the convolutions are exact, comparing layers from the front finds nothing.
# use_fp16_packed and use_fp16_arithmetic change nothing here. The option is the program's that runs
# the file, and has to be set before load_param.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ncnn==1.0.20261020 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'P'
import ncnn
import numpy as np

rng = np.random.default_rng(0)
weights = rng.normal(size=(32, 256)).astype(np.float32)
layers = {
    "InnerProduct": (f"0=32 2={weights.size}", rng.normal(size=256)),
    "Convolution": (f"0=32 1=1 6={weights.size}", rng.normal(size=(256, 9, 9))),
}
found = {}
for name, (parameters, image) in layers.items():
    image = image.astype(np.float32)
    wanted = np.tensordot(weights.astype(np.float64), image.astype(np.float64), 1)
    with open("net.param", "w") as file:
        file.write(f"7767517\n2 2\nInput in0 0 1 in0\n{name} it 1 1 in0 out0 {parameters}\n")
    with open("net.bin", "wb") as file:
        file.write(b"\0\0\0\0" + weights.tobytes())  # the tag of float32
    for half in (True, False):
        net = ncnn.Net()
        net.opt.use_fp16_storage = half
        assert net.load_param("net.param") == net.load_model("net.bin") == 0
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image).clone())
        result = np.array(extractor.extract("out0")[1])
        off = np.abs(result - wanted).max() / np.abs(wanted).max()
        print(f"{name}, use_fp16_storage {half}: {off:.1e} of the largest off")
        found[name, half] = off
assert ncnn.Net().opt.use_fp16_storage  # the default
assert found["InnerProduct", True] > 1e-4
assert all(off < 1e-6 for key, off in found.items() if key != ("InnerProduct", True))
P
