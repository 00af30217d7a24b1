"""Every kernel compiles for Ampere and Hopper as it is launched, without spilling registers."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import tiling
from kernels.dropout import DropoutSpec
from kernels.feature_maps import FeatureMaps, NormParams

triton = pytest.importorskip("triton", reason="Triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the kernels of this process are interpreted", allow_module_level=True)
from kernels import triton_ops  # noqa: E402

ARCHITECTURES = (80, 90)
SHARED_BYTES = 99 * 1024  # that one program may have: 8.0 and 9.0 have more, 8.6 and 8.9 have not
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Widths:
    """A dense layer of one of the paper's networks, early or late in its block.

    Args:
        channels: that the layer reads.
        total: channels of the buffer.
    """

    growth_rate: int
    channels: int
    total: int
    bottleneck: bool = True
    drop_rate: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False


LAYERS = {
    "BC-100-12, bf16": Widths(12, 36, 216),
    "BC-100-12, bf16, dropout": Widths(12, 300, 342, drop_rate=0.2),
    "BC-100-12, half": Widths(12, 36, 216, dtype=torch.float16),
    "BC-100-12, single": Widths(12, 36, 216, dtype=torch.float32),
    "BC-100-12, tf32": Widths(12, 36, 216, dtype=torch.float32, tf32=True),
    "BC-250-24, half": Widths(24, 528, 1080, dtype=torch.float16),
    "ImageNet, k = 32, bf16": Widths(32, 96, 256),
    "ImageNet, k = 32, single": Widths(32, 96, 256, dtype=torch.float32),
    "BC-190-40, bf16": Widths(40, 600, 1320),
    "wide, k = 60, single": Widths(60, 480, 1080, dtype=torch.float32),
    "wide, k = 48, half": Widths(48, 960, 1392, dtype=torch.float16),
    "basic, k = 12, bf16": Widths(12, 40, 160, bottleneck=False),
    "basic, k = 24, single, dropout": Widths(
        24, 400, 784, bottleneck=False, drop_rate=0.2, dtype=torch.float32
    ),
}
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


# -------------------------------------------------------------------------------------- launches


@dataclass(frozen=True)
class Launch:
    """A kernel as triton_ops launches it: types of its parameters, constants, threads, stages."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int

    def compiled(self, architecture: int, registers: int | None = None, **changed: object):
        options = {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": registers}
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants) | changed,
        )
        return triton.compile(
            source,
            target=triton.backends.compiler.GPUTarget("cuda", architecture, 32),
            options=options,
        )


