#!/usr/bin/env bash
# ExecuTorch reads the memory of a tensor in the order of the example at export, whatever its strides.
#
# executorch 1.5.1, torch 2.14.1, CPU. One ReLU is exported twice, with examples that differ only in
# the order of their memory: torch.zeros(1, 3, 8, 8), and the same in channels_last. torch.export
# itself does not care: either ExportedProgram takes either tensor. The .pte does:
#
#   example         image           result of method.execute([image])
#   contiguous      contiguous      equal to PyTorch's
#   contiguous      channels_last   other numbers, no error
#   channels_last   contiguous      other numbers, no error
#   channels_last   channels_last   equal
#
# So an image that a decoder has returned as a permuted view, equal to another by torch.equal, gives
# other results, and a model that was made channels-last for speed on a CPU gives a file that is wrong
# for ordinary tensors. Call .contiguous() on the example and on every input.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check executorch==1.5.1 torch==2.14.1
"$work/venv/bin/python" - "$work" <<'P'
import sys

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

image = torch.randn(1, 3, 8, 8)
orders = {
    "contiguous": image,
    "channels_last": image.contiguous(memory_format=torch.channels_last),
}
assert torch.equal(*orders.values())
for name, example in orders.items():
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros_like(example),))
    path = f"{sys.argv[1]}/{name}.pte"
    with open(path, "wb") as file:
        file.write(to_edge_transform_and_lower(program).to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    for other, given in orders.items():
        assert torch.equal(program.module()(given), image.relu())
        is_equal = torch.equal(method.execute([given])[0], image.relu())
        print(f"example {name}, image {other}: {'equal' if is_equal else 'other numbers'}")
        assert is_equal == (name == other)
P
