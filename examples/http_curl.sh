#!/usr/bin/env bash
# The HTTP interface with curl alone.
#   examples/http_curl.sh MODEL [NAME]
# MODEL is in the registry (`aidocks models list`); the result is called NAME.
set -euo pipefail

url=${AIDOCKS_URL:-http://127.0.0.1:8723}
model=${1:?usage: http_curl.sh MODEL [NAME]}
name=${2:-$model-curl}

# Small numbers, so that the example takes seconds; leave the last three fields out for real work.
body='{"base_model_name": "'$model'", "laser_model_name": "'$name'", "candidates": 2, "chunks": 8, "seqlen": 32}'

# Submitting answers at once with the job. Repeating it with the same key returns the same job.
job=$(curl --fail-with-body --silent --show-error "$url/laser" \
    -H 'Content-Type: application/json' -H "Idempotency-Key: $name-$$" -d "$body" |
    grep --only-matching --max-count=1 '"id": *"[^"]*"' | head -n 1 | cut -d '"' -f 4)
echo "job $job"

# The event stream ends when the job does. After a broken connection: -H "Last-Event-ID: <last id seen>".
curl --fail-with-body --silent --no-buffer "$url/jobs/$job/events" -H 'Accept: text/event-stream' |
    grep '^event:'

curl --fail-with-body --silent "$url/jobs/$job"
echo
curl --fail-with-body --silent "$url/models/$name/files"
echo
