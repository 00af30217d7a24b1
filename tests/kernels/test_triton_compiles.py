"""Test that every kernel compiles for each GPU as launched, without register spills."""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, Norm, Reader
from kernels.precision import allows_tf32, set_tf32
from kernels.tiling import Gpu

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the kernels of this process are interpreted", allow_module_level=True)
from kernels import triton_ops  # noqa: E402
from kernels.triton_launches import Variant, recorded  # noqa: E402

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHARED_BYTES = 99 * 1024  # of one program on 8.6 and 8.9; 8.0 and 9.0 allow more
GPUS = {
    80: Gpu((8, 0), 108),
    90: Gpu((9, 0), 132),
    100: Gpu((10, 0), 148),
    120: Gpu((12, 0), 170),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Layer:
    """Describe a dense layer of one of the paper's networks, early or late in its block.

    Args:
        channels: that the layer reads.
        total: channels of the buffer.
        side: height and width of the maps of 64 images.
    """

    growth_rate: int
    channels: int
    total: int
    dtype: torch.dtype = BF16
    bottleneck: bool = True
    drop_rate: float = 0.0
    tf32: bool = False
    side: int = 32


# Together they take every tile of kernels/tiling.py, in 16 and in 32 bits.
LAYERS = {
    "BC-100-12, bf16": Layer(12, 36, 216),
    "BC-100-12, bf16, last block": Layer(12, 246, 342, side=8),
    "BC-100-12, single": Layer(12, 36, 216, F32),
    "BC-250-24, half, dropout": Layer(24, 528, 1080, F16, drop_rate=0.2),
    "ImageNet, k = 32, single": Layer(32, 96, 256, F32),
    "ImageNet, k = 32, tf32": Layer(32, 96, 256, F32, tf32=True),
    "BC-190-40, bf16": Layer(40, 600, 1320),
    "wide, k = 60, single": Layer(60, 480, 1080, F32),
    "wide, k = 48, half": Layer(48, 960, 1392, F16),
    "basic, k = 12, bf16": Layer(12, 40, 160, bottleneck=False),
    "basic, k = 24, single, dropout": Layer(24, 400, 784, F32, bottleneck=False, drop_rate=0.2),
}


# Launches:
@pytest.fixture
def launches(monkeypatch, tmp_path_factory) -> Iterator[Callable[..., list[Variant]]]:
    """Return a function: what Triton compiles for a layer on a GPU, each once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))

    def launches_of(layer: Layer, architecture: int = 90) -> list[Variant]:
        set_tf32(layer.tf32)
        with recorded(GPUS[architecture]) as found:
            run(layer)
        variants = {launch.variant for launch in found}
        return sorted(variants, key=lambda each: (each.kernel.__name__, str(each.constants)))

    before = allows_tf32()
    yield launches_of
    set_tf32(before)


def run(layer: Layer) -> None:
    """Run every operation of a training step on one layer and the epilogue of its block."""
    k, buffer = layer.growth_rate, features(layer.total, layer)
    source = buffer.channels(0, layer.channels)
    new = buffer.channels(layer.channels, layer.channels + k)
    dropout = None
    if layer.drop_rate:
        dropout = DropoutSpec(layer.drop_rate, torch.empty(1, dtype=torch.int32, device="meta"), 3)
    triton_ops.copy_with_stats(source.value.float(), source, Reader(norm(layer.channels), source))
    after = Reader(norm(layer.channels + k), buffer.channels(0, layer.channels + k))
    if layer.bottleneck:
        bottleneck = features(4 * k, layer)
        inner = Reader(norm(4 * k), bottleneck)
        train_conv("conv1x1", source, bottleneck, dropout, inner, overwrite=False)
        train_conv("conv3x3", bottleneck, new, dropout, after, overwrite=True)
    else:
        train_conv("conv3x3", source, new, dropout, after, overwrite=False)
    if dropout:  # it sits between the transition's convolution and its pooling
        out = buffer.value.new_empty((*buffer.value.shape[:3], layer.total // 2))
        train_conv("conv1x1", buffer, FeatureMaps(out, grad=out), None, None, overwrite=True)
    else:
        pooled = triton_ops.norm_relu_avg_pool(buffer, norm(layer.total), (2, 2))
        triton_ops.norm_relu_avg_pool_backward(pooled, buffer, norm(layer.total), (2, 2))
    triton_ops.complete_gradient(source)


def train_conv(
    name: str, source: FeatureMaps, target: FeatureMaps, dropout: DropoutSpec | None,
    reader: Reader | None, overwrite: bool,
) -> None:  # fmt: skip
    channels, outputs, side = source.value.shape[3], target.value.shape[3], int(name[-1])
    weight = torch.empty(outputs, channels, side, side, device="meta")
    weight = weight.to(memory_format=torch.channels_last)
    given = norm(channels)
    getattr(triton_ops, name)(source, given, weight, target, dropout, reader)
    getattr(triton_ops, f"{name}_backward")(target, source, given, weight, dropout, overwrite)


def norm(channels: int) -> Norm:
    return Norm(*torch.empty(4, channels, device="meta"))


def features(channels: int, layer: Layer) -> FeatureMaps:
    side = layer.side
    value = torch.empty(64, side, side, channels, dtype=layer.dtype, device="meta")
    mean, rstd, var, mean_correction, var_correction = torch.empty(5, channels, device="meta")
    grad = torch.empty_like(value)
    return FeatureMaps(value, mean, rstd, var, grad, mean_correction, var_correction)


def spilled_bytes(compiled, path: Path) -> int:
    """Return the bytes of a thread's stack and local memory, where registers are spilled to."""
    path.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    assert int(usage["REG"]) > 0
    return int(usage["STACK"]) + int(usage["LOCAL"])


# Tests:
@pytest.mark.parametrize("architecture", GPUS)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kernel_of_a_layer_fits_the_gpu(launches, tmp_path, layer, architecture):
    found = launches(LAYERS[layer], architecture)
    for launch in found:
        compiled = launch.compiled(architecture)
        # Of wide layers conv3x3 spills two registers on 8.0, outside of its loop.
        spilled = 8 if (launch.kernel.__name__, architecture) == ("conv3x3", 80) else 0
        assert spilled_bytes(compiled, tmp_path / "kernel") <= spilled, launch
        assert compiled.metadata.shared <= SHARED_BYTES, launch
        multiplies = "PRECISION" in dict(launch.constants)
        assert multiplies == bool(
            re.search(r"mma(\.sync|_async)|tcgen05\.mma", compiled.asm["ptx"])
        ), launch
    used = {launch.kernel.__name__ for launch in found}
    assert used >= {"copy_with_stats", "conv3x3", "conv3x3_backward", "complete_gradient"}


def conv1x1_of(found: list[Variant]) -> Variant:
    return next(launch for launch in found if launch.kernel.__name__ == "conv1x1")


def test_a_kernel_that_spills_or_has_too_much_shared_memory_is_found(launches, tmp_path):
    conv1x1 = conv1x1_of(launches(LAYERS["BC-190-40, bf16"]))
    assert spilled_bytes(conv1x1.compiled(90, registers=96), tmp_path / "kernel") > 0
    assert conv1x1.compiled(90, CHANNELS=128).metadata.shared > SHARED_BYTES


def test_several_channels_are_loaded_at_a_time(launches):
    # 36 of 216 channels of 2 bytes: 8 bytes for a thread at once, and never one channel.
    conv1x1 = conv1x1_of(launches(LAYERS["BC-100-12, bf16"]))
    single = re.compile(r"ld\.global(\.\w+)*\.b16")
    assert dict(conv1x1.constants)["VECTOR"] == 4
    assert not single.search(conv1x1.compiled(90).asm["ptx"])
    assert single.search(conv1x1.compiled(90, VECTOR=1).asm["ptx"])


def test_layers_of_a_block_share_their_kernels(launches):
    # Else Triton would compile for minutes: a block has dozens of widths.
    found = [set(launches(Layer(12, channels, 216))) for channels in range(24, 204, 12)]
    assert len(set.union(*found)) <= 2 * len(found[0])
    assert len(set.union(*found)) > len(found[0])  # widths that are multiples of 8, and others
