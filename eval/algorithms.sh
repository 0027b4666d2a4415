#!/usr/bin/env bash
# Alternatives to PPO on the toy world: each algorithm from the same SFT policy and reward model, seeds 1 to 3; then the
# judge, one table and one figure, gold score against the square root of the KL (make algorithms).
#
#   eval/algorithms.sh                                   all of it
#   ALGORITHMS="rloo dpo" SEEDS=1 eval/algorithms.sh     less of it
#   SWEEP=1 eval/algorithms.sh                           what the learning rates were chosen by: three of each, on seed 4
#
# Chains are those of hello_world.sh. Every run has one thread, JOBS of them at a time; a finished one is reused and one
# that was stopped goes on, so that the same command goes on after a stop. Logs: logs/algorithms/<run>.log
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SWEEP=${SWEEP:-0}
SEEDS=${SEEDS:-$([ "$SWEEP" = 1 ] && echo 4 || echo 1 2 3)} JOBS=${JOBS:-$(nproc)}
ALGORITHMS=${ALGORITHMS:-ppo rloo grpo online_dpo dpo $([ "$SWEEP" = 1 ] || echo best_of_n)}
export REPORT=0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p logs/algorithms

rates_of() { # ALGORITHM: the learning rates of the sweep, the chosen one first
    case $1 in
        ppo) echo 1e-4 3e-4 1e-3 ;;
        rloo | grpo | online_dpo) echo 3e-4 1e-4 1e-3 ;;
        dpo) echo 1e-4 3e-5 3e-4 ;;
        best_of_n) echo - ;;
    esac
}

chain() { # SEED: SFT policy and reward model
    SEED=$1 ./hello_world.sh >>"logs/algorithms/chain_seed$1.log" 2>&1 && echo "chain of seed $1: ready" ||
        { echo "chain of seed $1: FAILED, see logs/algorithms/chain_seed$1.log" >&2; return 1; }
}

train() { # SEED ALGORITHM RATE NAME
    local chain=toy_small_seed$1 script=$2 start=$SECONDS
    local data=data/$chain models=models/$chain run=toy_small_seed$1_$4
    # the figure's two axes are of the same samples: at the temperature of training, not nearly greedy
    local args=(--seed "$1" --base_model "$models/base/small" --sft_model_path "$models/sft" --response_length 24
        --reward_model_path "$models/reward" --query_dataset "$data/sft" --run_name "$run" --precision fp32)
    local training=(--lr "$3" --weight_decay 0 --max_grad_norm 1 --batch_size 64 --local_micro_batch_size 64
        --output_dir "$models/$4" --eval_temperature 0.7 --local_eval_batch_size 128)
    case $2 in
        ppo) script=ppo_left_padding training+=(--total_episodes 3200 --eval_freq 5 --print_sample_output_freq 0) ;;
        rloo | grpo | online_dpo) training+=(--total_episodes 3200 --eval_freq 5) ;;
        dpo) training+=(--label_dataset "$data/comparisons" --eval_freq 25 --no-eval_cnndm) ;;
        best_of_n) training=(--best_of 64) ;;
    esac
    if "$PYTHON" "summarize_from_feedback_details/$script.py" "${args[@]}" "${training[@]}" \
        >>"logs/algorithms/$run.log" 2>&1; then
        echo "$run: $((SECONDS - start)) s"
    else
        echo "$run: FAILED, see logs/algorithms/$run.log" >&2
        return 1
    fi
}
export -f chain train

START=$SECONDS FAILED=0 RUNS=()
printf '%s\n' $SEEDS | xargs -P "$JOBS" -L 1 bash -c 'chain "$@"' chain
jobs=$(for seed in $SEEDS; do
    for algorithm in $ALGORITHMS; do
        read -ra rates <<<"$(rates_of "$algorithm")"
        [ "$SWEEP" = 1 ] || rates=("${rates[0]}")
        for rate in "${rates[@]}"; do
            echo "$seed $algorithm $rate $([ "$SWEEP" = 1 ] && echo "${algorithm}_lr$rate" || echo "alternatives_$algorithm")"
        done
    done
done)
xargs -P "$JOBS" -L 1 bash -c 'train "$@"' train <<<"$jobs" || FAILED=1
echo "trained in $(((SECONDS - START) / 60)) minutes"
while read -r seed _ _ name; do RUNS+=("toy_small_seed${seed}_$name"); done <<<"$jobs"
"$PYTHON" eval/judge.py --run "${RUNS[@]}" --judge gold --updates >logs/algorithms/judge.log
NAME=algorithms
[ "$SWEEP" = 0 ] || NAME=algorithms_sweep
"$PYTHON" eval/algorithms.py --runs "${RUNS[@]}" --name "$NAME"
exit $FAILED
