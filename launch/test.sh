#!/usr/bin/env bash
# Make .venv if need be, then run ruff, mypy and the tests:  bash launch/test.sh [options of pytest]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
step "ruff"
python -m ruff check .
python -m ruff format --check .
step "mypy"
python -m mypy
step "pytest"
python -m pytest "$@"
step "all passed"
