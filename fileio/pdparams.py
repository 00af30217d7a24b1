"""Write weights as Paddle's `.pdparams`: a pickled dict of NumPy arrays, without a checksum.

fileio/inert_pickle.py reads such files and executes nothing.
"""

import pickle

from torch import Tensor


def to_bytes(weights: dict[str, Tensor]) -> bytes:
    """Write what paddle.load returns as a state dict, and set_state_dict takes by these names."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
    return pickle.dumps(arrays, protocol=4)
