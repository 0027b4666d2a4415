#!/usr/bin/env bash
# Over-optimisation on the toy world, whose true reward is known: reward models of falling quality (fewer comparisons, wrong
# labels), and PPO, RLOO and best of n pushed far against each of them, without a penalty for the KL; then the judge, the
# figure and the fits of Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization" (make overoptimization).
#
#   eval/overoptimization.sh                                          all of it
#   PROXIES="500:0.3 16000:0" SEEDS=1 eval/overoptimization.sh        less of it; a proxy is PAIRS:SHARE OF WRONG LABELS
#
# Chains are those of hello_world.sh. One thread a run, JOBS at a time; finished runs are reused, stopped ones go on.
# Logs: logs/overoptimization/<run>.log
set -euo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-$(nproc)} ALGORITHMS=${ALGORITHMS:-ppo rloo best_of_n}
PROXIES=${PROXIES:-500:0 500:0.3 2000:0 2000:0.3 16000:0 16000:0.3}
export REPORT=0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p logs/overoptimization

logged() { # NAME COMMAND...: to its log; says how long it took
    local name=$1 start=$SECONDS
    shift
    if "$@" >>"logs/overoptimization/$name.log" 2>&1; then
        echo "$name: $((SECONDS - start)) s"
    else
        echo "$name: FAILED, see logs/overoptimization/$name.log" >&2
        return 1
    fi
}

proxy() { # SEED PAIRS SHARE: a reward model, from the same SFT policy
    local chain=toy_small_seed$1 name=proxy_$2_$3
    local data=data/${chain}_$name passes=$((2000 / $2 > 0 ? 4 : 1)) # 4 passes over the small sets
    logged "${chain}_$name" bash -euc "
        [ -e $data ] || '$PYTHON' eval/flip_labels.py --label_dataset data/$chain/comparisons --output_dir $data --pairs $2 --flipped $3 --seed $1
        '$PYTHON' summarize_from_feedback_details/reward.py --seed $1 --base_model models/$chain/base/small \
            --sft_model_path models/$chain/sft --label_dataset $data --query_dataset data/$chain/sft \
            --output_dir models/$chain/$name --run_name ${chain}_$name --lr 3e-3 --warm_up_steps 10 --eps 1e-8 \
            --weight_decay 0 --max_grad_norm 1 --precision fp32 --local_eval_batch_size 128 --print_sample_output_freq 0 \
            --num_normalization_rows 2048 --num_train_epochs $passes --batch_size 32 --local_micro_batch_size 32 \
            --no-eval_cnndm"
}

push() { # SEED PAIRS SHARE ALGORITHM
    local chain=toy_small_seed$1 name=proxy_$2_$3 script=$4
    local run=${chain}_${name}_$4
    local args=(--seed "$1" --base_model "models/$chain/base/small" --sft_model_path "models/$chain/sft"
        --reward_model_path "models/$chain/$name" --query_dataset "data/$chain/sft" --response_length 24
        --run_name "$run" --precision fp32)
    local training=(--weight_decay 0 --max_grad_norm 1 --batch_size 64 --local_micro_batch_size 64
        --output_dir "models/$chain/${name}_$4" --eval_temperature 0.7 --local_eval_batch_size 128 --scheduler constant)
    case $4 in # three times the learning rates of make algorithms, and more episodes
        ppo) script=ppo_left_padding training+=(--lr 3e-4 --total_episodes 6400 --eval_freq 10 --ppo.kl_coef 0
            --print_sample_output_freq 0) ;;
        rloo) training+=(--lr 1e-3 --total_episodes 12800 --eval_freq 10 --kl_coef 0) ;;
        best_of_n) training=(--best_of 64) ;;
    esac
    logged "$run" "$PYTHON" "summarize_from_feedback_details/$script.py" "${args[@]}" "${training[@]}"
}

chain() { SEED=$1 logged "chain_seed$1" ./hello_world.sh; }
export -f logged proxy push chain

START=$SECONDS FAILED=0 RUNS=()
printf '%s\n' $SEEDS | xargs -P "$JOBS" -L 1 bash -c 'chain "$@"' chain
proxies=$(for seed in $SEEDS; do for p in $PROXIES; do echo "$seed ${p%:*} ${p#*:}"; done; done)
xargs -P "$JOBS" -L 1 bash -c 'proxy "$@"' proxy <<<"$proxies" || FAILED=1
jobs=$(while read -r line; do for algorithm in $ALGORITHMS; do echo "$line $algorithm"; done; done <<<"$proxies")
xargs -P "$JOBS" -L 1 bash -c 'push "$@"' push <<<"$jobs" || FAILED=1
echo "trained in $(((SECONDS - START) / 60)) minutes"
while read -r seed pairs share algorithm; do RUNS+=("toy_small_seed${seed}_proxy_${pairs}_${share}_$algorithm"); done <<<"$jobs"
"$PYTHON" eval/judge.py --run "${RUNS[@]}" --judge gold --updates >logs/overoptimization/judge.log
"$PYTHON" eval/overoptimization.py --runs "${RUNS[@]}"
exit $FAILED
