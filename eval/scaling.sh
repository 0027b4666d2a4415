#!/usr/bin/env bash
# The scaling study on the toy world: 3 sizes x 3 seeds, and PPO with four KL coefficients at one size; then the judge and
# the figures of all of it.
#
#   eval/scaling.sh                            all of it (make scaling)
#   SIZES="tiny small" SEEDS=1 eval/scaling.sh    less of it
#   PPO_EPISODES=1600 eval/scaling.sh          another length of the main PPO runs (default: that of hello_world.sh, whose
#                                              runs these are)
#
# Every cell is a chain of hello_world.sh, trained on one thread, JOBS of them at a time; a finished one is reused, so that
# the same command goes on after a stop. Logs: logs/scaling/<cell>.log
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SIZES=${SIZES:-small tiny medium} SEEDS=${SEEDS:-1 2 3} JOBS=${JOBS:-$(nproc)}
KL_SIZE=${KL_SIZE:-small} KL_SEEDS=${KL_SEEDS:-1} KL_COEFS=${KL_COEFS:-0 0.02 0.05 0.2} KL_EPISODES=${KL_EPISODES:-4800}
export PYTHON REPORT=0 OMP_NUM_THREADS=1
mkdir -p logs/scaling

run_cell() { # cells are written as SIZE SEED [KL_COEF EPISODES]
    local name=$1_seed$2${3:+_kl$3} start=$SECONDS
    if SIZE=$1 SEED=$2 KL_COEF=${3:-} PPO_EPISODES=${4:-${PPO_EPISODES:-}} ./hello_world.sh >>"logs/scaling/$name.log" 2>&1; then
        echo "$name: $((SECONDS - start)) s"
    else
        echo "$name: FAILED, see logs/scaling/$name.log" >&2
        return 1
    fi
}
export -f run_cell

START=$SECONDS FAILED=0
for size in $SIZES; do for seed in $SEEDS; do echo "$size $seed"; done; done |
    xargs -P "$JOBS" -L 1 bash -c 'run_cell "$@"' cell || FAILED=1
for seed in $KL_SEEDS; do for kl in $KL_COEFS; do echo "$KL_SIZE $seed $kl $KL_EPISODES"; done; done |
    xargs -P "$JOBS" -L 1 bash -c 'run_cell "$@"' cell || FAILED=1
echo "trained in $(((SECONDS - START) / 60)) minutes"

MAIN=() SWEEP=() REWARD=() # what was trained; a cell that failed before its first evaluation has nothing to judge
judged() { [ -f "runs/$1/tables/validation.parquet" ] && echo "$1" || echo "not judged: $1" >&2; }
for size in $SIZES; do
    for seed in $SEEDS; do
        REWARD+=("toy_${size}_seed${seed}_reward")
        for stage in sft ppo; do MAIN+=($(judged "toy_${size}_seed${seed}_$stage")); done
    done
done
for seed in $KL_SEEDS; do
    for kl in $KL_COEFS; do SWEEP+=($(judged "toy_${KL_SIZE}_seed${seed}_kl${kl}_ppo")); done
done
"$PYTHON" eval/judge.py --run "${MAIN[@]}" --judge gold --updates
"$PYTHON" eval/judge.py --run "${SWEEP[@]}" --judge gold --updates
# the sweep has figures of its own: its runs are longer, and must not be averaged with the others
"$PYTHON" eval/sft_rm_scale.py --runs "${MAIN[@]}" "${REWARD[@]}"
"$PYTHON" eval/rlhf_scaling_plot.py --runs "${MAIN[@]}"
"$PYTHON" eval/rlhf_scaling_plot.py --runs "${SWEEP[@]}" --output_dir eval/images/kl_sweep
"$PYTHON" eval/scaling_table.py # of the main runs, also in docs/results.md
exit $FAILED
