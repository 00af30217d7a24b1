#!/usr/bin/env bash
# Layers of Keras with dtype float64 compute in single precision, and hand out float64.
#
# Keras 3.15.1, backends numpy 2.4.6 and jax 0.10.2 (64 bits enabled); torch 2.11.0 gives the same.
# BatchNormalization and GlobalAveragePooling2D with dtype "float64", weights and input of float64:
#
#   keras.backend.result_type("float64", "float32") is "float32"
#
# By that rule normalisation, and the sums of means and variances, cast float64 down to float32.
# The cast is meant for 16-bit types, which it widens. The result is cast back to float64, so that
# every dtype which can be asked for says float64; yet each number of it fits a float32:
#
#   BatchNormalization      off by 3e-7 to 6e-7
#   GlobalAveragePooling2D  off by 3e-8
#
# where double precision gives 1e-15. A network that is built in float64 to tell rounding from a
# mistake is about as far off as one in float32: DenseNet-121 by 2.4e-7 of the largest logit in both.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 h5py==3.16.0 numpy==2.4.6
cat > "$work/layers.py" <<'P'
import os

import numpy as np

import keras

if os.environ["KERAS_BACKEND"] == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
assert keras.backend.result_type("float64", "float32") == "float32"
draws = np.random.default_rng(0)
images, weights = draws.normal(size=(2, 9, 9, 4)), draws.uniform(0.5, 1.5, (4, 4))
gamma, beta, mean, variance = weights
wanted = {
    "BatchNormalization": (images - mean) / np.sqrt(variance + 1e-3) * gamma + beta,
    "GlobalAveragePooling2D": images.mean((1, 2)),
}
for name, values in wanted.items():
    layer = getattr(keras.layers, name)(dtype="float64")
    layer.build(images.shape)
    if layer.weights:
        layer.set_weights(list(weights))
    assert all(np.array_equal(*pair) for pair in zip(layer.get_weights(), weights))
    found = keras.ops.convert_to_numpy(layer(keras.ops.convert_to_tensor(images, "float64")))
    off = np.abs(found - values).max()
    print(f"{keras.backend.backend():5} {name:22} compute {layer.compute_dtype}: off by {off:.1e}")
    assert layer.compute_dtype == "float64" and 1e-9 < off < 1e-5
    assert np.array_equal(found, found.astype(np.float32))  # nothing below single precision
P
for backend in numpy jax; do
    KERAS_HOME="$work" KERAS_BACKEND=$backend "$work/venv/bin/python" "$work/layers.py"
done
