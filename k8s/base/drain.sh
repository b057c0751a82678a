#!/usr/bin/env bash
# What a worker does before Kubernetes stops it: it tells Ray to move its work elsewhere, and waits until Ray has.
# Usage: drain.sh SECONDS    within which the work is moved; below the pod's termination grace period
set -u

seconds=${1:?seconds within which the work is moved}
address=${RAY_ADDRESS:?}

node_id() {
  local process
  for process in "${PROC:-/proc}"/[0-9]*; do
    tr '\0' '\n' <"$process/cmdline" 2>/dev/null | sed -n 's/^--node[_-]id=\([0-9a-f]\{32,\}\)$/\1/p'
  done | head -n 1
}

raylet_runs() { [ -n "$(node_id)" ]; }

node=$(node_id)
if [ -z "$node" ]; then
  echo "drain: no Ray runs here"
  exit 0
fi
# Never without the id: Ray would then start a cluster of its own here and drain that.
if ! ray drain-node --address "$address" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "Kubernetes stops this pod" --deadline-remaining-seconds "$seconds"; then
  echo "drain: refused; the work here is done again elsewhere"
  exit 0
fi
for ((waited = 0; waited < seconds; waited++)); do
  raylet_runs || break
  sleep "${PAUSE:-1}"
done
echo "drain: over after $waited s"
