#!/usr/bin/env bash
# An environment with mamba-ssm's Triton kernels beside this one's packages, for a machine without
# a GPU or a CUDA compiler. usage: make_venv.sh PYTHON FOLDER
set -euo pipefail
python=$1 folder=$2
"$python" -m venv "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$site/beside.pth"
"$folder/bin/pip" install --quiet triton einops ninja packaging setuptools wheel
MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE "$folder/bin/pip" install --quiet \
    --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
touch "$folder/.ready"
