#!/usr/bin/env bash
# Submit the chain SFT -> reward model -> PPO -> judge and figures, one array a stage, an element for each model and seed.
# Element i of a stage starts when element i of the stage before has succeeded; one that fails ends its own chain only.
#
#   sbatches/launch.sh                                   3 models x 4 seeds (sbatches/common.sh)
#   sbatches/launch.sh --dry-run                         print the commands, submit nothing
#   sbatches/launch.sh --models EleutherAI/pythia-1b-deduped --seeds "44413 55513"
#   sbatches/launch.sh --stages "reward ppo_left_padding"    the stages before must be finished
#   sbatches/launch.sh --stages "sft reward rloo eval"    RLOO (or grpo, dpo, online_dpo, best_of_n) in the place of PPO
#   sbatches/launch.sh --nodes 2                         two nodes for each element
#   sbatches/launch.sh --prefetch                        fill the hub's cache here, for compute nodes without a network
#   sbatches/launch.sh -- --time=24:00:00 --partition=gpu    further arguments of sbatch
#
# Launched again, finished elements end at once and interrupted ones go on.
set -euo pipefail
cd "$(dirname "$0")/.."
refuse() { echo "error: $1: found $2; expected $3" >&2; exit 2; }

SLURM_JOB_ID="" source sbatches/common.sh # this is no job, also where the shell is one's (salloc)
STAGES="sft reward ppo_left_padding eval" NODES=1 DRY=0 PREFETCH=0
while [ $# -gt 0 ]; do
    case $1 in
    --models | --seeds | --stages | --nodes)
        [ $# -gt 1 ] || refuse "$1" nothing "a value"
        case $1 in --models) MODELS=$2 ;; --seeds) SEEDS=$2 ;; --stages) STAGES=$2 ;; --nodes) NODES=$2 ;; esac
        shift 2
        ;;
    --dry-run) DRY=1 && shift ;;
    --prefetch) PREFETCH=1 && shift ;;
    -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0" && exit 0 ;;
    --) shift && break ;;
    *) refuse "$1" "an argument that launch.sh does not have" "--help, or sbatch's arguments after --" ;;
    esac
