# Sourced by the other scripts of this folder: messages, and `setup_env`, which makes .venv in the project's root.
#
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise python3, python3.12 and python3.11 are tried.

CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# step TEXT: one line that says what begins and when, and the name under which a failure is reported.
step() {
  CURRENT_STEP=$1
  printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

fail() {
  echo "error: $*" >&2
  exit 2
}

report_failure() {
  local status=$?
  [ $status = 0 ] || [ -z "${CURRENT_STEP:-}" ] || echo "error: the step '$CURRENT_STEP' failed (exit $status)" >&2
}
trap report_failure EXIT

is_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

# The interpreter for a new .venv, in $python.
find_python() {
  local candidates=(python3 python3.12 python3.11)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    if is_supported "$python"; then
      "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python lacks the venv module; install it (Debian, Ubuntu: apt install python3-venv) or set PYTHON=/path/to/python3"
      return
    fi
  done
  fail "no Python 3.11 or 3.12 among ${candidates[*]} (${candidates[0]} is $("${candidates[0]}" --version 2>&1 | head -n 1)); set PYTHON=/path/to/python3.12"
}

make_venv() {
  if .venv/bin/python -m pip --version >/dev/null 2>&1; then
    [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" --version)" = "$(.venv/bin/python --version)" ] ||
      fail "PYTHON=$PYTHON is not the version .venv was made with ($(.venv/bin/python --version)); delete .venv or unset PYTHON"
    return
  fi
  local python
  find_python
  step "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# Options of pip that choose the build of torch: with a GPU PyPI's (CUDA), without one the far smaller CPU build.
torch_options() {
  torch_options=()
  if nvidia-smi >/dev/null 2>&1; then
    case $(.venv/bin/python -m pip show torch 2>/dev/null) in
      *+cpu*) .venv/bin/python -m pip uninstall --yes torch ;;
    esac
  elif [ "$(uname -s)" = Linux ]; then
    if .venv/bin/python -c "from urllib.request import urlopen; urlopen('$CPU_TORCH_INDEX/torch/', timeout=10)" 2>/dev/null; then
      torch_options=(--extra-index-url "$CPU_TORCH_INDEX") # 2.x.y+cpu sorts above PyPI's 2.x.y
    else
      echo "$CPU_TORCH_INDEX does not answer: torch comes from pip's own index, on PyPI a CUDA build of several GB"
    fi
  fi
}

# Make .venv once, install the package with the pins of constraints.txt, again only when these change, and put it on PATH.
setup_env() {
  cd "$ROOT"
  make_venv
  local build=any torch_options stamp=.venv/installed wanted
  ! nvidia-smi >/dev/null 2>&1 || build=gpu
  wanted="$(cat setup.py constraints.txt | cksum) $build $ROOT"
  if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    step "installing the dependencies into .venv"
    torch_options
    # ${x[@]+...}: bash before 4.4 takes an empty array for an unset variable
    .venv/bin/python -m pip install --constraint constraints.txt ${torch_options[@]+"${torch_options[@]}"} --editable '.[dev]'
    echo "$wanted" >$stamp
  fi
  PATH=$ROOT/.venv/bin:$PATH
  step "environment ready: $(python --version), torch $(python -m pip show torch | sed -n 's/^Version: //p') in .venv"
}