@pytest.fixture
def launches(monkeypatch, tmp_path_factory):
    """A function: the launches of a layer, each once."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
    found: set[Launch] = set()
    monkeypatch.setattr(
        triton_ops, "_launch", lambda *given, **named: found.add(taken(*given, **named))
    )

    def of(layer: Widths) -> list[Launch]:
        torch.backends.cuda.matmul.allow_tf32 = layer.tf32
        found.clear()
        run(layer)
        return sorted(found, key=lambda launch: (launch.kernel.__name__, str(launch.constants)))

    before = torch.backends.cuda.matmul.allow_tf32
    yield of
    torch.backends.cuda.matmul.allow_tf32 = before


def taken(kernel, grid: tuple[int, ...], tile: tiling.Tile, **arguments: object) -> Launch:
    """What Triton would compile for a launch; no kernel is specialised on values."""
    arguments |= tile.sizes
    assert arguments.keys() == set(kernel.arg_names), kernel.__name__
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        assert parameter.do_not_specialize and parameter.do_not_specialize_on_alignment
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
    items = tuple(signature.items()), tuple(constants.items())
    return Launch(kernel, *items, tile.warps, tile.stages)


def run(layer: Widths) -> None:
    """Every operation of a training step on one layer and the tail of its block."""
    k, buffer = layer.growth_rate, empty_maps(layer.total, layer.dtype)
    source, new = (
        buffer.channels(0, layer.channels),
        buffer.channels(layer.channels, layer.channels + k),
    )
    dropout = None
    if layer.drop_rate:
        dropout = DropoutSpec(layer.drop_rate, torch.empty(1, dtype=torch.int32, device="meta"), 3)
    triton_ops.copy_with_stats(source.value.float(), source)
    if layer.bottleneck:
        bottleneck, weight = empty_maps(4 * k, layer.dtype), empty_weight(4 * k, layer.channels, 1)
        triton_ops.conv1x1(source, empty_norm(layer.channels), weight, bottleneck, dropout)
        train_convolution(bottleneck, new, dropout, overwrite=True)
        triton_ops.conv1x1_backward(
            bottleneck, source, empty_norm(layer.channels), weight, dropout, False
        )
    else:
        train_convolution(source, new, dropout, overwrite=False)
    whole = empty_norm(layer.total)
    if dropout:  # sits between a convolution and the pooling
        weight = empty_weight(layer.total // 2, layer.total, 1)
        out = FeatureMaps(buffer.value.new_empty((*buffer.value.shape[:3], len(weight))))
        triton_ops.conv1x1(buffer, whole, weight, out, None)
        out.grad = out.value
        triton_ops.conv1x1_backward(out, buffer, whole, weight, None, True)
    else:
        triton_ops.norm_relu_avg_pool_backward(
            triton_ops.norm_relu_avg_pool(buffer, whole, (2, 2)), buffer, whole, (2, 2)
        )
    triton_ops.complete_gradient(source)


def train_convolution(
    source: FeatureMaps, target: FeatureMaps, dropout: DropoutSpec | None, overwrite: bool
) -> None:
    channels, features = source.value.shape[3], target.value.shape[3]
    weight, norm = empty_weight(features, channels, 3), empty_norm(channels)
    triton_ops.conv3x3(source, norm, weight, target, dropout)
    triton_ops.conv3x3_backward(target, source, norm, weight, dropout, overwrite)


def empty_maps(channels: int, dtype: torch.dtype) -> FeatureMaps:
    value = torch.empty(64, 32, 32, channels, dtype=dtype, device="meta")
    mean, rstd, var, mean_correction, var_correction = torch.empty(5, channels, device="meta")
    return FeatureMaps(
        value, mean, rstd, var, torch.empty_like(value), mean_correction, var_correction
    )


def empty_norm(channels: int) -> NormParams:
    return NormParams(*torch.empty(2, channels, device="meta"))


def empty_weight(features: int, channels: int, side: int) -> Tensor:
    weight = torch.empty(features, channels, side, side, device="meta")
    return weight.to(memory_format=torch.channels_last)


def stack_bytes(compiled, path: Path) -> int:
    """Bytes of a thread's stack and local memory: where registers that spill go."""
    path.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "-res-usage", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    assert int(usage["REG"]) > 0
    return int(usage["STACK"]) + int(usage["LOCAL"])


# ----------------------------------------------------------------------------------------- tests


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("layer", LAYERS)
def test_every_kernel_of_a_layer_fits_the_gpu(launches, tmp_path, layer, architecture):
    found = launches(LAYERS[layer])
    for launch in found:
        compiled = launch.compiled(architecture)
        assert stack_bytes(compiled, tmp_path / "kernel") == 0, launch
        assert compiled.metadata.shared <= SHARED_BYTES, launch
        multiplies = "PRECISION" in dict(launch.constants)
        assert multiplies == bool(re.search(r"mma(\.sync|_async)", compiled.asm["ptx"])), launch
    used = {launch.kernel.__name__ for launch in found}
    assert used >= {
        "copy_with_stats",
        "conv3x3",
        "reduce_stats",
        "conv3x3_backward",
        "reduce_partials",
    }


@EVERY_ARCHITECTURE
def test_a_kernel_that_spills_or_has_too_much_shared_memory_is_found(
    launches, tmp_path, architecture
):
    product = next(
        launch
        for launch in launches(LAYERS["BC-190-40, bf16"])
        if launch.kernel.__name__ == "conv1x1"
    )
    squeezed = product.compiled(architecture, registers=96)
    assert stack_bytes(squeezed, tmp_path / "kernel") > 0
    large = product.compiled(architecture, CHANNELS=512)
    assert large.metadata.shared > SHARED_BYTES


def test_maps_are_loaded_many_channels_at_a_time(launches):
    # 36 of 216 channels of 2 bytes: 8 bytes for a thread at once, and never one channel.
    product = next(
        launch
        for launch in launches(LAYERS["BC-100-12, bf16"])
        if launch.kernel.__name__ == "conv1x1"
    )
    single = re.compile(r"ld\.global(\.\w+)*\.b16")
    assert dict(product.constants)["VECTOR"] == 4
    assert not single.search(product.compiled(90).asm["ptx"])
    assert single.search(product.compiled(90, VECTOR=1).asm["ptx"])


def test_layers_of_a_block_share_their_kernels(launches):
    # Else Triton would compile for minutes: a block has dozens of widths.
    found = [set(launches(Widths(12, channels, 216))) for channels in range(24, 204, 12)]
    assert len(set.union(*found)) <= 2 * len(found[0])
    assert len(set.union(*found)) > len(found[0])  # widths that are multiples of 8, and others
