"""List the programs that run networks, and how a file for each is made and run.

Each function of the table imports its library; `tools/export/deploy.py` calls them.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.inference import onnx_io

if TYPE_CHECKING:
    from torch import Tensor

    from tools.export.proof import Logits
    from tools.export.quantise import Calibration

# What ncnn does in half precision unless told not to, also where the file is in single precision.
NCNN_HALF = ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "bf16_packed")


@dataclass(frozen=True)
class Job:
    """Hold what a converter is given."""

    module: Any  # a deploy.Deployed, in evaluation, on the CPU, in single precision
    example: "Tensor"  # one image, as the module takes it
    half: bool
    metadata: dict[str, str]  # `settings`, and `data` with classes, mean and deviation, as JSON
    calibration: "Calibration | None"  # quantises what ONNX and OpenVINO files hold


@dataclass(frozen=True)
class Runtime:
    """Say how files for one program are made and run."""

    title: str
    suffixes: tuple[str, ...]  # of its files; --output names the first
    packages: tuple[str, ...]  # that convert and run; the module of each has its name
    write: Callable[[Job, Path], None]  # the files, beside the first
    open: Callable[[Path], "Logits | None"]  # of images as its users have them; None: not here
    layout: str = "NHWC"  # of pixels that the file normalises: uint8; or "NCHW", float32
    batch: str = "1"  # images at a time; or "N"

    def files(self, output: Path) -> list[Path]:
        """Name the files, that of --output first."""
        stem = output.name.removesuffix(self.suffixes[0])
        return [output.with_name(stem + suffix) for suffix in self.suffixes]


def _to_onnx(job: Job, path: Path) -> None:
    module, fold = job.module.in_half(job.half), bool(job.calibration)
    content = onnx_io.as_onnx(module, job.example, job.metadata, "network.", fold)
    path.write_bytes(job.calibration.to_onnx(content) if job.calibration else content)


def _run_onnx(path: Path) -> "Logits":
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images.numpy()})[0]


def _to_openvino(job: Job, path: Path) -> None:
    import openvino

    fold = bool(job.calibration)
    content = onnx_io.as_onnx(job.module, job.example, job.metadata, fold=fold)
    read = job.calibration.to_openvino if job.calibration else openvino.Core().read_model
    model = read(content)
    model.set_rt_info(job.metadata["data"], "data")
    openvino.save_model(model, path, compress_to_fp16=job.half)


def _run_openvino(path: Path) -> "Logits":
    import openvino

    # By default it computes in bf16 where the CPU can.
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", precise)
    return lambda images: model({"images": images.numpy()})["logits"]


def _to_litert(job: Job, path: Path) -> None:
    import litert_torch

    litert_torch.convert(job.module, sample_kwargs={"images": job.example}).export(str(path))
    if job.half:
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import TFLOperationName
        from ai_edge_quantizer.quantizer import Quantizer

        casting, every = Quantizer(str(path)), TFLOperationName.ALL_SUPPORTED
        casting.add_weight_only_config(".*", every, 16, algorithm_key=AlgorithmName.FLOAT_CASTING)
        path.write_bytes(casting.quantize().quantized_model)


def _run_litert(path: Path) -> "Logits":
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(path), num_threads=os.cpu_count()).get_signature_runner()
    return lambda images: next(iter(run(images=images.numpy()).values()))


def _to_ncnn(job: Job, path: Path) -> None:
    import pnnx

    with tempfile.TemporaryDirectory() as directory:  # for seven files more
        traced = Path(directory, "network.pt")
        pnnx.export(job.module, str(traced), inputs=job.example, fp16=job.half)
        for suffix in (".param", ".bin"):
            made = traced.with_suffix(f".ncnn{suffix}")
            path.with_suffix(suffix).write_bytes(made.read_bytes())


def _run_ncnn(path: Path) -> "Logits":
    import ncnn

    peer = ncnn.Net()
    for name in NCNN_HALF:
        setattr(peer.opt, f"use_{name}", False)
    if peer.load_param(str(path)) or peer.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("it is damaged, or has an operation that ncnn lacks")

    def logits(images: "Tensor") -> Any:
        image = images[0].numpy()
        if image.dtype == "uint8":
            types, (height, width, channels) = ncnn.Mat.PixelType, image.shape
            kind = types.PIXEL_RGB if channels == 3 else types.PIXEL_GRAY
            mat = ncnn.Mat.from_pixels(image, kind, width, height)
        else:
            mat = ncnn.Mat(image).clone()
        extractor = peer.create_extractor()
        extractor.input("in0", mat)
        return [extractor.extract("out0")[1].numpy()]

    return logits


def _to_executorch(job: Job, path: Path) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(job.module.in_half(job.half), (job.example,))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)


def _run_executorch(path: Path) -> "Logits":
    from executorch.runtime import Runtime as ExecuTorch

    method = ExecuTorch.get().load_program(path).load_method("forward")
    return lambda images: method.execute([images])[0].numpy()


def _to_coreml(job: Job, path: Path) -> None:
    import coremltools
    import torch

    shape, precision = tuple(job.example.shape), coremltools.precision
    images = coremltools.TensorType("images", shape)
    if job.module.layout:
        colours = coremltools.colorlayout
        colours = colours.RGB if shape[1] == 3 else colours.GRAYSCALE
        images = coremltools.ImageType("images", shape, color_layout=colours)
    model = coremltools.convert(
        torch.jit.trace(job.module, job.example),  # noqa: TID251 - no file is read or written
        inputs=[images],
        outputs=[coremltools.TensorType("logits")],
        compute_precision=precision.FLOAT16 if job.half else precision.FLOAT32,
        minimum_deployment_target=coremltools.target.iOS15,
    )
    model.user_defined_metadata["data"] = job.metadata["data"]
    model.save(str(path))


_ONNX = ("onnx", "onnxscript")
RUNNERS = ("onnxruntime", "ncnn==1.0.20261020")  # of the packages those that convert nothing
RUNTIMES = {
    "onnx": Runtime("ONNX Runtime", (".onnx",), (*_ONNX, "onnxruntime"), _to_onnx, _run_onnx,
                    batch="N"),
    "openvino": Runtime("OpenVINO", (".xml", ".bin"), (*_ONNX, "openvino==2026.4.1"),
                        _to_openvino, _run_openvino, batch="N"),
    # Tested with PyTorch 2.14.1, newer than the project's, which needs a torchvision of its own.
    "litert": Runtime("LiteRT", (".tflite",), ("litert-torch==0.10.0", "torchvision==0.29.1"),
                      _to_litert, _run_litert),
    # OpenVINO has a NAME.bin as well.
    "ncnn": Runtime("ncnn", (".ncnn.param", ".ncnn.bin"), ("pnnx==20261020", "ncnn==1.0.20261020"),
                    _to_ncnn, _run_ncnn, "NCHW"),
    "executorch": Runtime("ExecuTorch", (".pte",), ("executorch==1.5.1", "torchvision==0.29.1"),
                          _to_executorch, _run_executorch),
    "coreml": Runtime("Core ML", (".mlpackage",), ("coremltools==9.0",), _to_coreml,
                      lambda path: None, "NCHW"),  # it runs on Apple's systems only
}  # fmt: skip
