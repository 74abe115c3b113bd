#!/bin/sh
# The entry point of the image for SageMaker. The server takes this process's place, so that it is
# the one that gets the signal to stop.
if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "HF_MODEL_ID is not set: name a model of the Hub, or a folder such as /opt/ml/model" >&2
    exit 1
fi
exec headrace --port 8080 "$@"
