#!/usr/bin/env bash
# The whole pipeline: dataset -> SFT -> reward model -> PPO -> judge -> figures -> a page of summaries, token by token.
#
#   ./hello_world.sh                                         the toy world, on what this machine has (three minutes on 2 fast cores)
#   SEED=2 ./hello_world.sh                                  another seed
#   SMOKE=1 ./hello_world.sh                                 all stages in about a minute, learning nothing
#   FRESH=1 ./hello_world.sh                                 do not reuse finished stages
#   SIZE=medium ./hello_world.sh                             another size of the toy model: nano, tiny, small, medium, large
#   HARD=1 SIZE=medium ./hello_world.sh                      a harder toy world, where the model's size matters
#   KL_COEF=0.2 PPO_EPISODES=4800 ./hello_world.sh           another PPO run beside the first one
#   PRECISION=bf16 ./hello_world.sh                         the toy stages in bf16 (default: fp32), beside those in fp32;
#                                                            with MODEL the default is auto: bf16 where it is native
#   LORA=1 ./hello_world.sh                                  adapters on one trunk (docs/lora.md): the toy world's reward model
#                                                            and PPO; with MODEL all three stages (LORA_RANK=8: of that rank)
#   REPORT=0 ./hello_world.sh                                train only: no judge, figures, page
#   MODEL=EleutherAI/pythia-1b-deduped ./hello_world.sh      the real thing: real data, the paper's batch sizes
#   MODEL=HuggingFaceTB/SmolLM2-135M ROWS=2000 ./hello_world.sh   real data cut to so many posts and comparisons, tokenised for
#                                                            the model, with batches and learning rates for so few
#   POSTS=my/posts COMPARISONS=my/comparisons ROWS=2000 MODEL=... ./hello_world.sh    the same from folders of raw rows
#   MICRO=4 PPO_MICRO=8 ROLLOUT=32 MODEL=... ./hello_world.sh    rows of one forward pass on one GPU: SFT and reward
#                                                            model, PPO training, sampling (PPO, SFT's evaluation)
#   GPU_GB=40 MODEL=... ./hello_world.sh                     memory that may be used of each GPU (default: what it has)
#
# A finished stage with the same arguments is reused, and one that was interrupted goes on; changed arguments start that
# stage and those that depend on it again. What was there before is set aside (*.old-1, *.old-2, ...), never deleted.
set -euo pipefail
cd "$(dirname "$0")"

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MODEL=${MODEL:-toy} SMOKE=${SMOKE:-0} FRESH=${FRESH:-0} REPORT=${REPORT:-1} LORA=${LORA:-0} HARD=${HARD:-0}
PRECISION=${PRECISION:-$([ "$MODEL" = toy ] && echo fp32 || echo auto)}
STAGES=summarize_from_feedback_details
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}

refuse() { echo "error: $1: found $2; expected $3" >&2; exit 2; }
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }
is_batch() { is_count "$1" && [ "$1" -ge 64 ]; } # of PPO's episodes
is_count "${GPU_GB:-80}" || refuse GPU_GB "'$GPU_GB'" "a number above 0"
[[ $PRECISION =~ ^(fp32|bf16|auto)$ ]] || refuse PRECISION "'$PRECISION'" "fp32, bf16 or auto"
LORA_RANK=${LORA_RANK:-}
[ -z "$LORA_RANK" ] || { is_count "$LORA_RANK" && [ "$LORA" = 1 ]; } ||
    refuse LORA_RANK "'$LORA_RANK'" "a number above 0, with LORA=1"
LORA_NAME=_lora${LORA_RANK:+_rank$LORA_RANK} LORA_ARGS=(--lora ${LORA_RANK:+--lora.rank "$LORA_RANK"})
for flag in SMOKE FRESH REPORT LORA HARD; do [[ ${!flag} =~ ^[01]$ ]] || refuse "$flag" "'${!flag}'" "0 or 1"; done

