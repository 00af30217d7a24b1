"""End a program with one line on Windows, before it imports what Windows does not have.

Every command imports it through cli/flag_types.py, before any module that needs more than that.
"""

import sys

from errors import UsageError

try:
    import fcntl  # noqa: F401
    import resource  # noqa: F401
except ImportError:
    what = "this program needs Linux or macOS: it uses their file locks and signals"
    sys.stderr.write(
        UsageError(what, "run it in WSL (Windows Subsystem for Linux)").report() + "\n"
    )
    sys.exit(UsageError.code)
