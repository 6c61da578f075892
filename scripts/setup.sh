#!/usr/bin/env bash
# Makes the Python environment, or finds the one made before. The last line of standard output is the path of the
# python to use; everything else goes to standard error.
#
#   bash scripts/setup.sh
#   PYTHON=/path/to/python bash scripts/setup.sh    # use this python as it is: it is checked, nothing is installed
#
# The environment lies in the user's cache, ${XDG_CACHE_HOME:-~/.cache}/dyvm, one for each requirements.txt and Python
# version, so that a fresh clone finds it. Folders there may be deleted to reclaim their space.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "setup: $*" >&2
  exit 1
}

check_given_python() {
  local python problem
  python="$(command -v -- "$PYTHON")" || fail "PYTHON=$PYTHON is not a program; give a Python 3.10 or newer"
  problem="$("$python" -c '
import importlib, importlib.util, sys
if sys.version_info < (3, 10):
    sys.exit("it is Python %d.%d, and 3.10 or newer is needed" % sys.version_info[:2])
modules = "torch torchvision timm numpy einops safetensors tensorboard matplotlib tabulate PIL tqdm av jinja2".split()
missing = [name for name in modules if importlib.util.find_spec(name) is None]
if missing:
    sys.exit("it lacks %s; install requirements.txt there, or unset PYTHON" % ", ".join(missing))
for name in ("torch", "torchvision", "timm"):
    try:
        importlib.import_module(name)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        sys.exit("it cannot import %s (%s); install requirements.txt there, or unset PYTHON" % (name, reason))
' 2>&1)" || fail "PYTHON=$PYTHON cannot be used: $(tail -n 1 <<<"${problem:-it does not run}")"
  echo "$python"
}

find_base_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.10 or newer found on PATH; install one, or name one that has the requirements with PYTHON="
}

# What the environment depends on besides the requirements: Python's version and the machine's architecture.
environment_key() {
  "$1" -c '
import hashlib, platform, sys
text = open(sys.argv[1], "rb").read() + repr((sys.version_info[:2], platform.machine())).encode()
print(hashlib.sha256(text).hexdigest()[:12])
' "$ROOT/requirements.txt"
}

# The marker is written last; the python is started because the one that the environment was made from may be gone.
is_complete() {
  [[ -f $environment/complete ]] && "$environment/bin/python" -c '' 2>/dev/null
}

# The lock belongs to the open file, which this shell keeps until it ends, not to the process that asked for it.
lock() {
  exec 9>"$environment.lock"
  if ! "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null; then
    echo "setup: waiting for another set-up that is filling $environment" >&2
    "$base" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  fi
}

install() {
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv)"
  trap 'rm -rf "$environment"' EXIT
  echo "setup: installing requirements.txt into $environment (several GB, once)" >&2
  rm -rf "$environment"
  "$base" -m venv "$environment" >&2 || fail "$base could not make the virtual environment $environment"
  "$environment/bin/python" -m pip install --disable-pip-version-check -r "$ROOT/requirements.txt" >&2 ||
    fail "pip could not install requirements.txt (its message stands above); nothing was left behind, so try again"
  touch "$environment/complete"
  trap - EXIT
}

if [[ -n ${PYTHON:-} ]]; then
  check_given_python
  exit
fi

base="$(find_base_python)"
cache="${XDG_CACHE_HOME:-${HOME:?is not set: set it or XDG_CACHE_HOME}/.cache}/dyvm"
environment="$cache/venv-$(environment_key "$base")"
if ! is_complete; then
  mkdir -p "$cache" 2>/dev/null && [[ -w $cache ]] ||
    fail "cannot write to $cache; set XDG_CACHE_HOME to another folder"
  lock
  is_complete || install
fi
echo "$environment/bin/python"
