"""JSON schemas of the manifests under launch/, by hand from the documented fields; any other field is an error.

JobSet: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2; Job and Pod: batch/v1 and core/v1 of Kubernetes;
SkyPilot: https://docs.skypilot.co/en/latest/reference/yaml-spec.html.
"""

COUNT = {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def record(required=(), **properties):
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def listed(item):
    return {"type": "array", "items": item, "minItems": 1}


TPUS = record(["google.com/tpu"], **{"google.com/tpu": COUNT})
CONTAINER = record(
    ["name", "image", "resources"],
    name=NAME,
    image={"type": "string", "minLength": 1},
    command=listed({"type": "string"}),
    args=listed({"type": "string"}),
    resources=record(["limits"], requests=TPUS, limits=TPUS),
)
TOLERATION = record(
    key={"type": "string"},
    operator={"enum": ["Exists", "Equal"]},
    value={"type": "string"},
    effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
)
POD = record(
    ["containers", "restartPolicy"],
    restartPolicy={"const": "Never"},  # podFailurePolicy asks for it
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    nodeSelector=TEXTS,
    tolerations=listed(TOLERATION),
    containers=listed(CONTAINER),
)
EXIT_CODES = record(
    ["operator", "values"],
    containerName=NAME,
    operator={"enum": ["In", "NotIn"]},
    values=listed({"type": "integer", "minimum": 1}),  # In must not name 0
)
POD_FAILURE = record(["action"], action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}, onExitCodes=EXIT_CODES)
JOB = record(
    ["template"],
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit={"type": "integer", "minimum": 0},
    podFailurePolicy=record(["rules"], rules=listed(POD_FAILURE)),
    template=record(["spec"], spec=POD),
)
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RESTART_RULE = record(
    ["action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=listed({"enum": REASONS}),
    targetReplicatedJobs=listed(NAME),
)
REPLICATED = record(["name", "template"], name=NAME, replicas=COUNT, template=record(["spec"], spec=JOB))
JOBSET = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=record(["name"], name=NAME, annotations=TEXTS, labels=TEXTS),
    spec=record(
        ["replicatedJobs"],
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
        network=record(enableDNSHostnames={"type": "boolean"}, subdomain={"type": "string"}),
        failurePolicy=record(maxRestarts={"type": "integer", "minimum": 0}, rules=listed(RESTART_RULE)),
        replicatedJobs=listed(REPLICATED),
    ),
)

SKY = record(
    ["resources", "run"],
    name={"type": "string"},
    workdir={"type": "string"},
    num_nodes=COUNT,
    resources=record(
        accelerators={"type": "string"},
        use_spot={"type": "boolean"},
        job_recovery=record(recover_on_exit_codes=listed({"type": "integer", "minimum": 0, "maximum": 255})),
    ),
    envs=TEXTS,
    setup={"type": "string"},
    run={"type": "string"},
)
