#!/usr/bin/env bash
# One launcher on one node, started by srun: on_node.sh NODES HEAD_ADDRESS PORT SCRIPT ARGUMENTS...
set -euo pipefail
nodes=$1 head=$2 port=$3
shift 3
# the launcher ignores USR1, which is for the processes that it starts: they save a checkpoint and leave
trap '' USR1
read -ra args <<<"$ACCELERATE_ARGS"
args+=(--quiet) # a stage says itself why it ends
args+=(--num_machines "$nodes" --num_processes $((nodes * PROCESSES_PER_NODE)) --machine_rank "$SLURM_NODEID")
if [ $((nodes * PROCESSES_PER_NODE)) -gt 1 ]; then args+=(--main_process_ip "$head" --main_process_port "$port"); fi
if [ "$nodes" -gt 1 ]; then args+=(--deepspeed_multinode_launcher standard); fi
exec "$PYTHON" -m accelerate.commands.launch "${args[@]}" "$@"
