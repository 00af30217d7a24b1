#!/usr/bin/env bash
# Two equal tensors, both channels-last by is_contiguous, give results in two memory formats.
#
# torch 2.11.0, CPU. An image (H, W, 3) becomes a batch of one in two ways that differ in nothing but
# the stride of the dimension of size 1, which no element is ever reached by:
#
#   image.permute(2, 0, 1)[None]     stride (3, 1, 600, 3)
#   image[None].permute(0, 3, 1, 2)  stride (180000, 1, 600, 3)
#
# Their values are equal, and is_contiguous(memory_format=torch.channels_last) is True for both. Yet
# F.interpolate and conv2d return channels-last memory for the second only; for the first they
# return (N, C, H, W) memory, which a channels-last network then carries on. Bicubic resizing of
# bytes to 224 pixels takes about 1.4 times as long for the first, since it converts there and back.
# Calling .contiguous(memory_format=torch.channels_last) does not help: it returns the tensor as it
# is. The first way is what unsqueeze(0) makes of an image that a decoder has returned as a permuted
# view.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.4.6
"$work/venv/bin/python" - <<'P'
import torch
import torch.nn.functional as F

image = torch.arange(300 * 200 * 3).remainder(251).to(torch.uint8).view(300, 200, 3)
ways = {
    "image.permute(2, 0, 1)[None]": image.permute(2, 0, 1)[None],
    "image[None].permute(0, 3, 1, 2)": image[None].permute(0, 3, 1, 2),
}
first, second = ways.values()
assert torch.equal(first, second) and first.shape == second.shape == (1, 3, 300, 200)
found = []
for name, batch in ways.items():
    assert batch.is_contiguous(memory_format=torch.channels_last)
    same = batch.contiguous(memory_format=torch.channels_last)
    assert same.stride() == batch.stride()
    resized = F.interpolate(batch, (100, 90), mode="bicubic", antialias=True)
    convolved = F.conv2d(batch.float(), torch.ones(8, 3, 3, 3))
    channels_first = [result.is_contiguous() for result in (resized, convolved)]
    print(f"{name:32} {batch.stride()}: interpolate {resized.stride()}, conv2d {convolved.stride()}")
    found.append(channels_first)
assert found == [[True, True], [False, False]]
P
