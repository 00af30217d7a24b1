#!/usr/bin/env bash
# nohup does not protect torchrun: it stops at the SIGHUP that nohup was to ignore.
#
# PyTorch 2.13.0. nohup starts a program with SIGHUP ignored, and Python leaves it so. torchrun then
# installs a handler for SIGHUP all the same (the signal is in its default list), ends its processes
# and exits with 1, "got signal: 1". A run that was started as
#
#   nohup torchrun --standalone train.py &
#
# therefore ends when the terminal closes. With a --signals-to-handle that leaves SIGHUP out, the
# handler is not installed, torchrun and its processes ignore the signal, and the run ends by itself.
# Seen (exit code of torchrun; whether its process came to its end):
#
#   default:                                        exit 1, process ended early
#   --signals-to-handle=SIGTERM,SIGINT,SIGQUIT:     exit 0, process came to its end
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/train.py" <<'P'
import pathlib
import sys
import time

here = pathlib.Path(sys.argv[1])
(here / "started").touch()
for _ in range(300):  # until the signal has been sent, and some seconds more
    time.sleep(0.1)
    if (here / "sent").exists():
        time.sleep(8)
        (here / "done").touch()
        break
P
try() { # try NAME FLAG...: print the exit code, and whether train.py came to its end
    mkdir "$work/$1"
    here=$work/$1
    shift
    nohup "$work/venv/bin/torchrun" --standalone "$@" "$work/train.py" "$here" >/dev/null 2>&1 &
    run=$!
    while [ ! -e "$here/started" ]; do
        kill -0 "$run" || return 1 # torchrun has failed
        sleep 0.2
    done
    kill -HUP "$run"
    touch "$here/sent"
    code=0
    wait "$run" || code=$?
    if [ -e "$here/done" ]; then end="to its end"; else end="ended early"; fi
    echo "exit $code, $end"
}
default=$(try default)
without=$(try without --signals-to-handle=SIGTERM,SIGINT,SIGQUIT)
echo "default:     $default"
echo "without HUP: $without"
[ "$default" = "exit 1, ended early" ] && [ "$without" = "exit 0, to its end" ]
