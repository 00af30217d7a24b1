#!/usr/bin/env bash
# timm leaves out the classifier of a file that fits the network exactly, without a word.
#
# timm 1.0.31, torch 2.11.0. A network of 5 classes is saved; then a network of 5 classes is made
# from that file in the ways that timm has for local weights:
#
#   checkpoint_path=FILE                                       every tensor loaded
#   pretrained=True, pretrained_cfg_overlay=OVERLAY, which is
#     {"file": FILE}                                           classifier left as initialised
#     {"file": FILE, "num_classes": 5}                         every tensor loaded
#
# In the second, timm compares the classes asked for with those of the published weights (1000), not
# with the file: it takes the classifier for one of another task, deletes it from what was read, and
# loads the rest with strict=False. No warning is raised, and none is logged. The features are
# right, so that training goes on well, and evaluation is at chance.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    timm==1.0.31 torch==2.11.0 torchvision==0.26.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'P'
import io
import logging
import warnings

import torch
import timm

log = io.StringIO()
logging.basicConfig(stream=log, level=logging.WARNING)
trained = timm.create_model("densenet121", num_classes=5)
torch.nn.init.normal_(trained.classifier.bias)  # zero at first in every network
torch.save(trained.state_dict(), "mine.pth")
ways = {
    "checkpoint_path": {"checkpoint_path": "mine.pth"},
    "overlay of file": {"pretrained": True, "pretrained_cfg_overlay": {"file": "mine.pth"}},
    "overlay of file and num_classes": {
        "pretrained": True, "pretrained_cfg_overlay": {"file": "mine.pth", "num_classes": 5},
    },
}
found = {}
with warnings.catch_warnings(record=True) as told:
    for name, how in ways.items():
        loaded = timm.create_model("densenet121", num_classes=5, **how).state_dict()
        differ = [k for k, v in trained.state_dict().items() if not torch.equal(v, loaded[k])]
        print(f"{name:31} not loaded: {differ}")
        found[name] = differ
assert found["overlay of file"] == ["classifier.weight", "classifier.bias"]
assert not found["checkpoint_path"] and not found["overlay of file and num_classes"]
assert not told and not log.getvalue()
P