# ----------------------------------------------------------------------------------------------------------- machine
FOUND=$("$PYTHON" -c 'import torch
from summarize_from_feedback_details.common.arguments import refuse_left_over
from summarize_from_feedback_details.common.machine import on_gpu
refuse_left_over(several=False) # as the first stage would
gpus = range(torch.cuda.device_count() if on_gpu() else 0)
sizes = [torch.cuda.get_device_properties(i).total_memory for i in gpus]
print(len(sizes), int(min(sizes, default=80e9) / 1e9))')
read -r GPUS FOUND_GB <<<"$FOUND"
GPU_GB=${GPU_GB:-$FOUND_GB}
if [ "$GPUS" -gt 1 ]; then
    LAUNCH=("$PYTHON" -m accelerate.commands.launch --config_file deepspeed.yaml --num_processes "$GPUS")
    DEEPSPEED=(--deepspeed)
else
    LAUNCH=("$PYTHON") DEEPSPEED=()
    [ "$GPUS" -gt 0 ] || export ACCELERATE_USE_CPU=true # accelerate knows further devices
fi
PROCESSES=$((GPUS > 1 ? GPUS : 1))

# ------------------------------------------------------------------------------------------------------------- stages
set_aside() { # move a path to a new name beside it
    local n=1
    [ -e "$1" ] || return 0
    while [ -e "$1.old-$n" ]; do n=$((n + 1)); done
    mv "$1" "$1.old-$n"
    echo "   $1 was there: now $1.old-$n"
}

# stage NAME "OUTPUT ..." "STAGE IT DEPENDS ON ..." COMMAND...: run a stage unless its outputs are there, made by the same
# command from the same inputs
stage() {
    local name=$1 outputs=$2 inputs=$3 stamp=.hello/$CHAIN/$1 begun=.hello/$CHAIN/$1.begun wanted output input complete=1
    shift 3
    wanted="$*"
    for input in $inputs; do wanted+=" $(cksum <".hello/$CHAIN/$input")"; done
    for output in $outputs; do [ -e "$output" ] || complete=0; done
    if [ $complete = 1 ] && [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$wanted" ] && [ "$FRESH" = 0 ]; then
        echo "== $name: reused"
        return
    fi
    mkdir -p "$(dirname "$stamp")"
    if [ "$FRESH" = 0 ] && [ ! -e "$stamp" ] && [[ $outputs == runs/* && -e $begun ]] && [ "$(cat "$begun")" = "$wanted" ]; then
        echo "== $name: was interrupted, goes on"
    else
        local why="its arguments or inputs changed"
        [ "$FRESH" = 0 ] || why="FRESH=1"
        if [ ! -e "$stamp" ]; then echo "== $name"; else echo "== $name: again, since $why"; fi
        for output in $outputs; do set_aside "$output"; done
        echo "$wanted" >"$begun"
    fi
    rm -f "$stamp"
    local start=$SECONDS
    "$@"
    printf '%s\n%s\n' "$wanted" "$(date +%s.%N)" >"$stamp"
    rm -f "$begun"
    echo "== $name: $((SECONDS - start)) s"
}

if [ "$MODEL" = toy ]; then
    # ----------------------------------------------------------------------------------------------------- toy world
    for name in ROWS POSTS COMPARISONS; do # of real data
        [ -z "${!name:-}" ] || refuse "$name" "'${!name}' without MODEL" "MODEL as well: a model that reads real posts"
    done
    SEED=${SEED:-1}
    is_count "$SEED" || refuse SEED "'$SEED'" "a number above 0"
    SIZE=${SIZE:-small}
    # learning rates of SFT, the reward model (none: SFT's) and PPO: they fall with the width of the model
    case $SIZE in
        nano | tiny | small) RATES=(3e-3 "" 3e-4) ;;
        medium) RATES=(6e-4 "" 1e-4) ;;
        large) RATES=(3e-3 "" 7e-5) ;;
        *) refuse SIZE "'$SIZE'" "nano, tiny, small, medium or large" ;;
    esac
    CHAIN=toy_${SIZE}_seed$SEED LENGTHS=(56 80 128 160) # tokens: query, with a response; of CNN/DM
    EPISODES=(19200 16000 3200) EVAL=() # rows of SFT, pairs of the reward model, episodes of PPO
    WORLD=(--n_sft 16000 --n_comparisons 16000)
    if [ "$HARD" = 1 ]; then
        CHAIN=hard_${SIZE}_seed$SEED LENGTHS=(104 128 160 192) WORLD[3]=32000 WORLD+=(--world hard)
        case $SIZE in # about 0.09 / width, PPO a thirtieth of it (SWEEP=1 make scaling compares them)
            nano) RATES=(6e-3 6e-3 2e-4) ;;
            tiny) RATES=(2e-3 2e-3 6e-5) ;;
            small) RATES=(1e-3 1e-3 3e-5) ;;
            medium) RATES=(6e-4 6e-4 2e-5) ;;
            large) refuse SIZE "'large' with HARD=1" "nano, tiny, small or medium" ;;
        esac
        EPISODES=(19200 32000 3200)
    fi
    if [ "$SMOKE" = 1 ]; then
        CHAIN=smoke$([ "$HARD" = 0 ] || echo _hard)_seed$SEED
        WORLD+=(--n_sft 600 --n_sft_validation 32 --n_comparisons 400 --n_comparisons_validation 40 --n_cnndm 10)
        EPISODES=(640 320 128) EVAL=(--num_eval_rows 32)
    fi
    [ "$PRECISION" = fp32 ] || CHAIN=${CHAIN}_$PRECISION
    ADAPTERS=()
    if [ "$LORA" = 1 ]; then # its base model is random: SFT, which trains the trunk, stays whole
        CHAIN=$CHAIN$LORA_NAME ADAPTERS=("${LORA_ARGS[@]}") RATES[2]=1e-3
    fi
    PPO_EPISODES=${PPO_EPISODES:-${EPISODES[2]}}
    is_batch "$PPO_EPISODES" || refuse PPO_EPISODES "'$PPO_EPISODES'" "a number of at least 64"
    [[ ${KL_COEF:-0} =~ ^[0-9]*\.?[0-9]+$ ]] || refuse KL_COEF "'$KL_COEF'" "a number of at least 0"
    PPO=ppo
    [ -z "${KL_COEF:-}" ] || PPO=kl${KL_COEF}_ppo
    BASE=models/$CHAIN/base/$SIZE DATA=data/$CHAIN RAW=data/${CHAIN}_raw
    BATCH=32 PPO_BATCH=64 RESPONSE=24 # tokens of a summary
    for batch in $BATCH $PPO_BATCH; do
        [ $((batch % PROCESSES)) = 0 ] || refuse "number of GPUs" "$PROCESSES" "a divisor of the batch size $batch"
    done
    TOY=(--lr "${RATES[0]}" --warm_up_steps 20 --eps 1e-8 --weight_decay 0 --max_grad_norm 1 --precision "$PRECISION"
        --local_eval_batch_size 128 --print_sample_output_freq 0)

    if [ "$SIZE$HARD" = small0 ] && [ "$PPO_EPISODES" = "${EPISODES[2]}" ]; then
        "$PYTHON" eval/speed_probe.py --smoke "$SMOKE"
    fi
    stage world "$RAW models/$CHAIN/base" "" "$PYTHON" $STAGES/toy_tldr.py --seed "$SEED" --sizes "$SIZE" \
        --data_dir "$RAW" --models_dir "models/$CHAIN/base" "${WORLD[@]}"
    stage dataset "$DATA" "world" "$PYTHON" $STAGES/tldr_dataset.py --base_model "$BASE" --sft_dataset "$RAW/sft" \
        --preference_dataset "$RAW/comparisons" --output_dir "$DATA" --visuals_dir "dataset_visuals/$CHAIN" --overwrite \
        --tldr_params.length "${LENGTHS[0]}" --tldr_params.max_sft_response_length "$RESPONSE" \
        --tldr_params.max_sft_query_response_length "${LENGTHS[1]}" --tldr_params.max_rm_response_length 32 \
        --tldr_params.max_rm_query_response_length "${LENGTHS[1]}" --cnndm_params.length "${LENGTHS[2]}" \
        --cnndm_params.max_rm_response_length 32 --cnndm_params.max_rm_query_response_length "${LENGTHS[3]}" \
        --no-check_length_correctness
    stage sft "runs/${CHAIN}_sft models/$CHAIN/sft" "dataset" "${LAUNCH[@]}" $STAGES/sft.py "${DEEPSPEED[@]}" \
        --seed "$SEED" --base_model "$BASE" --query_dataset "$DATA/sft" --output_dir "models/$CHAIN/sft" \
        --run_name "${CHAIN}_sft" "${TOY[@]}" "${EVAL[@]}" --query_loss_weight 0 --response_length "$RESPONSE" \
        --num_train_epochs 2 --total_episodes "${EPISODES[0]}" --batch_size $BATCH \
        --local_micro_batch_size $((BATCH / PROCESSES))
    stage reward "runs/${CHAIN}_reward models/$CHAIN/reward" "dataset sft" "${LAUNCH[@]}" $STAGES/reward.py \
        "${DEEPSPEED[@]}" --seed "$SEED" --base_model "$BASE" --sft_model_path "models/$CHAIN/sft" \
        --label_dataset "$DATA/comparisons" --query_dataset "$DATA/sft" --output_dir "models/$CHAIN/reward" \
        --run_name "${CHAIN}_reward" "${TOY[@]}" "${EVAL[@]}" "${ADAPTERS[@]}" --num_normalization_rows 2048 \
        --total_episodes "${EPISODES[1]}" --batch_size $BATCH --local_micro_batch_size $((BATCH / PROCESSES)) \
        ${RATES[1]:+--lr ${RATES[1]}}
    stage "$PPO" "runs/${CHAIN}_$PPO models/$CHAIN/$PPO models/$CHAIN/${PPO}_value" "dataset sft reward" \
        "${LAUNCH[@]}" $STAGES/ppo_left_padding.py \
        "${DEEPSPEED[@]}" --seed "$SEED" --base_model "$BASE" --sft_model_path "models/$CHAIN/sft" \
        --reward_model_path "models/$CHAIN/reward" --query_dataset "$DATA/sft" --output_dir "models/$CHAIN/$PPO" \
        --value_output_dir "models/$CHAIN/${PPO}_value" --run_name "${CHAIN}_$PPO" "${TOY[@]}" "${EVAL[@]}" \
        "${ADAPTERS[@]}" --lr "${RATES[2]}" --eps 1e-5 --warm_up_steps 0 --response_length "$RESPONSE" \
        --total_episodes "$PPO_EPISODES" \
        --batch_size $PPO_BATCH --local_micro_batch_size $((PPO_BATCH / PROCESSES)) --eval_freq 10 \
        --ppo.kl_coef "${KL_COEF:-0.05}"
    [ "$REPORT" = 1 ] || exit 0
    NAME=$CHAIN$([ "$PPO" = ppo ] || echo "_$PPO")
    REPORTS=eval/reports/$NAME
    "$PYTHON" eval/judge.py --run "${CHAIN}_sft" "${CHAIN}_$PPO" --judge gold --updates
    "$PYTHON" eval/judge.py --run "${CHAIN}_$PPO" --against "${CHAIN}_sft" --judge gold --paired_difference
    "$PYTHON" eval/sft_rm_scale.py --runs "${CHAIN}_*" --output_dir "$REPORTS"
    "$PYTHON" eval/rlhf_scaling_plot.py --runs "${CHAIN}_sft" "${CHAIN}_$PPO" --output_dir "$REPORTS"
    "$PYTHON" visualize_tokens.py --models "sft=models/$CHAIN/sft" "ppo=models/$CHAIN/$PPO" \
        --base_model "models/$CHAIN/sft" --ref_model "models/$CHAIN/sft" --reward_model "models/$CHAIN/reward" \
        --value_model "models/$CHAIN/${PPO}_value" --query_dataset "$DATA/sft" --response_length "$RESPONSE" --num 20 \
        --kl_coef "${KL_COEF:-0.05}" --html "$REPORTS/tokens.html"
    "$PYTHON" eval/hello_report.py --chains "$CHAIN" --ppo "$PPO" --name "$NAME" --raw_dirs "$RAW"
else
    # ------------------------------------------------------------------------------------------------- the real thing
    ROWS=${ROWS:-} POSTS=${POSTS:-} COMPARISONS=${COMPARISONS:-}
    [ -z "$ROWS$POSTS$COMPARISONS" ] || is_count "$ROWS" || refuse ROWS "'$ROWS'" "a number of posts and comparisons"
    is_batch "${PPO_EPISODES:-64}" || refuse PPO_EPISODES "'$PPO_EPISODES'" "a number of at least 64"
    [ "$HARD" = 0 ] || refuse HARD "1 with MODEL=$MODEL" "0: the harder world is a toy world"
    for name in SIZE KL_COEF $([ -n "$ROWS" ] || echo PPO_EPISODES); do # of the toy world
        [ -z "${!name:-}" ] || refuse "$name" "'${!name}' with MODEL=$MODEL" "nothing: give the stage's own argument"
    done
    [ "$SMOKE" = 0 ] || refuse SMOKE "1 with MODEL=$MODEL" "0: the smoke run is the toy world's"
    SEED=${SEED:-44413}
    is_count "$SEED" || refuse SEED "'$SEED'" "a number above 0"
    CHAIN=$(basename "$MODEL")_seed$SEED ADAPTERS=()
    if [ "$LORA" = 1 ]; then # ten times the paper's learning rate, which is that of whole networks
        CHAIN=$CHAIN$LORA_NAME ADAPTERS=("${LORA_ARGS[@]}" --lr 3e-5)
    fi
    source sbatches/rows_of.sh
    GIVEN=${PPO_MICRO:-}
    read -r MICRO PPO_MICRO ROLLOUT <<<"$(rows_of "$MODEL")"
    for name in MICRO PPO_MICRO ROLLOUT; do is_count "${!name}" || refuse $name "'${!name}'" "a number above 0"; done
    BATCHES=(128 64 512) WHOSE="the paper's global batches are kept"
    if [ -n "$ROWS" ]; then
        CHAIN=${CHAIN}_rows$ROWS BATCHES=(16 32 64) WHOSE="batches for few rows"
        [ -n "$GIVEN" ] || [ $((PPO_MICRO * PROCESSES)) -le 64 ] || PPO_MICRO=$((64 / PROCESSES))
    fi
    echo "$MODEL on $PROCESSES process(es), $GPUS GPU(s); $WHOSE:"
    for row in "SFT ${BATCHES[0]} $MICRO" "reward ${BATCHES[1]} $MICRO" "PPO ${BATCHES[2]} $PPO_MICRO"; do
        read -r what batch micro <<<"$row"
        [ $((batch % (micro * PROCESSES))) = 0 ] ||
            refuse "$([ "$what" = PPO ] && echo PPO_MICRO || echo MICRO)" "$micro on $PROCESSES processes" \
                "rows of a forward pass that divide the batch of $batch: $micro x $PROCESSES does not"
        echo "   $what: batch $batch = $PROCESSES processes x $((batch / micro / PROCESSES)) accumulation x $micro rows"
    done
    [ "$GPUS" -gt 0 ] || echo "   there is no GPU here: this works, and takes years"
    # fit STAGE ROWS ROLLOUT: the arguments that make a stage fit into the GPUs' memory; says why, or refuses
    declare -A FITS=([sft]="" [reward]="" [ppo_left_padding]="")
    fit() {
        local found
        found=$("$PYTHON" benchmark/memory.py --fit "$1" --model "$MODEL" --processes "$PROCESSES" --gpu_gb "$GPU_GB" \
            --rows "$2" --rollout_rows "$3" --launch="${LAUNCH[*]}" --given="--precision $PRECISION ${ADAPTERS[*]}")
        FITS[$1]=${found%%$'\n'*}
        [ -z "${found#*$'\n'}" ] || echo "   ${found#*$'\n'}"
    }
    if [ "$GPUS" -gt 0 ]; then
        fit sft "$MICRO" "$ROLLOUT"
        fit reward "$MICRO" 0
        fit ppo_left_padding "$PPO_MICRO" "$ROLLOUT"
    fi
    REAL=(--seed "$SEED" --base_model "$MODEL" --precision "$PRECISION" "${ADAPTERS[@]}")
    SFT=models/$CHAIN/sft REWARD=models/$CHAIN/reward PPO=models/$CHAIN/ppo
    MADE="" QUERIES=() LABELS=() EPISODES=() RATES=("" "" "")
    if [ -n "$ROWS" ]; then
        MADE=dataset DATA=data/$CHAIN
        stage dataset "$DATA" "" "$PYTHON" $STAGES/tldr_dataset.py --base_model "$MODEL" --output_dir "$DATA" --overwrite \
            --visuals_dir "dataset_visuals/$CHAIN" --no-check-length-correctness --max_rows "$ROWS" \
            ${POSTS:+--sft_dataset "$POSTS"} ${COMPARISONS:+--preference_dataset "$COMPARISONS"}
        QUERIES=(--query_dataset "$DATA/sft") LABELS=(--label_dataset "$DATA/comparisons")
        # by default as often over ROWS posts as the paper's million over its own
        EPISODES=(--total_episodes "${PPO_EPISODES:-$((ROWS * 857 / 6400 * 64 + 64))}")
        RATES=("--lr 3e-5" "--lr 1e-5" "--lr 3e-6")
        [ "$LORA" = 0 ] || RATES=("--lr 3e-4" "--lr 1e-4" "--lr 3e-5")
    fi
    stage sft "runs/${CHAIN}_sft $SFT" "$MADE" "${LAUNCH[@]}" $STAGES/sft.py "${DEEPSPEED[@]}" "${REAL[@]}" \
        "${QUERIES[@]}" --output_dir "$SFT" --run_name "${CHAIN}_sft" --batch_size "${BATCHES[0]}" \
        --local_micro_batch_size "$MICRO" --local_eval_batch_size "$ROLLOUT" ${RATES[0]} ${FITS[sft]}
    stage reward "runs/${CHAIN}_reward $REWARD" "$MADE sft" "${LAUNCH[@]}" $STAGES/reward.py "${DEEPSPEED[@]}" \
        "${REAL[@]}" "${QUERIES[@]}" "${LABELS[@]}" --sft_model_path "$SFT" --output_dir "$REWARD" \
        --run_name "${CHAIN}_reward" --batch_size "${BATCHES[1]}" --local_micro_batch_size "$MICRO" ${RATES[1]} \
        ${FITS[reward]}
    stage ppo "runs/${CHAIN}_ppo $PPO" "$MADE sft reward" "${LAUNCH[@]}" $STAGES/ppo_left_padding.py "${DEEPSPEED[@]}" \
        "${REAL[@]}" "${QUERIES[@]}" "${EPISODES[@]}" --sft_model_path "$SFT" --reward_model_path "$REWARD" \
        --output_dir "$PPO" --run_name "${CHAIN}_ppo" --batch_size "${BATCHES[2]}" \
        --local_micro_batch_size "$PPO_MICRO" --local_rollout_forward_batch_size "$ROLLOUT" ${RATES[2]} \
        ${FITS[ppo_left_padding]}
    [ "$REPORT" = 1 ] || exit 0
    REPORTS=eval/reports/$CHAIN
    "$PYTHON" eval/sft_rm_scale.py --runs "${CHAIN}_*" --output_dir "$REPORTS" --paper
    "$PYTHON" eval/rlhf_scaling_plot.py --runs "${CHAIN}_sft" "${CHAIN}_ppo" --output_dir "$REPORTS" --paper
    "$PYTHON" visualize_tokens.py --models "sft=$SFT" "ppo=$PPO" --base_model "$MODEL" --ref_model "$SFT" \
        --reward_model "$REWARD" "${QUERIES[@]}" --num 20 --html "$REPORTS/tokens.html"
    "$PYTHON" eval/hello_report.py --chains "$CHAIN"
    echo "win rates ask a server, which costs money: OPENAI_API_KEY=... $PYTHON eval/judge.py --judge openai \\"
    echo "    --run ${CHAIN}_sft ${CHAIN}_ppo --max_requests 10000    (or --base_url, docs/judge.md)"
fi
