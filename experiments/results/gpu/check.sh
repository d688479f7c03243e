#!/usr/bin/env bash
# A GPU for ten minutes: a population stopped and gone on with, speed of the parts, runs side by side.
#   PYTHON=python3 STEPS=112000 bash experiments/results/gpu/check.sh OUT
# OUT gets parts.jsonl, and the run directories and logs as runs.tar.gz.
set -u
cd "$(dirname "$0")/../../.."
OUT=$1 PYTHON=${PYTHON:-python3} STEPS=${STEPS:-112000} ONLY=${ONLY:-.} POINT=${POINT-1 8 32} CHEETAH=${CHEETAH-1 8}
LOGS=/tmp/jmql-logs
mkdir -p $LOGS "$OUT"
export PYTHONPATH=$PWD JAX_COMPILATION_CACHE_DIR=/tmp/jmql-cache XLA_PYTHON_CLIENT_PREALLOCATE=false
export COLUMNS=100 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
RUNS=/tmp/jmql-runs
begun=$(date +%s)
say() { echo "[$(($(date +%s) - begun)) s] $*"; }
jmql() { "$PYTHON" -c 'from experiments.cli import main; main()' "$@"; }
train() { # NAME TASK STEPS MEMBERS
    members=()
    for seed in $(seq 0 $(($4 - 1))); do members+=(--member "--seed $seed --run-id $1-$seed"); done
    [ "$4" = 1 ] && members=(--run-id "$1-0")
    jmql train --task "$2" --train.env-steps "$3" --tracking.wandb disabled --devices 1 \
        --runs $RUNS "${members[@]}" >>"$LOGS/$1.log" 2>&1
}
trap 'tar -C /tmp -czf $OUT/runs.tar.gz --exclude=checkpoints jmql-runs jmql-logs' EXIT
"$PYTHON" -c 'import jax; print(jax.__version__, jax.devices())'
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null

# Every program is compiled at once, each in a process of its own; the trainings end after a cycle.
"$PYTHON" experiments/results/gpu/parts.py --list | grep "$ONLY" >/tmp/parts
(while read -r part; do
    timeout 200 "$PYTHON" experiments/results/gpu/parts.py "$part" >/dev/null 2>>"$LOGS/fill.log" &
done </tmp/parts; wait) &
for many in $POINT; do timeout 200 bash -c "$(declare -f train jmql); LOGS=$LOGS RUNS=/tmp/fill PYTHON=$PYTHON; train fill-p$many point_goal 4800 $many" & done
for many in $CHEETAH; do timeout 240 bash -c "$(declare -f train jmql); LOGS=$LOGS RUNS=/tmp/fill PYTHON=$PYTHON; train fill-c$many cheetah_dir 17280 $many" & done
wait
say compiled

# A population, and the same one stopped and gone on with.
train stay point_goal 16000 8; say "stay $?"
train go point_goal 16000 8 & pid=$!
until grep -q '/16,000 steps' "$LOGS/go.log" 2>/dev/null || ! kill -0 $pid; do sleep 0.1; done
"$PYTHON" - <<'END'
import psutil

for one in psutil.process_iter(["cmdline"]):
    if "--seed 0 --run-id go-0" in (one.info["cmdline"] or []):
        one.terminate()
END
wait $pid; say "stopped $?"; train go point_goal 16000 8; say "gone on $?"
train alone point_goal 16000 1; say "alone $?"
while read -r part; do
    timeout 60 "$PYTHON" experiments/results/gpu/parts.py "$part" 2>>"$LOGS/parts.log" | tee -a "$OUT/parts.jsonl"
done </tmp/parts
say parts
for many in $POINT; do train p$many point_goal 64000 $many; say "point_goal x$many $?"; done
for many in $CHEETAH; do train c$many cheetah_dir "$STEPS" $many; say "cheetah_dir x$many $?"; done
say done
