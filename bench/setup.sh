#!/usr/bin/env bash
# The comparison environments, one virtual environment a peer, so that no peer's pins meet ours or each other's.
#
#   bench/setup.sh [DIR]      DIR: default $BENCH_ENVS, else .bench; makes DIR/trl and DIR/tunix (about 3 GB)
#
# PYTHON (default python3.11) is the interpreter that both are made from.
set -euo pipefail
envs=${1:-${BENCH_ENVS:-.bench}}
python=${PYTHON:-python3.11}

make_env() { # NAME: a fresh environment DIR/NAME
    "$python" -m venv --clear "$envs/$1"
    "$envs/$1/bin/pip" install -q --upgrade pip
}

make_env trl
# torch first: what the others would resolve to brings several GB of CUDA. Where this version does too, set TORCH_INDEX
# to the index of CPU builds.
"$envs/trl/bin/pip" install -q torch==2.13.0 ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
"$envs/trl/bin/pip" install -q 'trl==1.16.*' transformers datasets accelerate peft sentencepiece protobuf

make_env tunix
"$envs/tunix/bin/pip" install -q google-tunix==0.1.7

"$envs/trl/bin/python" -c 'import trl; print("trl", trl.__version__)'
"$envs/tunix/bin/python" -c 'import importlib.metadata as m; print("tunix", m.version("google-tunix"))'