done
read -ra models <<<"$MODELS"
read -ra seeds <<<"$SEEDS"
read -ra stages <<<"$STAGES"
[ ${#models[@]} -gt 0 ] || refuse --models nothing "hub ids or folders"
[ ${#seeds[@]} -gt 0 ] || refuse --seeds nothing "numbers"
[ ${#stages[@]} -gt 0 ] || refuse --stages nothing "some of: ${STAGE_ORDER[*]}"
for seed in "${seeds[@]}"; do [[ $seed =~ ^[0-9]+$ ]] || refuse --seeds "'$seed'" "numbers"; done
[[ $NODES =~ ^[1-9][0-9]*$ ]] || refuse --nodes "'$NODES'" "a number above 0"
[[ $GPU_GB =~ ^[1-9][0-9]*$ ]] || refuse GPU_GB "'$GPU_GB'" "a number above 0"
names=$(for model in "${models[@]}"; do basename "$model"; done | sort | uniq -d)
[ -z "$names" ] || refuse --models "two that end in '$names'" "different last parts: runs are named after them"
for model in "${models[@]}"; do
    [ -e "$model" ] || [[ $model =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]] && [ ! -f "$model" ] ||
        refuse --models "'$model', which is neither a folder nor a hub id" "hub ids or folders"
done
last=-1
for stage in "${stages[@]}"; do
    place=-1
    for i in "${!STAGE_ORDER[@]}"; do [ "${STAGE_ORDER[i]}" != "$stage" ] || place=$i; done
    [ "$place" -gt "$last" ] || refuse --stages "'$STAGES'" "some of, in this order: ${STAGE_ORDER[*]}"
    last=$place
done
# what a stage reads is made by a stage before it, or is there
declare -A NEEDS=([sft]="" [reward]="sft" [ppo_left_padding]="sft reward" [rloo]="sft reward" [grpo]="sft reward"
    [dpo]="sft" [online_dpo]="sft reward" [best_of_n]="sft reward" [eval]="")
for stage in "${stages[@]}"; do
    for need in ${NEEDS[$stage]}; do
        if [[ " ${stages[*]} " == *" $need "* ]]; then continue; fi
        for model in "${models[@]}"; do
            for seed in "${seeds[@]}"; do
                folder=models/$(name_of "$model" "$seed")/$need
                [ -e "$folder/config.json" ] || refuse --stages "'$STAGES', and no $folder" "a finished $need, or --stages with it"
            done
        done
    done
done
processes=$((NODES * PROCESSES_PER_NODE))
for model in "${models[@]}"; do
    read -r micro ppo_micro _ <<<"$(rows_of "$model")"
    for stage in "${stages[@]}"; do
        case $stage in
            sft | reward | dpo) rows_here=$micro ;;
            eval | best_of_n) continue ;; # which have no batch
            online_dpo) rows_here=$(even "$ppo_micro") ;;
            *) rows_here=$ppo_micro ;;
        esac
        [ $((BATCH_OF[$stage] % (rows_here * processes))) = 0 ] ||
            refuse --nodes "$NODES, that is $processes processes x $rows_here rows for $stage of $model" \
                "a number of rows that divides its batch of ${BATCH_OF[$stage]}"
    done
done
[ $DRY = 1 ] || command -v sbatch >/dev/null || refuse sbatch "no such command here" "a login node of a Slurm cluster, or --dry-run"

for model in "${models[@]}"; do
    for stage in "${stages[@]}"; do
        case $stage in eval | best_of_n) continue ;; esac
        fits=$(fit "$stage" "$model" "$NODES") || exit 2
        [ -z "${fits#*$'\n'}" ] || echo "${fits#*$'\n'}"
    done
done

if [ $PREFETCH = 1 ]; then
    hub=()
    for model in "${models[@]}"; do [ -d "$model" ] || hub+=("$model"); done
    datasets=$("$PYTHON" -c 'from summarize_from_feedback_details.reward import Args
print(Args.query_dataset, Args.label_dataset)') || refuse --prefetch "no working installation behind '$PYTHON'" "PYTHON=..."
    for dataset in $datasets; do hub+=("dataset:$dataset"); done
    for what in "${hub[@]}"; do
        if [ $DRY = 1 ]; then echo "prefetch $what"; continue; fi
        HF_HUB_OFFLINE=0 "$PYTHON" - "$what" <<'PY'
import sys

import datasets
from huggingface_hub import snapshot_download

name = sys.argv[1]
if name.startswith("dataset:"):
    datasets.load_dataset(name.removeprefix("dataset:"))
else:
    snapshot_download(name, ignore_patterns=["*.bin", "*.h5", "*.msgpack"])
print("fetched", name)
PY
    done
fi

export MODELS SEEDS
elements=$((${#models[@]} * ${#seeds[@]})) before="" jobs=()
[ $DRY = 1 ] || mkdir -p slurm/logs
submit() { # STAGE ARGUMENTS...: prints the job's id
    local stage=$1
    shift
    if [ $DRY = 1 ]; then
        echo "sbatch --parsable $* sbatches/$stage.sbatch" >&2
        echo "<$stage>"
    else
        sbatch --parsable "$@" "sbatches/$stage.sbatch"
    fi
}
[ $DRY = 0 ] || printf 'MODELS="%s" SEEDS="%s"\n' "$MODELS" "$SEEDS"
for stage in "${stages[@]}"; do
    args=()
    if [ "$stage" = eval ]; then
        [ -z "$before" ] || args+=(--dependency="afterany:$before")
    else
        args+=(--array="0-$((elements - 1))" --nodes="$NODES")
        [ -z "$before" ] || args+=(--dependency="aftercorr:$before" --kill-on-invalid-dep=yes)
    fi
    before=$(submit "$stage" "${args[@]}" "$@")
    before=${before%%;*}
    jobs+=("$before")
    echo "$stage: job $before$([ "$stage" = eval ] || echo ", $elements elements")"
done
cat <<TEXT
watch:   squeue -j $(IFS=,; echo "${jobs[*]}")       tail -f slurm/logs/*.out       runs/*/metrics.jsonl
cancel:  scancel ${jobs[*]}       (an element that trains saves a checkpoint first)
resume:  the same command again: finished elements end at once, interrupted ones go on
requeue: scontrol requeue JOB_ELEMENT       (stop one, save, and queue it again)
TEXT
