# shellcheck shell=bash disable=SC2034 # the job scripts use what is set here
# Shared by the job scripts: models, seeds, sizes, paths; in a job also which model and seed this element of the array is,
# launching, and signals. Every setting can be given in the environment of sbatch, or in sbatches/site.sh
# (site.example.sh); launch.sh reads the settings here, too.
set -euo pipefail
if [ -n "${SLURM_JOB_ID:-}" ]; then cd "$SLURM_SUBMIT_DIR"; fi # the root of the project
# without the carriage returns of an editor on Windows, which bash takes for a part of each word
if [ -f sbatches/site.sh ]; then source <(tr -d '\r' <sbatches/site.sh); fi

# ------------------------------------------------------------------------------------------------------ what is trained
MODELS=${MODELS:-EleutherAI/pythia-1b-deduped EleutherAI/pythia-2.8b-deduped EleutherAI/pythia-6.9b-deduped}
SEEDS=${SEEDS:-44413 55513 66613 77713}
# further arguments of each stage
SFT_ARGS=${SFT_ARGS:-} REWARD_ARGS=${REWARD_ARGS:-} PPO_ARGS=${PPO_ARGS:-}
RLOO_ARGS=${RLOO_ARGS:-} GRPO_ARGS=${GRPO_ARGS:-} DPO_ARGS=${DPO_ARGS:-} ONLINE_DPO_ARGS=${ONLINE_DPO_ARGS:-}
BEST_OF_N_ARGS=${BEST_OF_N_ARGS:-}
if [ "${LORA:=0}" = 1 ]; then # adapters (docs/lora.md), at ten times the paper's learning rate
    for stage_args in SFT_ARGS REWARD_ARGS PPO_ARGS RLOO_ARGS GRPO_ARGS DPO_ARGS ONLINE_DPO_ARGS; do
        printf -v "$stage_args" '%s' "--lora --lr 3e-5 ${!stage_args}"
    done
fi

# ------------------------------------------------------------------------------------------------------------ with what
export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-8}
export ACCELERATE_ARGS=${ACCELERATE_ARGS:---config_file deepspeed.yaml} # how accelerate launches
DEEPSPEED=${DEEPSPEED---deepspeed}                              # empty: without
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}                      # compute nodes seldom have a network: launch.sh --prefetch
export GPU_GB=${GPU_GB:-80}                                     # memory of a GPU
export TOKENIZERS_PARALLELISM=false
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # seconds that SIGTERM leaves for a checkpoint

STAGE_ORDER=(sft reward ppo_left_padding rloo grpo dpo online_dpo best_of_n eval)
# rows of an update
declare -A BATCH_OF=([sft]=${BATCH:-128} [reward]=${BATCH:-64} [ppo_left_padding]=${BATCH:-512} [rloo]=${BATCH:-512}
    [grpo]=${BATCH:-512} [dpo]=${BATCH:-64} [online_dpo]=${BATCH:-512})

read -ra models <<<"$MODELS"
read -ra seeds <<<"$SEEDS"

source sbatches/rows_of.sh
even() { echo $(($1 + $1 % 2)); } # online DPO trains on pairs of responses
# fit STAGE MODEL NODES: two lines, arguments that make a stage fit into GPU_GB, and why; refuses what does not fit
fit() {
    local micro rows rollout args
    args=${1^^}_ARGS
    read -r micro rows rollout <<<"$(rows_of "$2")"
    case $1 in
        sft | reward | dpo) rows=$micro ;;
        ppo_left_padding) args=PPO_ARGS ;;
        online_dpo) rows=$(even "$rows") ;;
        best_of_n) return ;; # trains nothing
    esac
    "$PYTHON" benchmark/memory.py --fit "$1" --model "$2" --processes $(($3 * PROCESSES_PER_NODE)) --gpu_gb "$GPU_GB" \
        --rows "$rows" --rollout_rows "$rollout" --launch="$ACCELERATE_ARGS" --given="${!args}"
}
name_of() { echo "$(basename "$1")_$2$([ "$LORA" = 0 ] || echo _lora)"; } # MODEL SEED: of a chain: runs/<name>_sft, models/<name>/sft and so on

