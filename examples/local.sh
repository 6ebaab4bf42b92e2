#!/usr/bin/env bash
# Without any service: the same operations, in this process, into the same registry.
#   examples/local.sh MODEL [NAME]
set -euo pipefail

model=${1:?usage: local.sh MODEL [NAME]}
name=${2:-$model-local}

aidocks laser --local --base-model-name "$model" --laser-model-name "$name" --candidates 2 --chunks 8 --seqlen 32
aidocks models list --local
