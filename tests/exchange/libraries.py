"""Build, load, save and run DenseNets by another library's own functions, in its environment.

usage: python libraries.py LIBRARY new NETWORK FILE [options]     weights and statistics at random
       python libraries.py LIBRARY copy NETWORK FILE COPY [options]
       python libraries.py LIBRARY logits NETWORK FILE IMAGES.npy LOGITS.npy [options]

options: --classes N (5), --channels N (3), --dropout P (0), --double, --calibrated (op_threshs)

Imports nothing of this project: `square.py` runs it in an environment that holds LIBRARY alone.
IMAGES.npy is (N, channels, height, width), float32. The "logits" of an encoder, which has no
classifier, are what a classifier would be given (N, features); those of torchxrayvision are its
calibrated scores, but with --double its logits.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NETWORKS = {  # layers of each block, k, channels of the first convolution
    "densenet121": ((6, 12, 24, 16), 32, 64),
    "narrow": ((2, 2, 2, 2), 8, 16),
    "tiny": ((1, 2, 1, 1), 4, 8),  # of tests/models/library_files
}
EXACT = {"densenet121": "densenet121"}  # networks that a library has a name of its own for


class Library(NamedTuple):
    """What one library offers: functions of (options), (network, path) and (network, images)."""

    build: Callable[[argparse.Namespace], Any]
    load: Callable[[Any, str], Any]  # returns the network that holds the weights
    save: Callable[[Any, str], None]
    run: Callable[[Any, np.ndarray], np.ndarray]
    tensors: Callable[[Any], list[tuple[str, Any]]]  # its parameters and statistics


# -- PyTorch ---------------------------------------------------------------------------------------


def torch_network(options):
    """Build the network of torchvision, timm, MONAI, torchxrayvision or segmentation-models."""
    import torch

    stages, growth, stem = NETWORKS[options.network]
    classes, channels, dropout = options.classes, options.channels, options.dropout
    if options.library in ("torchvision", "safetensors"):
        module = importlib.import_module("torchvision.models.densenet")
        network = module.DenseNet(growth, stages, stem, drop_rate=dropout, num_classes=classes)
    elif options.library == "timm":
        module = importlib.import_module("timm.models.densenet")
        network = module.DenseNet(growth, stages, classes, channels, proj_drop_rate=dropout)
        assert network.features.conv0.out_channels == stem
    elif options.library == "monai":
        module = importlib.import_module("monai.networks.nets")
        network = module.DenseNet(2, channels, classes, stem, growth, stages, dropout_prob=dropout)
    elif options.library == "torchxrayvision":
        module = importlib.import_module("torchxrayvision.models")
        # Some outputs have no operating point, as those of the published networks.
        points = torch.rand(classes, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.01
        points[2::7] = float("nan")
        network = module.DenseNet(
            growth, stages, stem, drop_rate=dropout, num_classes=classes, in_channels=channels,
            op_threshs=points if options.calibrated else None,
        )  # fmt: skip
    elif options.network in EXACT:
        module = importlib.import_module("segmentation_models_pytorch")
        network = module.Unet(EXACT[options.network], encoder_weights=None, in_channels=channels)
    else:
        module = importlib.import_module("segmentation_models_pytorch.encoders.densenet")
        network = module.DenseNetEncoder(
            [channels, 0, 0, 0, 0, 0], num_init_features=stem, growth_rate=growth,
            block_config=stages,
        )  # fmt: skip
        network.set_in_channels(channels)
    return network.eval().to(torch.float64 if options.double else torch.float32)


def torch_load(network, path):
    """Load a state dict; into the encoder of a segmentation network, where it is of one."""
    import torch

    weights = torch.load(path, weights_only=True)
    into = getattr(network, "encoder", network)
    into = network if any(name.startswith("encoder.") for name in weights) else into
    if "op_threshs" in weights:  # torchxrayvision assigns them to its published networks
        network.op_threshs = weights["op_threshs"]
    into.load_state_dict(weights)
    return network


def torch_save(network, path):
    import torch

    torch.save(network.state_dict(), path)


def torch_run(network, images):
    import torch

    dtype = next(network.parameters()).dtype
    images = torch.from_numpy(images).to(dtype)
    if dtype == torch.float64:  # torchxrayvision calibrates in single precision only
        network.op_threshs = None
    with torch.no_grad():
        if not hasattr(network, "classifier") and not hasattr(network, "class_layers"):
            features = getattr(network, "encoder", network)(images)[-1]
            return features.relu().mean((2, 3)).numpy()
        return network(images).numpy()


def torch_tensors(network):
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return [(n, t.data) for n, t in tensors if t.is_floating_point() and n != "op_threshs"]


def safetensors_load(network, path):
    from safetensors.torch import load_model

    load_model(network, path)
    return network


def safetensors_save(network, path):
    from safetensors.torch import save_model

    save_model(network, path)


# -- Keras -----------------------------------------------------------------------------------------


def keras_network(options, size=(None, None)):
    """Build a network of keras.applications, or a narrow one of its parts.

    Args:
        size: of the images, which the functions of keras.applications ask for.
    """
    import keras
    from keras.src.applications import densenet

    keras.config.set_floatx("float64" if options.double else "float32")
    stages, growth, stem = NETWORKS[options.network]
    if options.network in EXACT:
        size = size if size[0] else (224, 224)
        return densenet.DenseNet(
            stages, weights=None, input_shape=(*size, 3), classes=options.classes,
            classifier_activation=None,
        )  # fmt: skip
    layers = keras.layers
    inputs = layers.Input((*size, options.channels))
    x = layers.ZeroPadding2D(3)(inputs)
    x = layers.Conv2D(stem, 7, strides=2, use_bias=False, name="conv1_conv")(x)
    x = layers.BatchNormalization(epsilon=1.001e-5, name="conv1_bn")(x)
    x = layers.ZeroPadding2D(1)(layers.Activation("relu", name="conv1_relu")(x))
    x = layers.MaxPooling2D(3, strides=2, name="pool1")(x)
    for stage, count in enumerate(stages, 2):
        for layer in range(1, count + 1):
            x = densenet.conv_block(x, growth, name=f"conv{stage}_block{layer}")
        if stage <= len(stages):
            x = densenet.transition_block(x, 0.5, name=f"pool{stage}")
    x = layers.BatchNormalization(epsilon=1.001e-5, name="bn")(x)
    x = layers.GlobalAveragePooling2D(name="avg_pool")(layers.Activation("relu", name="relu")(x))
    return keras.Model(inputs, layers.Dense(options.classes, name="predictions")(x))


def keras_load(network, path):
    network.load_weights(path)
    return network


def keras_save(network, path):
    (network.save_weights if path.endswith(".weights.h5") else network.save)(path)


def keras_run(network, images):
    return np.asarray(network.predict(images.transpose(0, 2, 3, 1), verbose=0, batch_size=2))


def keras_tensors(network):
    return [(variable.path, variable) for variable in network.weights]


# -- Paddle ----------------------------------------------------------------------------------------


def paddle_network(options):
    """Build a network of paddle.vision, or a narrow one of its parts."""
    import paddle
    from paddle.vision.models import densenet

    if options.network in EXACT:
        network = densenet.DenseNet(121, dropout=options.dropout, num_classes=options.classes)
        return paddle_evaluating(network, options)

    class Narrow(densenet.DenseNet):  # its __init__ has five sizes only
        def __init__(self):
            paddle.nn.Layer.__init__(self)
            self.block_config, growth, channels = NETWORKS[options.network]
            self.num_classes, self.with_pool = options.classes, True
            self.conv1_func = densenet.ConvBNLayer(options.channels, channels, 7, 2, 3)
            self.pool2d_max = paddle.nn.MaxPool2D(3, 2, 1)
            self.dense_block_func_list, self.transition_func_list = [], []
            for stage, count in enumerate(self.block_config, 2):
                block = densenet.DenseBlock(
                    channels, count, 4, growth, options.dropout, f"conv{stage}"
                )
                self.dense_block_func_list.append(self.add_sublayer(f"db_conv_{stage}", block))
                channels += count * growth
                if stage <= len(self.block_config):
                    halved = densenet.TransitionLayer(channels, channels // 2)
                    self.transition_func_list.append(
                        self.add_sublayer(f"tr_conv{stage}_blk", halved)
                    )
                    channels //= 2
            self.batch_norm = densenet.BatchNorm(channels, act="relu")
            self.pool2d_avg = paddle.nn.AdaptiveAvgPool2D(1)
            self.out = paddle.nn.Linear(channels, options.classes)

    return paddle_evaluating(Narrow(), options)


def paddle_evaluating(network, options):
    network.eval()
    if options.double:  # its norms stay in single precision otherwise
        network.to(dtype="float64")
    return network


def paddle_load(network, path):
    import paddle

    weights = paddle.load(path)
    if next(iter(network.parameters())).dtype == paddle.float64:
        weights = {name: value.astype("float64") for name, value in weights.items()}
    missing, unexpected = network.set_state_dict(weights)
    assert not missing and not unexpected, (missing, unexpected)
    return network


def paddle_save(network, path):
    import paddle

    paddle.save(network.state_dict(), path)


def paddle_run(network, images):
    import paddle

    dtype = next(iter(network.parameters())).dtype
    with paddle.no_grad():
        return network(paddle.to_tensor(images, dtype=dtype)).numpy()


def paddle_tensors(network):
    return list(network.state_dict().items())


# --------------------------------------------------------------------------------------------------

OF_TORCH = Library(torch_network, torch_load, torch_save, torch_run, torch_tensors)
LIBRARIES = {
    "torchvision": OF_TORCH,
    "timm": OF_TORCH,
    "monai": OF_TORCH,
    "torchxrayvision": OF_TORCH,
    "segmentation-models": OF_TORCH,
    "safetensors": OF_TORCH._replace(load=safetensors_load, save=safetensors_save),
    "keras": Library(keras_network, keras_load, keras_save, keras_run, keras_tensors),
    "paddle": Library(paddle_network, paddle_load, paddle_save, paddle_run, paddle_tensors),
}


def set_at_random(library, network):
    """Give every tensor values as after training: no norm is the identity, no mean is zero."""
    draws = np.random.default_rng(0)
    for name, tensor in library.tensors(network):
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            fan_in = np.prod(shape) / max(shape[-1], shape[0])
            values = draws.normal(0, (2 / fan_in) ** 0.5, shape)
        elif name.endswith(("var", "variance", "weight", "gamma")):
            values = draws.uniform(0.5, 1.5, shape)
        else:
            values = draws.normal(0, 0.1, shape)
        if hasattr(tensor, "assign"):  # Keras
            tensor.assign(values.astype(np.float32))
        elif hasattr(tensor, "set_value"):  # Paddle
            tensor.set_value(values.astype(str(tensor.dtype).split(".")[-1]))
        else:
            import torch

            tensor.copy_(torch.from_numpy(values))


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("task", choices=("new", "copy", "logits"))
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--classes", type=int, default=5)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--calibrated", action="store_true")
    options = parser.parse_args()
    library, files = LIBRARIES[options.library], options.files
    images = np.load(files[1]) if options.task == "logits" else None
    if options.library == "keras" and images is not None:
        network = keras_network(options, images.shape[2:])
    else:
        network = library.build(options)
    if options.task == "new":
        set_at_random(library, network)
    else:
        network = library.load(network, files[0])
    if options.task == "logits":
        np.save(files[2], library.run(network, images))
    else:
        library.save(network, files[-1])


if __name__ == "__main__":
    main()