[ -n "${SLURM_JOB_ID:-}" ] || return 0 # launch.sh needs no more

# -------------------------------------------------------------------------------------------------------- this element
ELEMENT=${SLURM_ARRAY_TASK_ID:-0}
if [ "$ELEMENT" -ge $((${#models[@]} * ${#seeds[@]})) ]; then
    echo "element $ELEMENT: nothing to do for ${#models[@]} models x ${#seeds[@]} seeds"
    exit 0
fi
MODEL=${models[$((ELEMENT / ${#seeds[@]}))]}
SEED=${seeds[$((ELEMENT % ${#seeds[@]}))]}
NAME=$(name_of "$MODEL" "$SEED")
read -r MICRO PPO_MICRO ROLLOUT <<<"$(rows_of "$MODEL")"

# ----------------------------------------------------------------------------------------------------------- launching
threads=$((${SLURM_CPUS_ON_NODE:-1} / PROCESSES_PER_NODE))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
NODES=${SLURM_NNODES:-1}
JOB=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID} # this element alone
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
HEAD=$(scontrol show node "$HEAD" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
PORT=$((20000 + SLURM_JOB_ID % 20000))
INTERRUPTED=0
trap 'INTERRUPTED=1' USR1 # --signal=B:USR1@300: the time limit is near

summary() { # RUN_NAME KEY: an entry of summary.json
    "$PYTHON" -c 'import pathlib, sys; from summarize_from_feedback_details.common.run_files import read_run
print(read_run(pathlib.Path(sys.argv[1]))[0].get(sys.argv[2], ""))' "runs/$1" "$2" 2>/dev/null
}

# launch RUN_NAME SCRIPT ARGUMENTS...: one launcher a node, PROCESSES_PER_NODE processes each. When the run says that it was
# interrupted, by the time limit or a requeue, the job is queued again and goes on where it was.
launch() {
    local run=$1 status=0 pid begun reason fits
    shift
    echo "== $(date '+%F %T') job $JOB restart ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST: $run"
    fits=$(fit "$(basename "$1" .py)" "$MODEL" "$NODES")
    [ -z "${fits#*$'\n'}" ] || echo "${fits#*$'\n'}"
    begun=$(mktemp) # what is older than this file was not written by this start
    # shellcheck disable=SC2086 # what fits are words
    srun --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_ON_NODE:-1}" --kill-on-bad-exit=1 \
        sbatches/on_node.sh "$NODES" "$HEAD" "$PORT" "$@" ${fits%%$'\n'*} &
    pid=$!
    wait "$pid" && status=0 || status=$? # more than 128 where a signal ended the waiting, not srun
    if [ "$INTERRUPTED" = 1 ]; then
        # srun passes it on to all processes; again and again, since one that is still starting does not hear it
        while kill -USR1 "$pid" 2>/dev/null; do sleep 10; done
        wait "$pid" && status=0 || status=$?
    fi
    if [ "$status" = 0 ]; then return 0; fi
    if [ "runs/$run/summary.json" -nt "$begun" ] && { [ "$(summary "$run" requeue)" = True ] ||
        { [ "$INTERRUPTED" = 1 ] && [ "$(summary "$run" state)" = running ]; }; }; then
        echo "== $(date '+%F %T') $run was interrupted and goes on from its last checkpoint: queued again"
        scontrol requeue "$JOB"
        sleep 60 # Slurm ends this shell
    fi
    reason=$(tac "$(scontrol show job "$JOB" | sed -n 's/^ *StdOut=//p')" 2>/dev/null | sed '/^== .* restart /q' |
        grep -m 1 '^error: ') || true
    echo "== $(date '+%F %T') $run FAILED (exit code $status): ${reason:-$(summary "$run" reason)}"
    return "$status"
}
