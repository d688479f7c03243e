# Installs JMQL for a TPU beside this file, with a Python of its own: that of the image is too old.
set -euo pipefail
cd "$(dirname "$0")/../.."
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv --constraint requirements.lock --editable '.[tpu]'
