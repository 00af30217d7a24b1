#!/usr/bin/env bash
# captum and pytorch-grad-cam compute two maps of one layer, torchvision's features.norm5, and
# neither is the class activation map.
#
# captum 0.9.0, grad-cam 1.5.7, torchvision 0.26.0, torch 2.11.0. A torchvision DenseNet ends in
#
#   F.relu(features, inplace=True), a mean over pixels, a linear classifier
#
# so that the class activation map is the product of its weights and the features after the ReLU.
# At features.norm5, the last module before it:
#
#   captum            copies the output of norm5 when its hook is called: features before the ReLU
#   pytorch-grad-cam  keeps the tensor without a copy (on a CPU .cpu().detach() makes none), which
#                     the ReLU then overwrites: features after the ReLU
#
# Both weigh channels by the mean gradient before the ReLU, in which the share of positive features
# is a factor. No warning is raised. Where the last ReLU is a module that does not write in place,
# both agree at norm5, and at the ReLU they are the class activation map (up to a factor).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    captum==0.9.0 grad-cam==1.5.7 torch==2.11.0 torchvision==0.26.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'P'
import warnings

import torch
from captum.attr import LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models import DenseNet

torch.manual_seed(0)
images, label = torch.randn(4, 3, 96, 96), 1


class NotInPlace(DenseNet):
    """The same function, with its last ReLU a module."""

    def forward(self, images):
        return self.classifier(self.relu5(self.features(images)).mean((2, 3)))


def captum_map(model, layer):
    return LayerGradCam(model, layer).attribute(images, target=label)[:, 0].detach()


def grad_cam_map(model, layer):
    targets = [ClassifierOutputTarget(label)] * len(images)
    with GradCAM(model=model, target_layers=[layer]) as cam:
        cam(images.clone(), targets)
        kept = cam.activations_and_grads
        both = kept.activations[0].numpy(), kept.gradients[0].numpy()
        return torch.from_numpy(cam.get_cam_image(images, layer, targets, *both))


def difference(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


model = DenseNet(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=3)
for module in model.modules():
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.bias, std=0.5)
with torch.no_grad():
    model.train()(images)  # statistics that fit
model.eval()
other = NotInPlace(growth_rate=8, block_config=(2, 2, 2), num_init_features=16, num_classes=3)
other.load_state_dict(model.state_dict())
other.relu5 = nn.ReLU()
other.eval()
with torch.no_grad():
    features = model.features(images).relu()
    assert torch.allclose(model(images), other(images), atol=1e-6)
paper = torch.einsum("nkyx,k->nyx", features, model.classifier.weight[label].detach())
paper = paper / features[0, 0].numel()  # both weigh channels by a mean, not a sum
with warnings.catch_warnings():
    warnings.simplefilter("error")
    found = {
        (name, layer): (captum_map(net, module), grad_cam_map(net, module))
        for name, layer, net, module in (
            ("in place", "norm5", model, model.features.norm5),
            ("module", "norm5", other, other.features.norm5),
            ("module", "relu5", other, other.relu5),
        )
    }
for (name, layer), (captum, grad_cam) in found.items():
    print(f"ReLU {name:8} {layer}: captum from the paper's map {difference(captum, paper):.1e}, "
          f"grad-cam {difference(grad_cam, paper):.1e}, from captum {difference(grad_cam, captum):.1e}")
assert difference(*found["in place", "norm5"]) > 0.1
for captum, grad_cam in (found["in place", "norm5"], found["module", "norm5"]):
    assert min(difference(captum, paper), difference(grad_cam, paper)) > 0.1
assert difference(*found["module", "norm5"]) < 1e-5
assert max(difference(each, paper) for each in found["module", "relu5"]) < 1e-5
P
