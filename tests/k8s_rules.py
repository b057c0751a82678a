"""What must hold of rendered manifests beside the schemas: the operator's own rules, pod security, and that the parts
of a site fit each other. Each check yields its faults, a line each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Set
from urllib.parse import urlsplit

from tests.k8s_operators import KINDS
from tests.k8s_schema import core_faults, ray_faults
from tests.k8s_site import GPU, QUEUE, Object, Pod, RayCluster, Site, amount

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DURATION = re.compile(r"(\d+(\.\d+)?(h|m|s))+|[1-9]\d*")
_LONGEST_NAME = 47
_METADATA_SERVER = "169.254.169.254/32"
_OPTIONAL = {"scanloom-s3", "scanloom-pseudonyms"}
_OF_CLUSTERS = {"Namespace", "PriorityClass", "ClusterQueue", "ResourceFlavor"}


_WORDS: Mapping[str, Set[str]] = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"}, "restartPolicy": {"Always", "OnFailure", "Never"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"}, "protocol": {"TCP", "UDP", "SCTP"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"}, "medium": {"", "Memory"},
    "preemptionPolicy": {"Never", "PreemptLowerPriority"}, "submissionMode": {
        "K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"}, "dnsPolicy": {
        "ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
}  # fmt: skip
"""Values that an API server knows of keys whose schemas leave them open."""


def schemas(site: Site) -> Iterator[str]:
    """Every object, and every pod inside Ray's objects, which KubeRay's definitions check loosely."""
    for thing in site.objects:
        where = f"{thing['kind']} {thing['metadata']['name']}"
        if thing["apiVersion"].startswith("ray.io/"):
            found = [fault for version in site.versions for fault in ray_faults(thing, version)]
        else:
            found = list(core_faults(thing))
        if (thing["apiVersion"], thing["kind"]) not in KINDS:
            found += _unknown_words(thing)
        yield from (f"{where}: {fault}" for fault in found)
    for pod in site.pods():
        yield from (f"{pod.where}: {fault}" for fault in core_faults(pod.as_object()))


def _unknown_words(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in _WORDS and isinstance(value, str) and value not in _WORDS[key]:
                yield f"{key} is {value}; known: {', '.join(sorted(_WORDS[key]))}"
            yield from _unknown_words(value)
    elif isinstance(node, list):
        for value in node:
            yield from _unknown_words(value)


def restricted(site: Site) -> Iterator[str]:
    """The Pod Security Standard `restricted`, by its published list of controls."""
    enforced = {
        namespace["metadata"]["name"]
        for namespace in site.of_kind("Namespace")
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") == "restricted"
    }
    if enforced != {"scanloom"}:
        yield f"Namespace: restricted is enforced in {sorted(enforced)}, not in scanloom alone"
    for pod in site.pods():
        yield from (f"{pod.where}: {fault}" for fault in _unrestricted(pod))


def _unrestricted(pod: Pod) -> Iterator[str]:
    spec, own = pod.spec, pod.spec.get("securityContext", {})
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))
    for volume in spec.get("volumes", ()):
        if not (set(volume) - {"name"}) <= _VOLUMES:
            yield f"volume {volume['name']} is of a kind that is not allowed"
    if own.get("sysctls") or own.get("windowsOptions", {}).get("hostProcess"):
        yield "sysctls or host processes"
    for container in pod.containers:
        at, settings = container["name"], container.get("securityContext", {})
        if settings.get("runAsNonRoot", own.get("runAsNonRoot")) is not True:
            yield f"{at}: runAsNonRoot is not true"
        if settings.get("runAsUser", own.get("runAsUser")) in (0, None):
            yield f"{at}: no user, or root"
        if settings.get("allowPrivilegeEscalation") is not False:
            yield f"{at}: allowPrivilegeEscalation is not false"
        if settings.get("privileged"):
            yield f"{at}: privileged"
        if "ALL" not in settings.get("capabilities", {}).get("drop", ()):
            yield f"{at}: capabilities are not all dropped"
        if not set(settings.get("capabilities", {}).get("add", ())) <= {"NET_BIND_SERVICE"}:
            yield f"{at}: capabilities are added"
        profile = settings.get("seccompProfile", own.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield f"{at}: seccompProfile {profile}"
        if settings.get("procMount", "Default") != "Default" or any(
            p.get("hostPort") for p in container.get("ports", ())
        ):
            yield f"{at}: procMount or a port of the host"


def operator(site: Site) -> Iterator[str]:
    """What KubeRay's operator refuses although its definitions allow it."""
    for cluster in site.clusters:
        owner = cluster.owner
        where, name = f"{owner['kind']} {owner['metadata']['name']}", owner["metadata"]["name"]
        if len(name) > _LONGEST_NAME or not _DNS_1035.fullmatch(name):
            yield f"{where}: the name is longer than {_LONGEST_NAME} or no DNS label"
        yield from (f"{where}: {fault}" for fault in _cluster_faults(cluster))
        rules = _service_faults if owner["kind"] == "RayService" else _job_faults
        yield from (f"{where}: {fault}" for fault in rules(owner, cluster))


