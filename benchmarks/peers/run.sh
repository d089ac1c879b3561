#!/usr/bin/env bash
# Everything in one command: the environment, the models, the comparison.
#
#   bash benchmarks/peers/run.sh VENV --models DIR --artifact DIR [options of python -m benchmarks.peers]
#
# VENV is made on the first call with python3, or $PYTHON (compiling llama.cpp takes minutes). The
# DIR of --models is filled on the first comparison (15 GB of disk, at most 15 GB of memory). Both
# are used as they are afterwards.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
venv=${1:?"usage: run.sh VENV --models DIR --artifact DIR [more options]"}
shift

if [ ! -e "$venv/.peers-ready" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  # Pinned and first: left to the resolver, torch may come with gigabytes of CUDA.
  "$venv/bin/pip" install --quiet 'torch==2.13.0'
  "$venv/bin/pip" install --quiet --editable "$here/../..[export,train]"
  # -march=native: AVX-512 and VNNI where the processor has them. OpenMP, llamafile's matrix
  # kernels and the repacking of Q4_0 are on by default.
  CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF" \
    "$venv/bin/pip" install --no-binary llama-cpp-python -r "$here/requirements.txt"
  touch "$venv/.peers-ready"
fi
PYTHONPATH="$here/../.." exec "$venv/bin/python" -m benchmarks.peers "$@"
