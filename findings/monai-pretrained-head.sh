#!/usr/bin/env bash
# MONAI's pretrained DenseNet classifies at random, even with the 1000 classes that it was trained for.
#
# monai 1.6.1, torch 2.11.0. DenseNet121(2, 3, 1000, pretrained=True) fetches torchvision's published
# file, renames the dense layers, and loads what agrees in name and shape. The classifier agrees in
# shape, but MONAI's has another name (class_layers.out), which the renaming leaves out; so it stays
# as initialised. Nothing says so. With one channel, as for X-rays, the first convolution stays
# as initialised too: it is neither summed over the colours nor missed.
#
#   channels, classes    not loaded, of the file's 606 tensors
#   3, 1000              classifier.weight, classifier.bias
#   1, 1000              these, and features.conv0.weight
#
# No download here: a file with random values in the published file's names (norm.1, not norm1) lies
# where PyTorch keeps downloads.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    monai==1.6.1 torch==2.11.0 torchvision==0.26.0 numpy==2.4.6
TORCH_HOME="$work" "$work/venv/bin/python" - <<'P'
import io
import logging
import os
import re
import warnings
from pathlib import Path

import torch
import torchvision
from monai.networks.nets import DenseNet121

log = io.StringIO()
logging.basicConfig(stream=log, level=logging.WARNING)
theirs = torchvision.models.densenet121().state_dict()
theirs = {name: torch.rand_like(value) for name, value in theirs.items() if value.ndim}
published = {re.sub(r"(denselayer\d+\.(norm|conv))", r"\1.", name): value
             for name, value in theirs.items()}
folder = Path(os.environ["TORCH_HOME"], "hub", "checkpoints")
folder.mkdir(parents=True)
torch.save(published, folder / "densenet121-a639ec97.pth")
for channels, wanted in ((3, []), (1, ["features.conv0.weight"])):
    with warnings.catch_warnings(record=True) as told:
        network = DenseNet121(2, channels, 1000, pretrained=True, progress=False)
    ours = {re.sub(r"\.layers\.", ".", name).replace("class_layers.out", "classifier"): value
            for name, value in network.state_dict().items()}
    missed = [name for name, value in theirs.items() if not torch.equal(value, ours[name])]
    print(f"{channels} channels, 1000 classes; not loaded, of {len(theirs)} tensors: {missed}")
    assert missed == [*wanted, "classifier.weight", "classifier.bias"]
    assert not told and not log.getvalue()
P