def _cluster_faults(cluster: RayCluster) -> Iterator[str]:
    spec, options = cluster.spec, cluster.spec.get("autoscalerOptions", {})
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", ())]
    names = [group["groupName"] for group in groups[1:]]
    environment = {variable["name"] for variable in groups[0]["template"]["spec"]["containers"][0].get("env", ())}
    if len(set(names)) < len(names):
        yield "names of groups repeat"
    for group in groups:
        at, parameters = group.get("groupName", "head"), group.get("rayStartParams", {})
        if {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters) and group.get("resources"):
            yield f"{at}: resources in rayStartParams and in `resources`"
        if "labels" in parameters:
            yield f"{at}: labels in rayStartParams"
        never = group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        if cluster.autoscales and options.get("version") == "v2" and not never:
            yield f"{at}: restartPolicy is not Never with autoscaler v2"
        if cluster.autoscales and group.get("suspend"):
            yield f"{at}: suspended with an autoscaler"
        if (
            group is not groups[0]
            and not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]
        ):
            yield f"{at}: minReplicas, replicas, maxReplicas are out of order"
    if not cluster.autoscales and "RAY_enable_autoscaler_v2" in environment:
        yield "RAY_enable_autoscaler_v2 without an autoscaler"
    if options.get("version") and "RAY_enable_autoscaler_v2" in environment:
        yield "autoscalerOptions.version and RAY_enable_autoscaler_v2"
    if spec.get("authOptions", {}).get("mode") == "token" and _version(spec.get("rayVersion")) < (2, 52, 0):
        yield "authOptions.mode token needs rayVersion 2.52.0 or later"
    annotations = cluster.owner["metadata"].get("annotations", {})
    if "gcsFaultToleranceOptions" in spec:
        if annotations.keys() & {"ray.io/ft-enabled", "ray.io/external-storage-namespace"}:
            yield "gcsFaultToleranceOptions and the annotations that came before them"
        if environment & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} or "redis-password" in groups[0].get(
            "rayStartParams", {}
        ):
            yield "gcsFaultToleranceOptions and Redis in the head's environment"
    elif "RAY_REDIS_ADDRESS" in environment:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
    if "REDIS_USERNAME" in environment or "redis-username" in groups[0].get("rayStartParams", {}):
        yield "a user of Redis outside gcsFaultToleranceOptions"


def _version(text: object) -> tuple[int, ...]:
    return tuple(int(part) for part in str(text or "0").split(".") if part.isdigit())


def _service_faults(service: Object, cluster: RayCluster) -> Iterator[str]:
    spec, annotations = service["spec"], service["metadata"].get("annotations", {})
    if not _DURATION.fullmatch(annotations.get("ray.io/initializing-timeout", "5m")):
        yield "ray.io/initializing-timeout is no duration"
    if "name" in cluster.spec["headGroupSpec"].get("headService", {}).get("metadata", {}):
        yield "headService has a name"
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type") not in (None, "None", "NewCluster", "NewClusterWithIncrementalUpgrade"):
        yield f"upgradeStrategy {upgrade['type']} is unknown"
    if upgrade.get("type") == "NewClusterWithIncrementalUpgrade":
        options = upgrade.get("clusterUpgradeOptions", {})
        if not cluster.autoscales:
            yield "an upgrade in steps needs the autoscaler"
        if not options.get("gatewayClassName"):
            yield "an upgrade in steps needs gatewayClassName"
        if not 0 < options.get("stepSizePercent", 0) <= options.get("maxSurgePercent", 100) <= 100:
            yield "stepSizePercent is above maxSurgePercent, or either no share"
        if options.get("intervalSeconds", 0) <= 0:
            yield "intervalSeconds is not positive"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"


