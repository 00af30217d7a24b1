#!/usr/bin/env bash
# torchvision's ToTensor makes the bright half of a 16-bit grey image negative, without a word.
#
# torch 2.11.0, torchvision 0.26.0, Pillow 13.0.0. A grey PNG of 16 bits with the values 0, 32767,
# 32768 and 65535 (Pillow opens it as mode I;16) becomes, by three ways through the same package:
#
#   transforms.ToTensor()             int16   [0, 32767, -32768, -1]
#   functional.pil_to_tensor          uint16  [0, 32767, 32768, 65535]
#   v2.functional.to_image            uint16  [0, 32767, 32768, 65535]
#
# The classic transform reads the unsigned samples as signed, and neither scales to 0..1 nor makes
# float, as it does for images of 8 bits: white comes out as -1, just below black. After .float() a
# network trains on it. The newer ways keep the values; to_dtype(float32, scale=True) then gives 0..1.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.11.0 torchvision==0.26.0 pillow==13.0.0 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import io

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import ToTensor, functional, v2

values = [0, 32767, 32768, 65535]
file = io.BytesIO()
Image.fromarray(np.array([values], np.uint16)).save(file, "PNG")
image = Image.open(file)
assert image.mode == "I;16" and np.asarray(image).tolist() == [values]
ways = {
    "transforms.ToTensor()": ToTensor(),
    "functional.pil_to_tensor": functional.pil_to_tensor,
    "v2.functional.to_image": v2.functional.to_image,
}
found = {}
for name, way in ways.items():
    tensor = way(image)
    found[name] = tensor.dtype, tensor.flatten().tolist()
    print(f"{name:25} {str(tensor.dtype)[6:]:7} {found[name][1]}")
kept = torch.uint16, values
assert list(found.values()) == [(torch.int16, [0, 32767, -32768, -1]), kept, kept]
P
