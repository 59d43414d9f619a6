#!/bin/bash
# tinyllama launch experiments.tinyllama:v1_0 --target v4:2x2x2 --workdir /runs/v1_0 --image registry.example/tinyllama_jax:tpu --project my-project --zone us-central2-b --mount /mnt/disks/runs:/runs --set data.store=gs://my-bucket/slimpajama-starcoder --set data.cache=/runs/cache --set checkpoint.directory=gs://my-bucket/v1_0 --set execution.micro_batch_sequences=64 --on tpu
# Asks for a TPU slice, runs on all its hosts, gives it back.  Asks again when the slice is taken away, at most
# 3 times.
set -uo pipefail

state() {
    gcloud compute tpus queued-resources describe v1-0 --project=my-project --zone=us-central2-b --format='value(state.state)' 2>/dev/null
}

give_back() {
    gcloud compute tpus queued-resources delete v1-0 --project=my-project --zone=us-central2-b --force --quiet
}
trap give_back EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

for ((taken = 0; taken <= 3; taken++)); do
    gcloud compute tpus queued-resources create v1-0 --node-id=v1-0 --project=my-project --zone=us-central2-b --accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base || exit 1
    until [ "$(state)" = ACTIVE ]; do
        case "$(state)" in
        FAILED | SUSPENDED) echo "v1-0: no slice was given: $(state)" >&2 && exit 1 ;;
        esac
        sleep 30
    done
    gcloud compute tpus tpu-vm ssh v1-0 --worker=all --project=my-project --zone=us-central2-b '--command=set -euo pipefail
sudo docker rm --force v1-0 >/dev/null 2>&1 || true
sudo docker run --rm --privileged --network=host --name=v1-0 --stop-timeout=120 --volume=/mnt/disks/runs:/runs registry.example/tinyllama_jax:tpu python -m tinyllama_jax launch supervise --on tpu --max-restarts 3 --workdir /runs/v1_0 --checkpoints gs://my-bucket/v1_0 -- python -m tinyllama_jax train experiments.tinyllama:v1_0 --workdir /runs/v1_0 --set data.store=gs://my-bucket/slimpajama-starcoder --set data.cache=/runs/cache --set checkpoint.directory=gs://my-bucket/v1_0 --set execution.micro_batch_sequences=64'
    status=$?
    if [ "$status" = 0 ] || [ "$(state)" = ACTIVE ]; then
        exit "$status" # done, or the supervisors gave up
    fi
    echo "v1-0: the slice was taken away ($(state)); asking for another" >&2
    give_back
done
echo "v1-0: the slice was taken away 4 times" >&2
exit 75