def _job_faults(job: Object, cluster: RayCluster) -> Iterator[str]:
    spec = job["spec"]
    ends, rules = spec.get("shutdownAfterJobFinishes"), spec.get("deletionStrategy", {}).get("deletionRules")
    if spec.get("suspend") and not ends:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) and not ends:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if rules and (ends or spec.get("ttlSecondsAfterFinished")):
        yield "deletionRules exclude shutdownAfterJobFinishes and ttlSecondsAfterFinished"
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0):
        yield "InteractiveMode has no retries"
    if spec.get("submissionMode") == "SidecarMode" and spec.keys() & {"submitterPodTemplate", "submitterConfig"}:
        yield "SidecarMode has no submitter"
    if spec.get("activeDeadlineSeconds", 1) <= 0 or spec.get("backoffLimit", 0) < 0:
        yield "activeDeadlineSeconds or backoffLimit out of range"
    if QUEUE in job["metadata"].get("labels", {}):
        if not (spec.get("suspend") and ends):
            yield "Kueue wants suspend and shutdownAfterJobFinishes"
        if cluster.autoscales or len(cluster.workers) > 7:
            yield "Kueue wants no autoscaler and at most 7 groups"


def clusters(site: Site) -> Iterator[str]:
    """How we run Ray: heads without work, workers that drain, memory that is there, sizes that nobody else sets."""
    for cluster in site.clusters:
        head, at = cluster.head, f"{cluster.owner['kind']} {cluster.owner['metadata']['name']}"
        if cluster.workers and head.group is not None and head.group["rayStartParams"].get("num-cpus") != "0":
            yield f"{at}: the head takes work"
        if cluster.spec.get("authOptions", {}).get("mode") != "token":
            yield f"{at}: anybody in the cluster may submit jobs"
        for pod in (head, *cluster.workers):
            yield from (f"{pod.where}: {fault}" for fault in _pod_faults(pod))
        for pod in cluster.workers:
            yield from (f"{pod.where}: {fault}" for fault in _worker_faults(pod, cluster))
    for job in site.of_kind("RayJob"):
        at, spec = f"RayJob {job['metadata']['name']}", job["spec"]
        if not spec.get("submitterPodTemplate"):
            yield f"{at}: the submitter that the operator makes by itself is refused where pods are restricted"
        if spec.get("submitterConfig", {}).get("backoffLimit") != 0:
            yield f"{at}: the submitter would submit twice"
        missing = {
            "backoffLimit",
            "activeDeadlineSeconds",
            "preRunningDeadlineSeconds",
            "ttlSecondsAfterFinished",
        } - spec.keys()
        if missing or not spec.get("shutdownAfterJobFinishes"):
            yield f"{at}: goes on for ever, or is kept for ever: {sorted(missing) or 'shutdownAfterJobFinishes'}"


def _pod_faults(pod: Pod) -> Iterator[str]:
    spec, container = pod.spec, pod.spec["containers"][0]
    memory, limit = (pod.spec["containers"][0]["resources"].get(of, {}).get("memory") for of in ("requests", "limits"))
    if not memory or not limit or amount(memory) > amount(limit):
        yield "memory is not said, by which Ray sizes its object store"
        return
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", ())}
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    if shared.get("medium") != "Memory":
        yield "no memory at /dev/shm, so that Ray's objects lie on a disk"
    elif not amount(limit) * 0.25 <= amount(shared.get("sizeLimit", 0)) < amount(limit):
        yield f"/dev/shm of {shared.get('sizeLimit')} does not fit a limit of {limit}"
    if spec.get("automountServiceAccountToken") is not False:
        yield "has a token of the Kubernetes API where nothing needs one"
    if any("livenessProbe" in c or "readinessProbe" in c for c in spec["containers"]):
        yield "probes of its own in the place of the operator's, which know Serve"


