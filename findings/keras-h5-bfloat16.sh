#!/usr/bin/env bash
# Keras writes bfloat16 weights to an .h5 which it cannot read, and which no longer says what they are.
#
# Keras 3.15.1 (jax 0.10.2), h5py 3.16.0. A layer of dtype "bfloat16", saved in three formats:
#
#   model.save("x.h5")                  no warning about the type; dtype |V2 (two bytes of anything)
#   model.save_weights("x.weights.h5")  dtype |V2, and an attribute dtype = bfloat16
#   model.save("x.keras")               the same as .weights.h5
#
# The last two load with the same bits. Loading the first, by load_weights or load_model, raises a
# TypeError of JAX's (with torch as the backend "ValueError: Invalid dtype: void16"): HDF5 has no
# bfloat16, and the older format keeps no note of its own. The bytes are whole, so that a reader who
# knows the type can rescue them by a view.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 h5py==3.16.0 numpy==2.4.6
cd "$work"
KERAS_HOME="$work" KERAS_BACKEND=jax "$work/venv/bin/python" - <<'P'
import numpy as np

import h5py
import keras


def build():
    dense = keras.layers.Dense(3, dtype="bfloat16", name="d")
    return keras.Sequential([keras.layers.Input((4,)), dense])


def bits(array):
    return np.asarray(array).view(np.uint16)


model = build()
kernel = bits(model.get_weights()[0])
model.save("x.h5")
model.save("x.keras")
model.save_weights("x.weights.h5")
stored = {}
with h5py.File("x.h5") as file:
    file.visititems(lambda name, item: stored.update({name.rpartition("/")[2]: item}))
    print("x.h5:", stored["kernel"].dtype, dict(stored["kernel"].attrs))
    assert stored["kernel"].dtype == "V2" and not stored["kernel"].attrs
    assert np.array_equal(bits(stored["kernel"][()]), kernel)
for file in ("x.weights.h5", "x.keras"):
    other = build()
    other.load_weights(file)
    assert np.array_equal(bits(other.get_weights()[0]), kernel)
    print(f"{file}: the same bits")
for name, load in (("load_weights", build().load_weights), ("load_model", keras.saving.load_model)):
    try:
        load("x.h5")
    except Exception as error:
        print(f"{name}(x.h5): {type(error).__name__}: {str(error)[:70]}")
        assert isinstance(error, (TypeError, ValueError))
    else:
        raise SystemExit(f"{name} reads it now")
P
