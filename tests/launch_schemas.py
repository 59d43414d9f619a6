"""The fields of Kubernetes' forms that we use, as JSON schemas: a field with another name or type is refused.

After the references of JobSet v1alpha2 (https://jobset.sigs.k8s.io/docs/reference), Job and Pod v1
(https://kubernetes.io/docs/reference/kubernetes-api), Kueue v1beta1 (https://kueue.sigs.k8s.io/docs/reference) and
SkyPilot's task (https://docs.skypilot.co/en/latest/reference/yaml-spec.html).
"""

TEXT = {"type": "string", "minLength": 1}
LABEL = {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"}
COUNT = {"type": "integer", "minimum": 0}
LABELS = {"type": "object", "additionalProperties": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,63}$"}}


def form(required: dict, **optional) -> dict:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def many(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


VARIABLE = {
    "oneOf": [
        form({"name": TEXT, "value": {"type": "string"}}),
        form({"name": TEXT, "valueFrom": form({"fieldRef": form({"fieldPath": TEXT})})}),
    ]
}
CONTAINER = form(
    {"name": LABEL, "image": TEXT, "command": many({"type": "string"}), "env": {"type": "array", "items": VARIABLE}},
    ports=many(form({"containerPort": COUNT})),
    resources=form({"limits": {"type": "object", "additionalProperties": COUNT}}),
    volumeMounts=many(form({"name": LABEL, "mountPath": {"type": "string", "pattern": "^/"}})),
)
VOLUME = {
    "oneOf": [
        form({"name": LABEL, "persistentVolumeClaim": form({"claimName": LABEL})}),
        form({"name": LABEL, "emptyDir": form({"medium": {"const": "Memory"}})}),
    ]
}
POD = form(
    # A pod failure policy is for pods that are not restarted in place.
    {"restartPolicy": {"const": "Never"}, "terminationGracePeriodSeconds": COUNT, "containers": many(CONTAINER)},
    nodeSelector=LABELS,
    volumes=many(VOLUME),
)
CODES = form(
    {"containerName": LABEL, "operator": {"enum": ["In", "NotIn"]}, "values": many({"type": "integer", "minimum": 1})}
)
POD_RULE = {
    "oneOf": [
        form({"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, "onExitCodes": CODES}),
        form(
            {
                "action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                "onPodConditions": many(form({"type": TEXT, "status": {"enum": ["True", "False", "Unknown"]}})),
            }
        ),
    ]
}
JOB = form(
    {
        "completionMode": {"const": "Indexed"},
        "completions": COUNT,
        "parallelism": COUNT,
        "podFailurePolicy": form({"rules": many(POD_RULE)}),
        "template": form({"spec": POD}),
    },
    backoffLimit=COUNT,
    backoffLimitPerIndex=COUNT,
    activeDeadlineSeconds=COUNT,
)
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
JOBSET = form(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": form({"name": LABEL}, labels=LABELS),
        "spec": form(
            {
                "network": form({"enableDNSHostnames": {"const": True}, "subdomain": LABEL}),
                "failurePolicy": form(
                    {
                        "maxRestarts": COUNT,
                        "rules": many(
                            form(
                                {
                                    "name": LABEL,
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": many({"enum": REASONS}),
                                }
                            )
                        ),
                    }
                ),
                "replicatedJobs": many(
                    form(
                        {"name": LABEL, "replicas": {"const": 1}, "template": form({"spec": JOB})},
                        dependsOn=many(form({"name": LABEL, "status": {"enum": ["Ready", "Complete"]}})),
                    )
                ),
            }
        ),
    }
)


def _kueue(kind: str, spec: dict, **metadata) -> dict:
    return form(
        {
            "apiVersion": {"const": "kueue.x-k8s.io/v1beta1"},
            "kind": {"const": kind},
            "metadata": form({"name": LABEL, **metadata}),
            "spec": spec,
        }
    )


QUOTA = form({"name": TEXT, "nominalQuota": COUNT})
GROUP = form(
    {"coveredResources": many(TEXT), "flavors": many(form({"name": LABEL, "resources": many(QUOTA)}))},
)
KUEUE = [
    _kueue("ResourceFlavor", form({"nodeLabels": LABELS})),
    _kueue("ClusterQueue", form({"namespaceSelector": {"type": "object"}, "resourceGroups": many(GROUP)})),
    _kueue("LocalQueue", form({"clusterQueue": LABEL}), namespace=LABEL),
]
SKY = form(
    {
        "name": LABEL,
        "num_nodes": {"type": "integer", "minimum": 1},
        "resources": form(
            {"job_recovery": form({"max_restarts_on_errors": COUNT, "recover_on_exit_codes": many(COUNT)})},
            accelerators={"type": "string", "pattern": "^[A-Z0-9-]+:[0-9]+$"},
            infra=TEXT,
            use_spot={"type": "boolean"},
            image_id=TEXT,
        ),
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "run": TEXT,
    },
    workdir=TEXT,
    setup=TEXT,
    file_mounts={"type": "object", "additionalProperties": TEXT},
)
