#!/usr/bin/env bash
# The command line against a running service (`aidocks up`).
#   examples/cli.sh MODEL [NAME]
set -euo pipefail

model=${1:?usage: cli.sh MODEL [NAME]}
name=${2:-$model-cli}
small=(--chunks 8 --seqlen 32) # so that the example takes seconds; leave it out for real work

# Flags, and progress until it is done.
aidocks laser --base-model-name "$model" --laser-model-name "$name-laser" --candidates 2 "${small[@]}"

# A file (here: standard input), where flags win; and the job's id instead of waiting.
job=$(aidocks byo-moe - --name "$name-moe" --detach "${small[@]}" <<YAML
base_model: $model
experts:
  - {source_model: $model, positive_prompts: [chat, questions]}
  - {source_model: $name-laser, positive_prompts: [mathematics, code]}
YAML
)
aidocks jobs watch "$job"
aidocks jobs list --limit 5
aidocks models show "$name-moe"
aidocks ask "$name-moe" "Once upon a time" --max-new-tokens 16