def _worker_faults(pod: Pod, cluster: RayCluster) -> Iterator[str]:
    group, spec = pod.group or {}, pod.spec
    if cluster.autoscales == ("replicas" in group):
        yield "replicas and the autoscaler set the same number" if cluster.autoscales else "no replicas, no autoscaler"
    command = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    grace = spec.get("terminationGracePeriodSeconds", 30)
    if command[:2] != ["bash", "/opt/scanloom/drain.sh"] or "/opt/scanloom" not in _mounts(pod):
        yield "does not drain before it stops"
    elif not 0 < int(command[2]) < grace:
        yield f"drains for {command[2]} s within {grace} s of grace"
    asked, given = (pod.asks(GPU, of) for of in ("requests", "limits"))
    if asked != given:
        yield f"asks for {asked:g} GPUs and may use {given:g}"
    if asked and not any(tolerated.get("key") == GPU for tolerated in spec.get("tolerations", ())):
        yield "is not let onto nodes with GPUs"


def _mounts(pod: Pod) -> dict[str, str]:
    return {mount["mountPath"]: mount["name"] for mount in pod.spec["containers"][0].get("volumeMounts", ())}


def references(site: Site) -> Iterator[str]:
    """All that pods name is there."""
    held: dict[str, set[str]] = {kind: {thing["metadata"]["name"] for thing in site.of_kind(kind)} for kind in
            ("ConfigMap", "Secret", "ServiceAccount", "PriorityClass", "PersistentVolumeClaim")}  # fmt: skip
    held["Secret"] |= {thing["spec"]["target"]["name"] for thing in site.of_kind("ExternalSecret")} | site.own_secrets
    held["ConfigMap"].add("kube-root-ca.crt")
    for thing in site.objects:
        if thing["kind"] not in _OF_CLUSTERS and thing["metadata"].get("namespace") != "scanloom":
            yield f"{thing['kind']} {thing['metadata']['name']}: not in the namespace scanloom"
    for pod in site.pods():
        for kind, name in _named(pod):
            if name not in held[kind] and not (kind == "Secret" and name in _OPTIONAL):
                yield f"{pod.where}: no {kind} {name}"
        names = {volume["name"] for volume in pod.spec.get("volumes", ())}
        for container in pod.containers:
            for mount in container.get("volumeMounts", ()):
                if mount["name"] not in names:
                    yield f"{pod.where}: {container['name']} mounts {mount['name']}, which is no volume"
    roles = [
        a
        for a in site.of_kind("ServiceAccount")
        if "eks.amazonaws.com/role-arn" in a["metadata"].get("annotations", {})
    ]
    if not roles and "scanloom-s3" not in held["Secret"]:
        yield "no credentials of the store: neither the Secret scanloom-s3 nor a role"
    if roles and len(roles) < len(held["ServiceAccount"]):
        yield "one service account has a role and another none"


def _named(pod: Pod) -> Iterator[tuple[str, str]]:
    spec = pod.spec
    if "serviceAccountName" in spec:
        yield "ServiceAccount", spec["serviceAccountName"]
    if "priorityClassName" in spec:
        yield "PriorityClass", spec["priorityClassName"]
    for volume in spec.get("volumes", ()):
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"]
        if "secret" in volume:
            yield "Secret", volume["secret"]["secretName"]
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]
    for container in pod.containers:
        for source in container.get("envFrom", ()):
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source:
                    yield kind, source[key]["name"]


def images(site: Site) -> Iterator[str]:
    """One image of ours everywhere, and each by a version."""
    found = {(pod.where, c["image"]) for pod in site.pods() for c in pod.containers}
    for where, image in sorted(found):
        name, _, tag = image.rpartition("/")[2].partition(":")
        if "@sha256:" not in image and (not tag or tag == "latest"):
            yield f"{where}: image {image} without a version"
        if name == "scanloom" and not tag:
            yield f"{where}: the overlay sets no image"
    ours = {image for _, image in found if image.rpartition("/")[2].startswith("scanloom")}
    if len(ours) != 1:
        yield f"images of ours differ: {sorted(ours)}"


