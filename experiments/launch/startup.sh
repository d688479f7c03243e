#!/bin/bash
# What a machine that gcloud.sh asked for does when it starts: installs, and runs the command until it
# ends with another exit code than 33. However it ends, it deletes itself.
set -euo pipefail
metadata() { curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }
end() {
  gcloud storage cp output.txt "$job/output.txt" || true
  gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet --async
}
export HOME=${HOME:-/root} JMQL_BUCKET JMQL_COMMAND
name=$(metadata jmql-name) zone=$(metadata jmql-zone) JMQL_BUCKET=$(metadata jmql-bucket)
job=$JMQL_BUCKET/jobs/$name
mkdir -p "$HOME/jmql"
cd "$HOME/jmql"
trap end EXIT
JMQL_COMMAND=$(gcloud storage cat "$job/command")
gcloud storage cat "$job/code.tar.gz" | tar -xz
bash experiments/launch/setup.sh >> output.txt 2>&1
code=33
while [ "$code" = 33 ]; do
  code=0
  bash experiments/launch/run.sh >> output.txt 2>&1 || code=$?
done
