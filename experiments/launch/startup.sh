#!/bin/bash
# What a machine that gcloud.sh asked for does when it starts: installs, and runs the command until it
# ends with another exit code than 33; then it deletes itself.
set -euo pipefail
metadata() { curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }
export HOME=${HOME:-/root} JMQL_BUCKET JMQL_COMMAND
JMQL_BUCKET=$(metadata jmql-bucket)
job=$JMQL_BUCKET/jobs/$(metadata jmql-name)
JMQL_COMMAND=$(gcloud storage cat "$job/command")
mkdir -p "$HOME/jmql"
cd "$HOME/jmql"
gcloud storage cat "$job/code.tar.gz" | tar -xz
bash experiments/launch/setup.sh
code=33
while [ "$code" = 33 ]; do
  code=0
  bash experiments/launch/run.sh >> output.txt 2>&1 || code=$?
  gcloud storage cp output.txt "$job/output.txt"
done
gcloud compute tpus queued-resources delete "$(metadata jmql-name)" --zone "$(metadata jmql-zone)" \
  --force --quiet --async
