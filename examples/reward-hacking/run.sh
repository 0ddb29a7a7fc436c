#!/usr/bin/env bash
# The story of README.md, step by step. Full logs are in runs/*.log. Options go to every `posttrain run`; PARTS chooses steps.
set -uo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
POSTTRAIN="${POSTTRAIN:-posttrain}"
PYTHON="${PYTHON:-python}"
PARTS="${PARTS:-123}"
OPTIONS=("$@")
rm -rf runs registry
mkdir -p runs

# Run a pipeline, keep its whole log, show the lines that tell the story; the exit code is the run's.
tell() {
  local log="runs/$1.log"
  shift
  echo "\$ posttrain run $*"
  "$POSTTRAIN" run "$@" ${OPTIONS[@]+"${OPTIONS[@]}"} --quiet >"$log" 2>&1
  local code=$?
  grep -E "rewards: |did not pass|^ +- |reward_check is off| finding: |^evals of|^gate |^registry |^error" "$log"
  echo "exit code $code"
  echo
  return $code
}

if [[ $PARTS == *1* ]]; then
  echo "1. The certificate refuses the reward before the first step."
  tell refused hackable.yaml && exit 1
fi
if [[ $PARTS == *2* ]]; then
  echo "2. Forced to train on it: reward rises, held-out accuracy falls, the alarm fires, the gate blocks."
  tell forced hackable.yaml --set name=forced --set grpo.reward_check=off && exit 1
  "$PYTHON" show.py runs/forced
fi
if [[ $PARTS == *3* ]]; then
  echo "3. The same run with a reward that holds."
  tell certified certified.yaml || exit 1
  "$PYTHON" show.py runs/certified
fi
