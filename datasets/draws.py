"""Draw the random numbers that augment an image, as a function of (seed, epoch, image)."""

import numpy as np

NUM_DRAWS = 64  # of an image in an epoch
PER_COUNT = 4  # numbers that Philox gives for one value of its counter


_philox = np.random.Philox(0)  # set anew for each image: to make one costs more than to draw
NOTHING_BUFFERED = {
    "buffer": np.zeros(PER_COUNT, np.uint64),
    "buffer_pos": PER_COUNT,
    "has_uint32": 0,
    "uinteger": 0,
}


def uniforms(seed: int, epoch: int, first: int, count: int = 1) -> np.ndarray:
    """Return (count, 64) float64 from 0 to below 1; row i is of image `first + i`.

    Philox is counter-based: the numbers of an image depend on no other image, on no process and on
    nothing drawn before. numpy guarantees its raw numbers, unlike those of its distributions.
    """
    counter = [first * NUM_DRAWS // PER_COUNT, 0, 0, 0]
    state = {
        "counter": np.array(counter, dtype=np.uint64),
        "key": np.array([seed, epoch], dtype=np.uint64),
    }
    _philox.state = {"bit_generator": "Philox", "state": state} | NOTHING_BUFFERED
    raw = _philox.random_raw(count * NUM_DRAWS)
    return ((raw >> np.uint64(11)) * 2.0**-53).reshape(count, NUM_DRAWS)
