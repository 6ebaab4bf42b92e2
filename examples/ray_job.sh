#!/usr/bin/env bash
# `ray job submit` on the service's own cluster. The job is a client of the service like any other, so it ends with
# the operation's exit code, and what it made is in the registry.
#   examples/ray_job.sh MODEL [NAME]
set -euo pipefail

model=${1:?usage: ray_job.sh MODEL [NAME]}
name=${2:-$model-ray-job}

eval "$(aidocks env)" # where the cluster is, and its token

ray job submit -- python -m aidocks laser --base-model-name "$model" --laser-model-name "$name" \
    --candidates 2 --chunks 8 --seqlen 32