def network(site: Site) -> Iterator[str]:
    """Closed but for what is needed, and every selector meets a pod."""
    policies = site.of_kind("NetworkPolicy")
    closed = [p for p in policies if p["spec"]["podSelector"] == {} and not p["spec"].keys() & {"ingress", "egress"}]
    if not any(set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"} for policy in closed):
        yield "no NetworkPolicy closes what is not said"
    for policy in policies:
        at = f"NetworkPolicy {policy['metadata']['name']}"
        for peer in _peers(policy):
            block = peer.get("ipBlock", {})
            if block.get("cidr") == "0.0.0.0/0" and _METADATA_SERVER not in block.get("except", ()):
                yield f"{at}: the node's metadata can be reached, and with it the node's rights"
            if peer == {}:
                yield f"{at}: a peer that is everybody"
            if "podSelector" in peer and "namespaceSelector" not in peer and not _meets(peer["podSelector"], site):
                yield f"{at}: a peer's selector meets no pod"
    for thing in site.of_kind("NetworkPolicy", "PodDisruptionBudget", "PodMonitor", "Service"):
        key = "podSelector" if thing["kind"] == "NetworkPolicy" else "selector"
        selector = thing["spec"].get(key, {})
        if not _meets({"matchLabels": selector} if thing["kind"] == "Service" else selector, site):
            yield f"{thing['kind']} {thing['metadata']['name']}: its selector meets no pod"
    for place in {thing.get("data", {}).get("AWS_ENDPOINT_URL", "https://aws") for thing in site.of_kind("ConfigMap")}:
        address = urlsplit(place)
        port = address.port or {"https": 443, "http": 80}[address.scheme]
        if not any(
            port == p.get("port")
            for policy in policies
            for rule in policy["spec"].get("egress", ())
            for p in rule.get("ports", ())
        ):
            yield f"no NetworkPolicy lets anything out to the store's port {port}"
    for number in (8265, 8000, 8080, 44217, 44227):
        if not any(
            number == p.get("port")
            for policy in policies
            for rule in policy["spec"].get("ingress", ())
            for p in rule.get("ports", ())
        ):
            yield f"no NetworkPolicy lets anything in to port {number}"


def _peers(policy: Object) -> Iterator[Object]:
    for direction, key in (("ingress", "from"), ("egress", "to")):
        for rule in policy["spec"].get(direction, ()):
            yield from rule.get(key, ())


def _meets(selector: Mapping[str, object], site: Site) -> bool:
    wanted: Mapping[str, str] = selector.get("matchLabels", {})  # type: ignore[assignment]
    expressions: list[Object] = selector.get("matchExpressions", [])  # type: ignore[assignment]
    return any(
        all(pod.labels.get(key) == value for key, value in wanted.items())
        and all(pod.labels.get(e["key"]) in e.get("values", ()) for e in expressions)
        for pod in site.pods()
    )


def budgets(site: Site) -> Iterator[str]:
    """Disruption budgets that Kubernetes can reckon with, and quotas that hold what the site may grow to."""
    for budget in site.of_kind("PodDisruptionBudget"):
        if not isinstance(budget["spec"].get("minAvailable"), int) or "maxUnavailable" in budget["spec"]:
            yield f"PodDisruptionBudget {budget['metadata']['name']}: only a whole minAvailable works on Ray's pods"
    [quota] = site.of_kind("ResourceQuota")
    service, *jobs = sorted(site.clusters, key=lambda cluster: cluster.owner["kind"] != "RayService")
    twice = 2 if service.owner["spec"].get("upgradeStrategy", {}).get("type") == "NewCluster" else 1
    for resource, key in (("cpu", "requests.cpu"), ("memory", "requests.memory"), (GPU, f"requests.{GPU}")):
        allowed = amount(quota["spec"]["hard"].get(key, "0" if resource == GPU else "1Ti"))
        needed = twice * most(service, resource) + max((most(job, resource) for job in jobs), default=0)
        if needed > allowed:
            yield f"ResourceQuota: {key} {allowed:g} is below what the service (x {twice}) and a job need, {needed:g}"


def most(cluster: RayCluster, resource: str) -> float:
    """What a cluster asks for when it has grown as far as it may."""
    workers = sum(pod.asks(resource) * float((pod.group or {})["maxReplicas"]) for pod in cluster.workers)
    return cluster.head.asks(resource) + workers


def monitors(site: Site) -> Iterator[str]:
    """Heads declare what is scraped and called of them: with ports of their own the operator adds `metrics` alone."""
    endpoints = [e for monitor in site.of_kind("PodMonitor") for e in monitor["spec"]["podMetricsEndpoints"]]
    for cluster in site.clusters:
        declared = {port.get("name") for port in cluster.head.spec["containers"][0].get("ports", ())} | {"metrics"}
        serves = {"serve"} if cluster.owner["kind"] == "RayService" else set()
        wanted = {"gcs-server", "dashboard", *serves, *(endpoint["port"] for endpoint in endpoints)}
        if missing := wanted - declared:
            yield f"{cluster.head.where}: has no port {', '.join(sorted(missing))}"


def routes(site: Site) -> Iterator[str]:
    """What is routed from outside: by a Gateway that has its certificate, to the service's port, without metrics."""
    certified = site.own_secrets | {thing["spec"]["target"]["name"] for thing in site.of_kind("ExternalSecret")}
    for gateway in site.of_kind("Gateway"):
        for listener in gateway["spec"]["listeners"]:
            for reference in listener.get("tls", {}).get("certificateRefs", ()):
                if reference["name"] not in certified:
                    yield f"Gateway {gateway['metadata']['name']}: no Secret {reference['name']}"
    for route in site.of_kind("HTTPRoute"):
        for parent in route["spec"]["parentRefs"]:
            gateway = site.named("Gateway", parent["name"]) or {"spec": {"listeners": ()}}
            heard = {listener.get("hostname") for listener in gateway["spec"]["listeners"]}
            if deaf := [name for name in route["spec"]["hostnames"] if not heard & {name, None}]:
                yield f"HTTPRoute {route['metadata']['name']}: Gateway {parent['name']} does not listen to {deaf}"
        for rule in route["spec"]["rules"]:
            if any(m["path"]["value"] in ("/", "/metrics") for m in rule.get("matches", ({"path": {"value": "/"}},))):
                yield f"HTTPRoute {route['metadata']['name']}: routes /metrics to the world"
            for backend in rule["backendRefs"]:
                if backend != {"name": f"{site.service['metadata']['name']}-serve-svc", "port": 8000}:
                    yield f"HTTPRoute {route['metadata']['name']}: {backend} is not the Service of the RayService"


def queues(site: Site) -> Iterator[str]:
    """Jobs that wait in a queue of Kueue leave it one day: it is there, and has all that one job asks for."""
    held: dict[str, dict[str, float]] = {}
    for queue in site.of_kind("ClusterQueue"):
        name, quotas = queue["metadata"]["name"], held.setdefault(queue["metadata"]["name"], {})
        if queue["spec"]["namespaceSelector"]["matchLabels"] != {"kubernetes.io/metadata.name": "scanloom"}:
            yield f"ClusterQueue {name}: takes no jobs of the namespace scanloom alone"
        for flavor in (flavor for group in queue["spec"]["resourceGroups"] for flavor in group["flavors"]):
            if site.named("ResourceFlavor", flavor["name"]) is None:
                yield f"ClusterQueue {name}: no ResourceFlavor {flavor['name']}"
            quotas |= {resource["name"]: amount(resource["nominalQuota"]) for resource in flavor["resources"]}
    for cluster in site.clusters:
        job = cluster.owner
        if (name := job["metadata"].get("labels", {}).get(QUEUE)) is None:
            continue
        local = site.named("LocalQueue", name)
        quota = held.get(local["spec"]["clusterQueue"]) if local else None
        if quota is None:
            yield f"RayJob {job['metadata']['name']}: no LocalQueue {name}, or no ClusterQueue behind it"
            continue
        for resource in sorted({r for pod in (cluster.head, *cluster.workers) for r in pod.resources}):
            if most(cluster, resource) > quota.get(resource, 0):
                yield f"RayJob {job['metadata']['name']}: asks for more {resource} than queue {name} will ever have"


def entrypoint(job: Object) -> tuple[str, list[str]]:
    """The job and the arguments of a RayJob's command; ValueError where it is no `python -m jobs.NAME ...`."""
    words = shlex.split(job["spec"]["entrypoint"])
    if words[:2] != ["python", "-m"] or not words[2].startswith("jobs."):
        raise ValueError(f"{job['spec']['entrypoint']!r} is no job of ours")
    return words[2].removeprefix("jobs."), words[3:]


CHECKS: tuple[Callable[[Site], Iterator[str]], ...] = (
    schemas, restricted, operator, clusters, references, images, network, budgets, monitors, routes, queues,
)  # fmt: skip
