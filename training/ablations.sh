#!/usr/bin/env bash
# What each choice is worth, behind one and the same backbone (stage 0 of the generalist) and at equal compute.
#   training/ablations.sh [OUT] [NAME ...]     (OUT: runs/ablations; NAMEs: only these, default: all; see `case` below)
# Goes on where it was interrupted. STEPS: of each comparison (2,000). FRAMES: of held-out demonstrations, for the error in open
# loop (400; 0: none). EPISODES: in closed loop, per world (50; 0: none). STAGE0: checkpoint of the backbone.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/ablations}; shift || true
stage0=${STAGE0:-generalist-stage0}
steps=${STEPS:-2000} frames=${FRAMES:-400} episodes=${EPISODES:-50}
first=$((steps / 5))  # steps of T2A; measured on two cores: one on whole episodes takes as long as one of CPT (0.36 s)
recipes=training/recipes/generalist
cores=$(nproc)
export OMP_NUM_THREADS=1
workers=${WORKERS:-$cores} processes=${PROCESSES:-$cores}
python=${PYTHON:-.venv/bin/python}

stage() { # page, recipe, folder, checkpoint to go on from, changes
  "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" "training/$1.py" \
    --recipe "$recipes/$2.yaml" --out "$out/$3" --from "$4" $(printf -- '--set %s ' "${@:5}")
}
judge() { # name, embodiment, task
  local data=data/held_out_$2 results=$out/results/$1
  mkdir -p "$results"
  if [ "$frames" != 0 ]; then
    "$python" -m qwen_vla_core.cli sim demos --embodiment "$2" --task "$3" --seed 90000 --episodes 40 --out "$data" --workers "$workers"
    [ -e "$results/open_loop_$2.json" ] || "$python" -m qwen_vla_core.cli eval open-loop "$data" --checkpoint "$out/$1/checkpoint" \
      --frames "$frames" --hold-at-end --output "$results/open_loop_$2.json"
  fi
  [ "$episodes" = 0 ] || "$python" -m qwen_vla_core.cli eval run --checkpoint "$out/$1/checkpoint" \
    --embodiment "$2" --task "$3" --episodes "$episodes" --workers "$workers" --output "$results/$2_$3.jsonl" --resume
}
judge_all() {
  judge "$1" aloha pick
  judge "$1" widowx place
  judge "$1" mobile_base all
}
compare() { # name, steps, checkpoint to go on from, changes
  printf '\n== %s (%d min)\n' "$1" $((SECONDS / 60))
  stage cpt ablation "$1" "$3" "steps=$2" "optim.warmup_steps=$(($2 / 4))" "${@:4}"
}
choice() { # name, context, state
  compare "$1" "$steps" "$stage0" "renew.context=$2" "renew.state=$3"; judge_all "$1"
}
specialist() { # name, embodiment, task; a third of the steps: all three together cost what the generalist base_0 costs
  compare "$1" $((steps / 3)) "$stage0" "mixture=$1.yaml" renew.context=cached renew.state=dit_token; judge "$@"
}

one() {
  local seed=${1##*_}
  case $1 in
    base_*) # cached context, state in the decoder, no T2A; seeds 0, 1, 2: everything below differs from it in one thing
      compare "$1" "$steps" "$stage0" "seed=$seed" renew.context=cached renew.state=dit_token; judge_all "$1" ;;
    t2a_*) # a fifth of the steps are T2A
      stage t2a t2a "first_$1" "$stage0" "steps=$first" "seed=$seed" renew.context=cached renew.state=dit_token
      compare "$1" $((steps - first)) "$out/first_$1/checkpoint" "seed=$seed"; judge_all "$1" ;;
    joint) choice "$1" joint dit_token ;;
    state_none) choice "$1" cached none ;;
    state_prompt) choice "$1" cached prompt ;;
    only_aloha) specialist "$1" aloha pick ;;
    only_widowx) specialist "$1" widowx place ;;
    only_mobile_base) specialist "$1" mobile_base all ;;
    *) echo "$1 is no comparison" >&2; exit 2 ;;
  esac
}

[ $# -gt 0 ] || set -- base_0 t2a_0 joint state_none state_prompt only_aloha only_widowx only_mobile_base base_1 t2a_1 base_2 t2a_2
for name in "$@"; do one "$name"; done
"$python" training/results.py "$out/results" --across
