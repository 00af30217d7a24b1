#!/usr/bin/env bash
# `import torchxrayvision` silences the warnings of the whole process.
#
# torchxrayvision 1.5.7, torch 2.11.0. Its modules put a filter that ignores every warning in front of
# all filters of the process, and leave it there. What a program, PyTorch or another library would have
# warned of later is not shown, also if Python was started with -W always or -W error. For example
#
#   scheduler.step() before optimizer.step()   a UserWarning in front of the import, none after it
#
# and with -W error, by which a test suite turns warnings into failures, the test passes.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torchxrayvision==1.5.7 torch==2.11.0 torchvision==0.26.0 numpy==2.4.6
cat > "$work/step.py" <<'P'
import sys

import torch

if "imported" in sys.argv:
    import torchxrayvision  # noqa: F401
optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
P
cd "$work"
count() { # count FLAG... -- WORDS: how often PyTorch's warning is shown; its exit code
    code=0
    "$work/venv/bin/python" "$@" 2> told || code=$?
    echo "$(grep -c 'UserWarning: Detected call of' told || true) shown, exit $code"
}
found="$(count -W always step.py) | $(count -W always step.py imported)"
found="$found | $(count -W error::UserWarning step.py) | $(count -W error::UserWarning step.py imported)"
echo "without, with the import, at -W always and -W error: $found"
[ "$found" = "1 shown, exit 0 | 0 shown, exit 0 | 1 shown, exit 1 | 0 shown, exit 0" ]
