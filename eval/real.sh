#!/usr/bin/env bash
# Real posts and a small pretrained model, on a CPU: SFT, a reward model on three seeds, PPO; all weights, then adapters.
# Judged by the reward model that PPO was trained with, and by one of another seed, which PPO never saw (make real).
#
#   make real POSTS=my/posts COMPARISONS=my/comparisons     folders of raw rows
#   make real ROWS=2000 MODEL=HuggingFaceTB/SmolLM2-135M    the hub's rows, cut to so many; another model
#   make real LORAS=1 PPO_EPISODES=160 ...                  adapters alone; less of PPO
#   SWEEP=1 make real ...                                   learning rates beside each other: three of each, of all
#                                                           weights; the last hundred training rows are held out
#
# Chains are those of hello_world.sh. A finished stage is reused, and one that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
refuse() { echo "error: $1: found $2; expected $3" >&2; exit 2; }
SWEEP=${SWEEP:-0}
[[ $SWEEP =~ ^[01]$ ]] || refuse SWEEP "'$SWEEP'" "0 or 1"
LORAS=${LORAS:-$([ "$SWEEP" = 1 ] && echo 0 || echo 0 1)}
[ -n "${ROWS:-}" ] || { [ -n "${POSTS:-}" ] && [ -n "${COMPARISONS:-}" ]; } ||
    refuse "POSTS and COMPARISONS" "'${POSTS:-}' and '${COMPARISONS:-}'" "folders of raw rows, or ROWS=2000: the hub's"
for lora in $LORAS; do [[ $lora =~ ^[01]$ ]] || refuse LORAS "'$LORAS'" "0, 1 or both"; done
[[ ${SEED:-1} =~ ^[1-9][0-9]*$ ]] || refuse SEED "'$SEED'" "a number above 0"
if [ -z "${MODEL:-}" ]; then
    export MODEL=models/smollm2-135m
    "$PYTHON" eval/get_smollm2.py --output_dir "$MODEL"
fi
export SEED=${SEED:-$([ "$SWEEP" = 1 ] && echo 4 || echo 1)} # which the chains are named by
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} # one GPU at most
unset LORA_RANK # it would change the chains' names
export REPORT=0 ROWS=${ROWS:-700} MICRO=${MICRO:-4} PPO_MICRO=${PPO_MICRO:-4} ROLLOUT=${ROLLOUT:-16}
export PPO_EPISODES=${PPO_EPISODES:-$([ "$SWEEP" = 1 ] && echo 128 || echo 192)} POSTS=${POSTS:-} COMPARISONS=${COMPARISONS:-}

if [ "$SWEEP" = 1 ]; then # validation and test rows are not looked at: others take their place
    for name in POSTS COMPARISONS; do
        rows=${!name}/train.jsonl
        [ -f "$rows" ] || refuse "$name" "'${!name}' with SWEEP=1" "a folder with train.jsonl"
        [ "$(wc -l <"$rows")" -ge 200 ] || refuse "$name" "'${!name}' with SWEEP=1" "200 training rows or more"
        held_out=data/real_sweep_$(cksum <"$rows" | cut -d " " -f 1)/${name,,}
        mkdir -p "$held_out"
        head -n -100 "$rows" >"$held_out/train.jsonl"
        for split in validation test; do tail -n 100 "$rows" >"$held_out/$split.jsonl"; done
        export "$name=$held_out"
    done
fi

CHAINS=()
for lora in $LORAS; do
    LORA=$lora ./hello_world.sh
    chain=$(basename "$MODEL")_seed$SEED$([ "$lora" = 0 ] || echo _lora)_rows$ROWS
    CHAINS+=("$chain")
    models=models/$chain
    if [ "$SWEEP" = 1 ]; then
        "$PYTHON" eval/sweep.py --runs "${chain}_sft" "${chain}_reward" "${chain}_ppo" \
            --name "real_sweep$([ "$lora" = 0 ] || echo _lora)"
        continue
    fi
    "$PYTHON" eval/sweep.py --runs "${chain}_reward" --argument seed --values $((SEED + 1)) $((SEED + 2)) \
        --output_dir "eval/reports/$chain"
    for judge in reward "reward_seed$((SEED + 1))"; do
        "$PYTHON" eval/judge.py --judge reward --reward_model "$models/$judge" --run "${chain}_sft" "${chain}_ppo"
    done
    "$PYTHON" visualize_tokens.py --models "sft=$models/sft" "ppo=$models/ppo" --base_model "$MODEL" \
        --ref_model "$models/sft" --reward_model "$models/reward" --query_dataset "data/$chain/sft" --num 20 \
        --html "eval/reports/$chain/tokens.html"
done
[ "$SWEEP" = 1 ] || "$PYTHON" eval/real_report.py --chains "${CHAINS[@]}"
