"""Quantise networks to 8 bits for ONNX Runtime and OpenVINO, and count what that costs.

Activations have a scale for each tensor, from the least and the largest value on the calibration
images; weights one for each output channel or each tensor. In single precision remain batch
normalisation that follows no convolution, and concatenation (measured in docs/deploy.md).
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from errors import RunError
from experiment import console
from tools.export.proof import Logits
from tools.inference import data
from tools.inference.network import LoadedModel

if TYPE_CHECKING:
    import openvino

CALIBRATED, TESTED = 300, 2000  # training images, and test images at most
OPERATIONS = ["Conv", "Gemm", "Relu", "Add", "AveragePool", "MaxPool", "ReduceMean", "Pad", "Slice"]


class Calibration(NamedTuple):
    """Hold what quantises an ONNX file in single precision."""

    batches: Sequence[np.ndarray]  # training images as the file takes them
    per_channel: bool  # scales of weights

    def to_onnx(self, content: bytes) -> bytes:
        """Return the file in 8 bits.

        All is unsigned: with signed activations ONNX Runtime 1.31.1 is slower, with signed weights
        alone sums overflow on CPUs without VNNI.
        """
        import onnx
        from onnxruntime.quantization import QuantType, quantize_static

        model = onnx.load_from_string(content)
        batches = ({"images": images} for images in self.batches)
        # The mark of its own pre-processing, without which it warns.
        model.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        with tempfile.TemporaryDirectory() as directory:
            quantize_static(
                model,
                path := Path(directory, "quantised.onnx"),
                SimpleNamespace(get_next=lambda: next(batches, None)),
                op_types_to_quantize=OPERATIONS,
                per_channel=self.per_channel,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QUInt8,
                extra_options={"WeightSymmetric": True},  # a zero point of 128
            )
            return path.read_bytes()

    def to_openvino(self, content: bytes) -> "openvino.Model":
        """Return OpenVINO's network in 8 bits."""
        import nncf
        import openvino
        from nncf.quantization.advanced_parameters import QuantizationParameters
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        parameters = nncf.AdvancedQuantizationParameters(
            # By default the largest value is the mean of each batch's largest.
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            weights_quantization_params=QuantizationParameters(per_channel=self.per_channel),
        )
        model, images = openvino.Core().read_model(content), nncf.Dataset(self.batches)
        options = {"subset_size": len(self.batches), "advanced_parameters": parameters}
        return nncf.quantize(model, images, **options)


def check(
    net: LoadedModel, given: Callable[[Tensor], Tensor], ours: Logits, theirs: Logits
) -> None:
    """Print the errors of test images in single precision and in 8 bits.

    Args:
        given: turns normalised images into what the file takes.
        ours, theirs: compute logits from that, in single precision and in 8 bits.

    Raises:
        RunError: logits are not finite, or decisions are nearer to chance than to ours.
    """
    splits, same, count, errors = data.open_data(net), 0, 0, torch.zeros(2)
    labels = data.labels(split := splits.test or splits.val)
    for images, numbers in data.sample(net, split, TESTED):
        with torch.no_grad():
            wanted, found = ours(given(images)), theirs(given(images))
        if found.shape != wanted.shape or not found.isfinite().all():
            raise RunError("logits in 8 bits are not finite", "leave out --int8")
        top = torch.stack([wanted.argmax(1), found.argmax(1)])
        errors += (top != labels[numbers]).sum(1)
        same, count = same + int((top[0] == top[1]).sum()), count + len(numbers)
    before, after = (f"{percent:.2f} %" for percent in (100 * errors / count).tolist())
    told = f"top-1 error of {count:,} images: {before} in single precision, {after} in 8 bits"
    console.info(f"{told}; {100 * same / count:.1f} % are decided alike")
    if 2 * same < count * (1 + 1 / len(net.classes)):  # half-way from chance
        what = f"8 bits decide {count - same:,} of {count:,} images in another way"
        raise RunError(what, "nothing was written; use --half true, or other training images")
