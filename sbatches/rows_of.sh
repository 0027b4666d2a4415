# shellcheck shell=bash
# rows_of MODEL: rows of one forward pass on one 80 GB GPU: SFT and reward model, PPO training, sampling. The paper's for
# its three sizes (docs/running.md: Batch words); MICRO, PPO_MICRO and ROLLOUT take their places.
rows_of() {
    local rows
    case $1 in
    *2.8b*) rows=(1 4 32) ;;
    *6.9b* | *12b*) rows=(1 1 4) ;;
    *) rows=(1 16 64) ;;
    esac
    echo "${MICRO:-${rows[0]}} ${PPO_MICRO:-${rows[1]}} ${ROLLOUT:-${rows[2]}}"
}
