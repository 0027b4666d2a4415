#!/usr/bin/env bash
# The scaling study: four sizes of the toy model on the harder toy world, seeds 1 to 3, each a chain of hello_world.sh; then
# the judge, the figures and the table (make scaling).
#
#   eval/scaling.sh                               all of it
#   SIZES="nano tiny" SEEDS=1 eval/scaling.sh     less of it
#   SWEEP=1 eval/scaling.sh                       learning rates beside each other: three of each, on seed 4
#
# Every chain is trained on one thread, JOBS of them at a time; finished stages are reused and one that was stopped goes on,
# so that the same command goes on after a stop. Logs: logs/scaling/<chain>.log
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
SWEEP=${SWEEP:-0} SIZES=${SIZES:-medium small tiny nano} JOBS=${JOBS:-$(nproc)} # the longest first
SEEDS=${SEEDS:-$([ "$SWEEP" = 1 ] && echo 4 || echo 1 2 3)}
export PYTHON HARD=1 REPORT=0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
mkdir -p logs/scaling

chain() { # SIZE SEED
    local name=hard_$1_seed$2 start=$SECONDS
    if SIZE=$1 SEED=$2 ./hello_world.sh >>"logs/scaling/$name.log" 2>&1; then
        echo "$name: $((SECONDS - start)) s"
    else
        echo "$name: FAILED, see logs/scaling/$name.log" >&2
        return 1
    fi
}
export -f chain

START=$SECONDS FAILED=0
CHAINS=$(for size in $SIZES; do for seed in $SEEDS; do echo "$size $seed"; done; done)
xargs -P "$JOBS" -L 1 bash -c 'chain "$@"' chain <<<"$CHAINS" || FAILED=1
echo "trained in $(((SECONDS - START) / 60)) minutes"

if [ "$SWEEP$FAILED" = 11 ]; then exit 1; fi # all of them are repeated
JUDGED=() RUNS=() # a run that failed before its first evaluation has nothing to judge
while read -r size seed; do
    for stage in sft reward ppo; do
        run=hard_${size}_seed${seed}_$stage
        if [ -d "runs/$run" ]; then RUNS+=("$run"); fi
        if [ $stage != reward ] && [ -f "runs/$run/tables/validation.parquet" ]; then JUDGED+=("$run"); fi
    done
done <<<"$CHAINS"
if [ "$SWEEP" = 1 ]; then
    "$PYTHON" eval/sweep.py --runs "${RUNS[@]}" --jobs "$JOBS" --judge gold --name scaling_sweep
    exit $FAILED
fi
"$PYTHON" eval/judge.py --run "${JUDGED[@]}" --judge gold --updates
"$PYTHON" eval/sft_rm_scale.py --runs "${RUNS[@]}"
"$PYTHON" eval/rlhf_scaling_plot.py --runs "${JUDGED[@]}"
"$PYTHON" eval/scaling_table.py # also in docs/results.md
exit $FAILED
