#!/usr/bin/env bash
# Train on this machine, or as one of several machines that each run this same command (docs/multi_node.md):
#
#   bash launch/train.sh CONFIG [key=value ...]
#
#   NNODES           machines that take part, or MIN:MAX, between which they may come and go; default 1
#   MASTER_ADDR      name or address of one of them, the same on all; needed above 1
#   MASTER_PORT      a free port of that machine; default 29500
#   NODE_RANK        0 .. NNODES-1, another on every machine and 0 on MASTER_ADDR's; may be left out
#   NPROC_PER_NODE   processes on this machine; default: one per GPU, without a GPU 1
#   RDZV_ID          name of the run, the same on all machines; default malora
#   MAX_RESTARTS     how often the processes are started again when one fails; default 3
#
# A run goes on from the newest checkpoint in `save` (resume=auto) unless resume=off is among the keys.
#
# Python is that of .venv where launch/setup_env.sh made it, else python3. Other options of torchrun are read by
# itself from variables PET_<OPTION>, for example PET_LOG_DIR.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" # fail and ROOT; what it installs is not for every node at once

is_whole() { [[ $1 =~ ^[0-9]{1,9}$ ]]; }

config=${1:-}
case $config in
  '' | -h | --help)
    sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [ -n "$config" ] || fail "CONFIG is missing: name a YAML file, for example one of configs/"
    exit 0
    ;;
esac
[ -f "$config" ] || fail "CONFIG='$config': no such file; name a YAML file, for example one of configs/"

# A machine that was told of others but not of how many would train alone, and write where the others write.
[ -n "${NNODES:-}" ] || [ -z "${MASTER_ADDR:-}${NODE_RANK:-}" ] ||
  fail "NNODES is not set, but ${MASTER_ADDR:+MASTER_ADDR=$MASTER_ADDR }${NODE_RANK:+NODE_RANK=$NODE_RANK }is; set NNODES too, 1 for this machine alone"
port=${MASTER_PORT:-29500} restarts=${MAX_RESTARTS:-3}
[[ ${NNODES:-1} =~ ^([0-9]{1,9})(:([0-9]{1,9}))?$ ]] || BASH_REMATCH=(_ 0)
fewest=${BASH_REMATCH[1]} nodes=${BASH_REMATCH[3]:-${BASH_REMATCH[1]}}
[ "$fewest" -ge 1 ] && [ "$nodes" -ge "$fewest" ] ||
  fail "NNODES='$NNODES': must be a whole number of at least 1, or two as in 2:4; count the machines"
is_whole "$restarts" || fail "MAX_RESTARTS='$restarts': must be a whole number; 0 switches restarts off"
is_whole "$port" && [ "$port" -ge 1 ] && [ "$port" -le 65535 ] || fail "MASTER_PORT='$port': must be a port, 1 to 65535"
[ "$nodes" -eq 1 ] || [ -n "${MASTER_ADDR:-}" ] ||
  fail "MASTER_ADDR is not set, but NNODES=$nodes; set it to the name or address of one of the machines, the same on all"
[ -z "${NODE_RANK:-}" ] || { is_whole "$NODE_RANK" && [ "$NODE_RANK" -lt "$nodes" ]; } ||
  fail "NODE_RANK='$NODE_RANK': must be a whole number below NNODES=$nodes; count from 0, or leave it out"
[ -z "${NODE_RANK:-}" ] || [ "$fewest" -eq "$nodes" ] ||
  fail "NODE_RANK='$NODE_RANK': is fixed, but NNODES=$NNODES lets machines come and go; leave it out"

python=$ROOT/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
processes=${NPROC_PER_NODE:-$("$python" -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
is_whole "$processes" && [ "$processes" -ge 1 ] || fail "NPROC_PER_NODE='$processes': must be a whole number of at least 1"

# Two facts torchrun guesses from this machine's host name, wrongly where /etc/hosts gives that name a loopback
# address (Debian, Ubuntu) or others cannot resolve it: whether MASTER_ADDR is this machine, which then hosts the
# rendezvous, and by which address the others reach this one. The kernel's choice of a source address knows both.
find_own_address() {
  "$python" - "$MASTER_ADDR" "$port" <<'PYTHON'
import ipaddress, socket, sys

host, port = sys.argv[1], int(sys.argv[2])
try:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # a datagram socket: sends nothing
        own = probe.getsockname()[0]
except OSError as error:
    sys.exit(f"error: MASTER_ADDR={host!r}: this machine finds no way to it ({error}); check the name and the network")
is_here = own == address[0] or ipaddress.ip_address(own).is_loopback
print(f"1 {host}" if is_here else f"0 {own}")
PYTHON
}

range=$nodes settings=read_timeout=600
if [ "$fewest" -lt "$nodes" ]; then
  range=$fewest:$nodes
  # A machine that is late or comes later joins by a restart of the others.
  settings+=,last_call_timeout=15
fi
options=(--nnodes "$range" --nproc-per-node "$processes" --max-restarts "$restarts")
if [ -n "${NODE_RANK:-}" ]; then
  # torchrun's static rendezvous: the ranks are fixed, NODE_RANK 0 hosts it, whatever its address.
  options+=(--node-rank "$NODE_RANK" --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port")
elif [ "$nodes" -gt 1 ]; then
  # torchrun's c10d rendezvous at MASTER_ADDR:MASTER_PORT: machines get their ranks there, so that all run the same
  # command and a restarted one joins again. They may start up to ten minutes apart.
  own=$(find_own_address) || exit 2
  # torchrun's shared store stays on the machine that had it first, and its address with the others: a machine whose
  # agent was started again would wait for it in vain.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  options+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "${RDZV_ID:-malora}"
    --rdzv-conf "is_host=${own%% *},$settings" --local-addr "${own#* }")
else
  options+=(--standalone)
fi
shift
exec "$python" -m malora_dist.launch "${options[@]}" -m malora_dist.train --config "$config" resume=auto "$@"
