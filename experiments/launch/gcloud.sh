# Asks Cloud TPU for a machine with nothing but gcloud, as a queued resource that runs one command:
#
#   JMQL_BUCKET=gs://BUCKET/FOLDER ZONE=us-east5-b TPU=v6e-1 bash experiments/launch/gcloud.sh NAME COMMAND
#
# TPU is v6e-N or v5litepod-N, of 1, 4 or 8 chips: for several hosts there is SkyPilot. The machine
# gets what is committed, takes the place of one of the same name, and deletes itself when the command
# has ended. Nobody watches it: where it is taken away, the same line asks for another, which goes on
# from the bucket.
# `gcloud compute tpus queued-resources delete NAME --zone ZONE --force` ends it, and its costs.
set -euo pipefail
if [ $# != 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ] || [[ "${JMQL_BUCKET:-}" != gs://?* ]]; then
  echo "JMQL_BUCKET, ZONE, TPU, NAME or COMMAND is missing; valid: JMQL_BUCKET=gs://BUCKET/FOLDER ZONE=us-east5-b TPU=v6e-1 bash $0 NAME COMMAND" >&2
  exit 2
fi
name=$1 command=$2
case "$TPU" in
  v6e-[148]) runtime=v2-alpha-tpuv6e ;;
  v5litepod-[148]) runtime=v2-alpha-tpuv5-lite ;;
  *) echo "TPU is $TPU; valid: v6e-N, v5litepod-N, N 1, 4 or 8" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/../.."
git archive --format=tar.gz HEAD | gcloud storage cp - "$JMQL_BUCKET/jobs/$name/code.tar.gz"
printf '%s\n' "$command" | gcloud storage cp - "$JMQL_BUCKET/jobs/$name/command"
# One of this name is in the way, also where it has ended.
gcloud compute tpus queued-resources delete "$name" --zone "$ZONE" --force --quiet 2>/dev/null || true
gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$ZONE" \
  --accelerator-type "$TPU" --runtime-version "$runtime" --spot \
  --metadata "jmql-name=$name,jmql-zone=$ZONE,jmql-bucket=$JMQL_BUCKET" \
  --metadata-from-file startup-script=experiments/launch/startup.sh
