#!/usr/bin/env bash
# Weights of an .h5 of Keras land in other layers if a layer was frozen when it was saved.
#
# Keras 3.15.1 (jax 0.10.2), h5py 3.16.0. A backbone within a model, as for transfer learning: two
# norms of four channels, "n1" and "n2", then a head. The model is saved while n1 is frozen, and its
# file loaded into the same model, in which nothing is frozen:
#
#   saved                   n1 gamma 1.5  beta 0.5  mean 0.25   n2 gamma 11.5 beta 10.5 mean 10.25
#   load_weights(x.h5)      n1 gamma 11.5 beta 10.5 mean 0.25   n2 gamma 1.5  beta 0.5  mean 10.25
#   load_model(x.h5), x.weights.h5 and x.keras                  as saved
#
# The older format keeps a nested model as one list of arrays, the trainable ones first; loading
# pairs the lists by position. To freeze a layer reorders the list, and where shapes agree nothing
# fails, although the file has the name of the layer beside each array. Both models are the same code
# and differ in `trainable` alone.
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

layers = keras.layers


def build(frozen):
    norms = [layers.BatchNormalization(name=name) for name in ("n1", "n2")]
    norms[0].trainable = not frozen
    backbone = keras.Sequential([layers.Input((4,)), *norms], name="backbone")
    return keras.Sequential([layers.Input((4,)), backbone, layers.Dense(2, name="head")])


def firsts(model):
    return [[float(v[0]) for v in norm.get_weights()] for norm in model.layers[0].layers]


saved = build(frozen=True)
wanted = [[1.5, 0.5, 0.25, 2.0], [11.5, 10.5, 10.25, 12.0]]
for norm, values in zip(saved.layers[0].layers, wanted):
    norm.set_weights([np.full(4, value) for value in values])
saved.save("x.h5")
saved.save("x.keras")
saved.save_weights("x.weights.h5")
names = [str(name) for name in h5py.File("x.h5")["model_weights/backbone"].attrs["weight_names"]]
assert sum("n1" in name for name in names) == sum("n2" in name for name in names) == 4
found = {}
for file in ("x.h5", "x.weights.h5", "x.keras"):
    model = build(frozen=False)
    model.load_weights(file)
    found[file] = firsts(model)
found["load_model(x.h5)"] = firsts(keras.saving.load_model("x.h5"))
for way, values in found.items():
    print(f"{way:17} n1 {values[0]}  n2 {values[1]}")
assert found.pop("x.h5") == [[11.5, 10.5, 0.25, 2.0], [1.5, 0.5, 10.25, 12.0]]
assert all(values == wanted for values in found.values())
P
