# Runs JMQL_COMMAND, with compiled programs kept in the bucket. Its exit code is that of the command:
# 33 asks for the same again.
set -euo pipefail
cd "$(dirname "$0")/../.."
export JAX_COMPILATION_CACHE_DIR="$JMQL_BUCKET/compiled"
export PATH="$PWD/.venv/bin:$PATH"
eval "exec $JMQL_COMMAND"
