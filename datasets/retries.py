"""Read again after an error of a disk that may pass, as those of network disks do."""

import errno
import time
from collections.abc import Callable

# The first read after ESTALE looks the file up anew (NFS); the others may last some seconds.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN)
DELAYS_S = (0.1, 1, 5)
_failures = 0  # in a row, of this process: a disk that stays away costs these delays once


def with_retries(read: Callable, *args: object) -> object:
    """Return `read(*args)`, called again after an error that may pass."""
    global _failures
    while True:
        try:
            result = read(*args)
        except OSError as error:
            if error.errno not in PASSING or _failures == len(DELAYS_S):
                raise
            time.sleep(DELAYS_S[_failures])
            _failures += 1
        else:
            _failures = 0
            return result
