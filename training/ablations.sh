#!/usr/bin/env bash
# What each choice is worth, behind one and the same backbone (stage 0 of the generalist) and at equal compute.
#   training/ablations.sh [OUT] [NAME ...]     (OUT: runs/ablations; NAMEs: only these, default: all; see `case` below)
# Goes on where it was interrupted. STEPS: of each comparison (2,000), EPISODES: per world (50), STAGE0: checkpoint of the backbone.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/ablations}; shift || true
stage0=${STAGE0:-generalist-stage0}
steps=${STEPS:-2000} episodes=${EPISODES:-50}
t2a_steps=$((steps / 4))  # measured on two cores: a step of T2A on whole episodes takes as long as one of CPT (0.36 s)
recipes=training/recipes/generalist
cores=$(nproc)
export OMP_NUM_THREADS=1
workers=${WORKERS:-$cores} processes=${PROCESSES:-$cores}

stage() { # page, recipe, folder, checkpoint to go on from, changes
  "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --standalone --nproc_per_node "$processes" "training/$1.py" \
    --recipe "$recipes/$2.yaml" --out "$out/$3" --from "$4" $(printf -- '--set %s ' "${@:5}")
}
judge() { # name, embodiment, task
  mkdir -p "$out/results/$1"
  [ -e "$out/results/$1/$2_$3.json" ] || .venv/bin/qwen-vla eval run --checkpoint "$out/$1/checkpoint" --embodiment "$2" \
    --task "$3" --episodes "$episodes" --workers "$workers" --output "$out/results/$1/$2_$3.jsonl" --resume
}
judge_all() {
  judge "$1" aloha pick
  judge "$1" widowx place
  judge "$1" mobile_base all
}
compare() { # name, steps, checkpoint to go on from, changes
  printf '\n== %s (%d min)\n' "$1" $((SECONDS / 60))
  stage cpt ablation "$1" "$3" "steps=$2" "${@:4}"
}

one() {
  local seed
  case $1 in
    t2a_*) # with T2A; seeds 0, 1, 2
      seed=${1#t2a_}
      stage t2a t2a "first_$1" "$stage0" "steps=$t2a_steps" "seed=$seed" renew.context=cached renew.state=dit_token
      compare "$1" "$steps" "$out/first_$1/checkpoint" "seed=$seed"; judge_all "$1" ;;
    no_t2a_*) # without, for as long
      seed=${1#no_t2a_}
      compare "$1" $((steps + t2a_steps)) "$stage0" "seed=$seed" renew.context=cached renew.state=dit_token
      judge_all "$1" ;;
    joint) compare "$1" "$steps" "$stage0" renew.context=joint renew.state=dit_token; judge_all "$1" ;;
    cached) compare "$1" "$steps" "$stage0" renew.context=cached renew.state=dit_token; judge_all "$1" ;;
    state_none) compare "$1" "$steps" "$stage0" renew.context=cached renew.state=none; judge_all "$1" ;;
    state_prompt) compare "$1" "$steps" "$stage0" renew.context=cached renew.state=prompt; judge_all "$1" ;;
    only_aloha) specialist "$1"; judge "$1" aloha pick ;;
    only_widowx) specialist "$1"; judge "$1" widowx place ;;
    only_mobile_base) specialist "$1"; judge "$1" mobile_base all ;;
    *) echo "$1 is no comparison" >&2; exit 2 ;;
  esac
}
specialist() { # a third of the steps: all three together cost what `cached` costs
  compare "$1" $((steps / 3)) "$stage0" "mixture=$1.yaml" renew.context=cached renew.state=dit_token
}

[ $# -gt 0 ] || set -- cached joint state_none state_prompt only_aloha only_widowx only_mobile_base \
  t2a_0 no_t2a_0 t2a_1 no_t2a_1 t2a_2 no_t2a_2
for name in "$@"; do one "$name"; done
.venv/bin/python training/results.py "$out/results" --across
