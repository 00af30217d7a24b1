"""Read again after an error of a disk that may pass, as those of network disks do."""

import errno
import time
from collections.abc import Callable

# The first read after ESTALE looks the file up anew (NFS); the others may last some seconds.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN)
DELAYS_S = (0.1, 1, 5)


def with_retries(read: Callable, *args: object) -> object:
    """Return `read(*args)`, called again after an error that may pass, up to three times."""
    for delay_s in DELAYS_S:
        try:
            return read(*args)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(delay_s)
    return read(*args)
