# A sweep that is killed with `kill -9` in the middle and run again, against one that nothing stopped.
# From a fresh clone: bash experiments/results/sweeps/killed.sh
set -uo pipefail
cd "$(dirname "$0")/../../.."
file=experiments/results/sweeps/killed.yaml
sweep() { make --silent sweep SWEEP=$file WHERE=local ARGS="--population 6"; }
rows() { cat runs/*/killed-*/metrics.jsonl 2>/dev/null | wc -l; }
[ -d whole ] || { sweep > /dev/null && mv runs whole; }
for count in 24 54; do
  setsid make --silent sweep SWEEP=$file WHERE=local ARGS="--population 6" > /dev/null &
  until [ "$(rows)" -ge $count ]; do sleep 0.5; done
  kill -9 -- -$!  # all that it has started
  sleep 3
  echo "killed with $(rows) of $(cat whole/*/killed-*/metrics.jsonl | wc -l) rows"
done
sweep
python3 - <<'PY'
import glob, json

def rows(folder):
    return {
        "/".join(path.split("/")[1:3]): [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time/")}
            for line in open(path)
        ]
        for path in sorted(glob.glob(f"{folder}/*/killed-*/metrics.jsonl"))
    }

whole, killed = rows("whole"), rows("runs")
steps = {name: [(row["seed"], row["env_steps"]) for row in some] for name, some in killed.items()}
print(len(killed), "runs,", sum(map(len, killed.values())), "rows")
print("every row once:", all(len(set(some)) == len(some) for some in steps.values()))
print("bit for bit those of the sweep that nothing stopped:", whole == killed)
PY
