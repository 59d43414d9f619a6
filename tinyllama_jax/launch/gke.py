"""A job as a JobSet for Kubernetes, with Kueue's queue label.

Restarts are Kubernetes' own, because all pods have to start again together.  The supervisor in each pod runs the
command once and says how it ended:

    2, 78  FailJob: the pod failure policy fails the Job with reason PodFailurePolicy, and JobSet's rule fails it all
    75     Ignore: every process was told to stop and ended with 75, so every pod is made anew, and none is counted
    other  the Job has no backoff and fails; JobSet makes all Jobs anew, at most `max_restarts` times

A pod that is taken away (DisruptionTarget: drained, preempted) is replaced and not counted; the others end within the
watchdog's time, as processes that lost a peer.
"""

from __future__ import annotations

import re
from typing import Any

from tinyllama_jax.errors import UsageError
from tinyllama_jax.launch.job import COORDINATOR_PORT, Job, shell
from tinyllama_jax.launch.yaml_text import dump

# https://cloud.google.com/kubernetes-engine/docs/how-to/gpus and .../concepts/plan-tpus
GPUS = {
    "a100-40g": "nvidia-tesla-a100",
    "a100-80g": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
}
TPUS = {"v4": "tpu-v4-podslice", "v5e": "tpu-v5-lite-podslice", "v5p": "tpu-v5p-slice", "v6e": "tpu-v6e-slice"}
INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DISRUPTED = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


def render(job: Job) -> str:
    """The JobSet.  Raises UsageError without an image, and for one process per device."""
    if not job.image:
        raise UsageError("--on gke runs a container: name it with --image (launch/Dockerfile makes one)")
    job.check_outlives()
    if job.processes == "device":
        raise UsageError("--processes-per-node gpus is for --on slurm; a pod has all devices of its node")
    jobs = [_replicated(job, "items" if job.then else "main", job.command, job.tasks)]
    if job.then:
        after = _replicated(job, "then", job.then, 0, nodes=1)
        after["dependsOn"] = [{"name": "items", "status": "Complete"}]
        jobs.append(after)
    reasons = ["PodFailurePolicy", *(["FailedIndexes"] if job.tasks else [])]
    labels = {QUEUE_LABEL: job.queue} if job.queue else {}
    document = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, **({"labels": labels} if labels else {})},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {
                "maxRestarts": job.max_restarts,
                "rules": [
                    {"name": "wrong", "action": "FailJobSet", "onJobFailureReasons": reasons},
                ],
            },
            "replicatedJobs": jobs,
        },
    }
    return dump(f"kubectl apply -f - <this; needs JobSet{' 0.8 or newer' if job.then else ''}", document)


def _replicated(job: Job, name: str, command: tuple[str, ...], tasks: int, nodes: int = 0) -> dict[str, Any]:
    machine, pods = job.machine, tasks or nodes or job.machine.nodes
    tpu, together = machine.platform == "tpu", not tasks and pods > 1
    environment = [{"name": key, "value": _plain(value)} for key, value in job.environment]
    if together and not tpu:  # for TPUs GKE sets what JAX needs
        first = f"{job.name}-{name}-0-0.{job.name}:{COORDINATOR_PORT}"
        environment += [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
            {"name": "JAX_NUM_PROCESSES", "value": str(pods)},
            {
                "name": "JAX_PROCESS_ID",
                "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX}']"}},
            },
        ]
    container: dict[str, Any] = {
        "name": "main",
        "image": job.image,
        "command": ["bash", "-c", _script(job, command)],
        "env": environment,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_seconds,
        "containers": [container],
    }
    if together:
        container["ports"] = [{"containerPort": COORDINATOR_PORT}]
    selector = {}
    if machine.platform == "gpu":
        selector["cloud.google.com/gke-accelerator"] = GPUS[machine.kind]
        container["resources"] = {"limits": {"nvidia.com/gpu": machine.devices_per_node}}
    elif tpu:
        selector["cloud.google.com/gke-tpu-accelerator"] = TPUS[machine.kind]
        selector["cloud.google.com/gke-tpu-topology"] = machine.topology
        container["resources"] = {"limits": {"google.com/tpu": machine.devices_per_node}}
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        pod["nodeSelector"] = selector
    volumes, mounted = [], []
    for number, (outside, inside) in enumerate(job.mounts):
        volumes.append({"name": f"mount-{number}", "persistentVolumeClaim": {"claimName": outside}})
        mounted.append({"name": f"mount-{number}", "mountPath": inside})
    if machine.platform == "gpu":  # NCCL shares memory between GPUs of a node through it; the default is 64 MB
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
        mounted.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    if mounted:
        container["volumeMounts"], pod["volumes"] = mounted, volumes
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": pods,
        "parallelism": pods,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [2, 78]}},
                {"action": "Ignore", "onExitCodes": {"containerName": "main", "operator": "In", "values": [75]}},
                DISRUPTED,
            ]
        },
        "template": {"spec": pod},
    }
    if tasks:  # independent of each other: one that fails is made anew alone, and fails alone
        del spec["backoffLimit"]
        spec["backoffLimitPerIndex"] = job.max_restarts
        spec["podFailurePolicy"]["rules"][0]["action"] = "FailIndex"
    if job.seconds:
        spec["activeDeadlineSeconds"] = job.seconds
    return {"name": name, "replicas": 1, "template": {"spec": spec}}


def _script(job: Job, command: tuple[str, ...]) -> str:
    """One line where there is no setup.  The shell makes way for the supervisor, which then is told to stop."""
    run = "exec " + shell(job.supervised("gke", command), '"$JOB_COMPLETION_INDEX"')
    return _plain("\n".join(["set -euo pipefail", *job.setup, run, ""]))


def _plain(text: str) -> str:
    """Text that Kubernetes leaves as it is: it replaces $(NAME), and takes $$ for $."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def kueue(queue: str, machine_kind: str, devices: int) -> str:
    """What an administrator applies once, so that JobSets with the queue's label wait for their turn."""
    resource, label, value = "cpu", "kubernetes.io/os", "linux"
    if machine_kind in GPUS:
        resource, label, value = "nvidia.com/gpu", "cloud.google.com/gke-accelerator", GPUS[machine_kind]
    elif machine_kind in TPUS:
        resource, label, value = "google.com/tpu", "cloud.google.com/gke-tpu-accelerator", TPUS[machine_kind]
    version = "kueue.x-k8s.io/v1beta1"
    return dump(
        "kubectl apply -f - <this, once, as an administrator; the quota is this queue's number of devices",
        {
            "apiVersion": version,
            "kind": "ResourceFlavor",
            "metadata": {"name": machine_kind},
            "spec": {"nodeLabels": {label: value}},
        },
        {
            "apiVersion": version,
            "kind": "ClusterQueue",
            "metadata": {"name": queue},
            "spec": {
                "namespaceSelector": {},
                "resourceGroups": [
                    {
                        "coveredResources": [resource],
                        "flavors": [{"name": machine_kind, "resources": [{"name": resource, "nominalQuota": devices}]}],
                    }
                ],
            },
        },
        {
            "apiVersion": version,
            "kind": "LocalQueue",
            "metadata": {"name": queue, "namespace": "default"},
            "spec": {"clusterQueue": queue},
        },
    )


def command(job: Job, file: str) -> list[str]:
    return ["kubectl", "apply", "-f", file]
