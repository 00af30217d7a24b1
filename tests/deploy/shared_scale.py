"""Quantise a DenseNet to 8 bits, and count what one scale for a whole dense block costs.

usage: python -m tests.deploy.shared_scale RUN --data DIR --with onnx|openvino|xnnpack|litert
           [--factors 1,4,16,64] [main.py's flags]

What the first layer of each dense block computes is multiplied by a factor, and the statistics of
the norms that read it are too: single precision stays the same. onnx and openvino are quantised by
tools.export, the others on the same images; PyTorch computes what ExecuTorch's quantiser makes.
Printed are errors in single precision and in 8 bits; noise, the root mean square difference of
logits over their standard deviation; and scales of the parts of block 1's last concatenation.
"""

import argparse
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.dense_block import DenseBlock
from tools.export.__main__ import ON_CPU
from tools.export.deploy import Deployed
from tools.export.quantise import CALIBRATED, TESTED, Calibration
from tools.export.runtimes import RUNTIMES, Job
from tools.inference import data
from tools.inference.network import load


def rescale(module: Deployed, factor: int) -> None:
    """Multiply what the first layer of each block adds, and let the norms that read it undo it."""
    for block, after in pairwise(getattr(module.network, "features", ())):
        if isinstance(block, DenseBlock):
            first, *others = block.values()
            first.convs[-1].weight.data *= factor
            added = slice(block.layer_offset(0), block.layer_offset(1))
            for norm in (*(layer.norms[0] for layer in others), getattr(after, "norm", after)):
                norm.running_mean[added] *= factor
                norm.running_var[added] *= factor**2


def exported(to: str, module: Deployed, batches: list[Tensor], path: Path) -> Iterator[tuple]:
    """Yield names, functions from images to logits, and scales of parts, as tools.export makes."""
    for kind in ("channel", "tensor"):
        calibration = Calibration([images.numpy() for images in batches], kind == "channel")
        job = Job(module, batches[0][:1], False, {"data": "{}"}, calibration)
        RUNTIMES[to].write(job, path)
        yield f"{to} {kind}", RUNTIMES[to].open(path), scales_of(path) if to == "onnx" else []


def scales_of(path: Path) -> list[list[float]]:
    """Return the scales of the parts of each concatenation in an ONNX file."""
    import onnx

    graph = onnx.load(path).graph
    values = {each.name: onnx.numpy_helper.to_array(each).tolist() for each in graph.initializer}
    made = {n.output[0]: values[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear"}
    return [[made.get(part) for part in n.input] for n in graph.node if n.op_type == "Concat"]


def xnnpack(_: str, module: Deployed, batches: list[Tensor], path: Path) -> Iterator[tuple]:
    """Quantise for ExecuTorch, with and without the rule that lets parts share a scale."""
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as peer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    sizes = ({0: torch.export.Dim("batch")},)
    for name, rule in (("xnnpack", ""), ("xnnpack without its rule for cat", "cat")):
        quantizer = peer.XNNPACKQuantizer().set_global(peer.get_symmetric_quantization_config(True))
        quantizer.SUPPORTED_PATTERNS = [p for p in quantizer.SUPPORTED_PATTERNS if p.name != rule]
        program = torch.export.export(module, (batches[0],), dynamic_shapes=sizes)
        prepared = prepare_pt2e(program.module(), quantizer)
        for images in batches:
            prepared(images)
        made = convert_pt2e(prepared)
        cats = [node.args[0] for node in made.graph.nodes if "aten.cat" in str(node.target)]
        yield name, made, [[part.args[1] for part in cat] for cat in cats]


def litert(to: str, module: Deployed, batches: list[Tensor], path: Path) -> Iterator[tuple]:
    """Quantise for LiteRT with scales of weights per channel; images and logits stay float32."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping, quantizer, recipe

    images = torch.cat(batches).split(1)
    RUNTIMES[to].write(Job(module, images[0], False, {}, None), path)
    theirs = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    for end in map(qtyping.TFLOperationName, ("INPUT", "OUTPUT")):
        theirs.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    found = theirs.calibrate({"serving_default": [{"images": each.numpy()} for each in images]})
    path.write_bytes(theirs.quantize(found).quantized_model)
    made, run = Interpreter(str(path)), RUNTIMES[to].open(path)
    scales = {each["index"]: each["quantization"][0] for each in made.get_tensor_details()}
    cats = [op["inputs"] for op in made._get_ops_details() if op["op_name"] == "CONCATENATION"]
    cats = [[scales[part] for part in cat] for cat in cats]
    yield to, lambda images: np.concatenate([run(each) for each in images.split(1)]), cats


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path)
    quantisers = {"onnx": exported, "openvino": exported, "xnnpack": xnnpack, "litert": litert}
    parser.add_argument("--with", dest="to", choices=quantisers, required=True)
    parser.add_argument("--factors", default="1,4,16,64")
    options, flags = parser.parse_known_args()
    net = load(options.run, [*flags, *(f"--{name}={value}" for name, value in ON_CPU.items())])
    batches = [*map(Tensor.contiguous, data.calibration_batches(net, CALIBRATED))]
    tested = (splits := data.open_data(net)).test or splits.val
    images, numbers = zip(*data.sample(net, tested, TESTED), strict=True)
    labels = data.labels(tested)[torch.cat(numbers)].numpy()
    parts = 1 + next((len(m) for m in net.model.modules() if isinstance(m, DenseBlock)), 0)
    for factor in map(int, options.factors.split(",")):
        module = Deployed(net, "")
        rescale(module, factor)
        with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "network.xml")  # OpenVINO insists on the suffix
            before = np.concatenate([module(each) for each in images])
            for name, logits, cats in quantisers[options.to](options.to, module, batches, path):
                after = np.concatenate([logits(each.contiguous()) for each in images])
                tops = before.argmax(1), after.argmax(1)
                errors = [f"error {100 * (top != labels).mean():.2f} %" for top in tops]
                same = f"{100 * (tops[0] == tops[1]).mean():.1f} % alike"
                noise = f"noise {np.square(after - before).mean() ** 0.5 / before.std():.3f}"
                scales = [f"{s:.3f}" for s in next((cat for cat in cats if len(cat) == parts), ())]
                print(f"factor {factor}", name, *errors, same, noise, *scales, sep=", ", flush=True)


if __name__ == "__main__":
    main()
