#!/usr/bin/env bash
# The CPU kernels' tests as an ARM processor runs them: emulated, on Debian or Ubuntu for x86-64. Numbers alone; speeds
# mean nothing there.
#
#   sudo apt-get install mmdebstrap qemu-user g++-aarch64-linux-gnu
#   bash scripts/arm_check.sh [arguments of pytest]
#
#   ARM_ROOT   folder of an ARM system with PyTorch, 6 GB, made by the first run (default: ~/.cache/dyvm/arm)
#   PYTHON     the Python whose pip fetches packages (default: python3)
#
# Without arguments: the tests of the scan, dense, dynamic and in place, of its arguments and of its registered
# operators, those of the norm and of a layer's evaluation, with the kernels that g++ builds for NEON. Tests that start
# programs of their own are left out.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ARM_ROOT="${ARM_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/dyvm/arm}"
PYTHON="${PYTHON:-python3}"

missing=()
for tool in mmdebstrap qemu-aarch64 aarch64-linux-gnu-g++; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
  echo "arm_check.sh needs ${missing[*]}: sudo apt-get install mmdebstrap qemu-user g++-aarch64-linux-gnu" >&2
  exit 1
fi

system="$ARM_ROOT/system" packages="$ARM_ROOT/packages"
if [[ ! -e $ARM_ROOT/complete ]]; then
  rm -rf "$system" "$packages"
  mkdir -p "$ARM_ROOT"
  mmdebstrap --arch=arm64 --variant=extract --include=python3,libgomp1,libstdc++6 \
    "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$system"
  found=("$system"/usr/bin/python3.*[0-9])
  version="${found[0]##*python}"
  platforms=()
  for glibc in {17..39}; do
    platforms+=(--platform "manylinux_2_${glibc}_aarch64")
  done
  "$PYTHON" -m pip install --target "$packages" "${platforms[@]}" --platform manylinux2014_aarch64 \
    --python-version "$version" --implementation cp --only-binary=:all: -r requirements.txt
  touch "$ARM_ROOT/complete"
fi

emulated=("$system"/usr/bin/python3.*[0-9])
if (($# == 0)); then
  set -- tests/test_ops.py tests/test_ops_arguments.py tests/test_scan_in_place.py tests/test_operators.py \
    tests/test_rms_norm.py tests/test_cpu_layer.py -k "cpu and not triton and not mamba_ssm"
fi
CXX=aarch64-linux-gnu-g++ XDG_CACHE_HOME="$ARM_ROOT/cache" PYTHONHOME="$system/usr" PYTHONPATH="$packages" \
  exec qemu-aarch64 -L "$system" -E LD_LIBRARY_PATH="$system/usr/lib/aarch64-linux-gnu" \
  "${emulated[0]}" -m pytest -q -o addopts= "$@"
