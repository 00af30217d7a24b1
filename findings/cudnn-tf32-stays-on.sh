#!/usr/bin/env bash
# Switching TF32 off for cuDNN by its documented flag leaves it on, and asking afterwards raises.
#
# torch 2.11.0; no GPU is needed to read the switches. PyTorch has two sets of them. Where a program
# has chosen TF32 for everything by the new one,
#
#   torch.backends.fp32_precision = "tf32"
#
# the old one that tutorials name for convolutions,
#
#   torch.backends.cudnn.allow_tf32 = False
#
# is accepted without a word. But cuDNN's convolutions stay at "tf32": the assignment makes them
# inherit from the switch above them, instead of saying "ieee". A library that wants float32
# convolutions does not get them, whichever order a user would expect. Reading the flag back, as a
# careful program does to restore it later, raises RuntimeError about cuDNN's convolutions and
# recurrent layers having different flags, which nobody has set apart. Writing "ieee" to
# torch.backends.cudnn.conv.fp32_precision works.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import torch
from torch.backends import cudnn

torch.backends.fp32_precision = "tf32"
cudnn.allow_tf32 = False
print("conv:", cudnn.conv.fp32_precision)
assert cudnn.conv.fp32_precision == "tf32"
try:
    print("allow_tf32:", cudnn.allow_tf32)
    raise SystemExit("reading the flag works now")
except RuntimeError as error:
    print("reading allow_tf32 raises:", str(error).partition(".")[0])
cudnn.conv.fp32_precision = "ieee"
assert cudnn.conv.fp32_precision == "ieee"
P
