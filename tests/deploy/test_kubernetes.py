"""The manifests against KubeRay's and Kubernetes' own schemas, and against each other and the program."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuner.config.schema import Config
from tuner.driver.command_line import load
from tuner.driver.trial_source import overrun_seconds
from tuner.study.study import parse_storage

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
MANIFESTS = {p.name: list(yaml.safe_load_all(p.read_text())) for p in sorted(FOLDER.glob("*.yaml"))}
ALL = [(name, manifest) for name, manifests in MANIFESTS.items() for manifest in manifests]
KUBERAY = [(name, m) for name, m in ALL if m["apiVersion"].startswith("ray.io/")]
PLAIN = [(name, m) for name, m in ALL if not m["apiVersion"].startswith("ray.io/")]
OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.30", "1.37"


def label(value: Any) -> str | None:
    return value if isinstance(value, str) else value.get("kind", "")


def one(kind: str) -> dict[str, Any]:
    (found,) = [manifest for _, manifest in ALL if manifest["kind"] == kind]
    return found


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping below."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(item)


# ---- schemas ----


@pytest.fixture(scope="module")
def kuberay_schemas() -> dict[str, Any]:
    """KubeRay's v1 schemas by kind, which allow no other fields: Kubernetes would drop these unsaid."""
    given = os.environ.get("KUBERAY_CRDS")
    beside, within = ROOT.parent / "shared", ROOT / "shared"
    places = [Path(given)] if given else [place / "data" / "kuberay-crds" for place in (beside, within)]
    found = [path for place in places for path in sorted(place.glob("ray.io_*.yaml"))]
    if not found:
        pytest.skip("KubeRay's custom resource definitions are not here; KUBERAY_CRDS names their folder")
    schemas = {}
    for path in found:
        definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schemas[definition["spec"]["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    return schemas


def strict(schema: Any) -> Any:
    """Kubernetes' dialect of OpenAPI as JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if result.get("x-kubernetes-int-or-string") is True:
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    properties = result.get("properties")
    is_schema = isinstance(properties, dict) and result.get("type") == "object"
    if is_schema and not result.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def faults(manifest: dict[str, Any], schema: Any) -> list[str]:
    import jsonschema

    # The API server checks metadata itself; of the definition it is a mere object.
    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{'/'.join(map(str, e.path))}: {e.message}" for e in validator.iter_errors(manifest)]


@pytest.mark.parametrize(("file", "manifest"), KUBERAY, ids=label)
def test_kuberay_accepts_it(kuberay_schemas: dict[str, Any], file: str, manifest: dict[str, Any]) -> None:
    assert faults(manifest, kuberay_schemas[manifest["kind"]]) == []


def test_a_mistake_would_be_found(kuberay_schemas: dict[str, Any]) -> None:
    text = (FOLDER / "rayjob.yaml").read_text()
    for right, wrong in (
        ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinish: true"),
        ("backoffLimit: 0", "backoffLimit: never"),
        ("mode: token", "mode: tokens"),
        ("readOnly: true", "readonly: true"),
        ("minReplicas: 1", "minimum: 1"),
        ("medium: Memory", "medium: [Memory]"),
    ):
        assert right in text
        wrong_manifest = yaml.safe_load(text.replace(right, wrong))
        assert faults(wrong_manifest, kuberay_schemas["RayJob"]) != [], wrong


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, NEWEST_KUBERNETES])
@pytest.mark.parametrize(("file", "manifest"), PLAIN, ids=label)
def test_kubernetes_accepts_it(file: str, manifest: dict[str, Any], version: str) -> None:
    pytest.importorskip("kubernetes_validate").validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml", "raycluster.yaml"])
def test_kubernetes_accepts_the_pods_of_kuberay_and_their_metadata(name: str) -> None:
    """Its own schemas say more about pods than KubeRay's copies do."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    (manifest,) = MANIFESTS[name]
    cluster = ray_cluster(manifest)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": manifest["metadata"], **group["template"]}
        kubernetes.validate(pod, NEWEST_KUBERNETES, strict=True)


def test_a_mistake_in_a_plain_manifest_would_be_found() -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    text = (FOLDER / "cronjob.yaml").read_text()
    for right, wrong in (
        ("concurrencyPolicy: Forbid", "concurrency: Forbid"),
        ("restartPolicy: Never", "restartPolicy: [Never]"),
        ("secretKeyRef: {name", "secretKeyRef: {named"),
    ):
        assert right in text
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(yaml.safe_load(text.replace(right, wrong)), NEWEST_KUBERNETES, strict=True)


# ---- what no schema says ----


def ray_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("jobTemplate", spec).get("rayClusterSpec", spec)
    return found


def ray_jobs() -> list[tuple[str, dict[str, Any]]]:
    (job,), (cron,) = MANIFESTS["rayjob.yaml"], MANIFESTS["raycronjob.yaml"]
    return [("rayjob.yaml", job["spec"]), ("raycronjob.yaml", cron["spec"]["jobTemplate"])]


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [(name, spec) for name, m in ALL for spec in walk(m) if "containers" in spec]


def test_all_rays_are_the_same() -> None:
    clusters = [ray_cluster(m) for _, m in KUBERAY]
    assert len(clusters) == 3
    assert clusters[0] == clusters[1] == clusters[2]


def test_ray_is_the_tested_one_and_asks_for_a_token() -> None:
    cluster = ray_cluster(one("RayCluster"))
    assert cluster["rayVersion"] == metadata.version("ray")
    assert cluster["authOptions"]["mode"] == "token"


def test_gpus_are_whole_and_those_asked_for_are_those_one_gets() -> None:
    config = tuned()
    (group,) = ray_cluster(one("RayCluster"))["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    asked, given = container["resources"]["requests"], container["resources"]["limits"]
    assert asked == given
    assert given["nvidia.com/gpu"] % config.num_workers == 0
    assert int(given["cpu"]) >= given["nvidia.com/gpu"]  # every worker takes a core
    head = ray_cluster(one("RayCluster"))["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize(("file", "spec"), pods(), ids=label)
def test_pods_hold_what_they_mount_and_have_few_rights(file: str, spec: dict[str, Any]) -> None:
    claims = [m["metadata"]["name"] for m in walk(MANIFESTS) if m.get("kind") == "PersistentVolumeClaim"]
    maps = [m["metadata"]["name"] for _, m in ALL if m["kind"] == "ConfigMap"]
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    templates = {"data"} if file == "postgresql.yaml" else set()
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    for volume in volumes.values():
        assert volume.get("persistentVolumeClaim", {}).get("claimName", claims[0]) in claims
        assert volume.get("configMap", {}).get("name", maps[0]) in maps
    for container in spec["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys() | templates
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["resources"].keys() == {"requests", "limits"}


def test_secrets_are_made_by_the_commands_that_stand_there() -> None:
    texts = [path.read_text() for path in [ROOT / "deploy" / "README.md", *FOLDER.glob("*.yaml")]]
    made = re.findall(r"create secret generic ([\w-]+) --from-literal=(\w+)=", "\n".join(texts))
    references = [m["secretKeyRef"] for _, manifest in ALL for m in walk(manifest) if "secretKeyRef" in m]
    assert {(r["name"], r["key"]) for r in references} <= set(made)
    assert (ray_cluster(one("RayCluster"))["authOptions"]["secretName"], "auth_token") in made
    assert not any(manifest["kind"] == "Secret" for _, manifest in ALL)  # none is to be committed


def test_one_image_everywhere_that_of_the_project() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    image = f"lora-batch-tuner:{version[1]}"
    used = {c["image"] for file, spec in pods() for c in spec["containers"] if file != "postgresql.yaml"}
    assert used == {image}
    assert f"-t {image} " in (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"-t {image} " in (ROOT / "deploy" / "README.md").read_text()


# ---- what they run ----


def tuned(tmp_path: Path | None = None, *flags: str) -> Config:
    """The ConfigMap's tune.yaml as the program reads it."""
    text = one("ConfigMap")["data"]["tune.yaml"]
    values = yaml.safe_load(text)
    assert isinstance(values, dict)
    if tmp_path is None:
        return Config.model_validate(values)
    file = tmp_path / "tune.yaml"
    file.write_text(text)
    return load([f"--config={file}", *flags])[0]


def arguments(command: list[str], spec: dict[str, Any]) -> list[str]:
    """Those of tuner.run behind the --config of the ConfigMap, which the container mounts."""
    flag, path, *rest = command
    assert flag == "--config"
    mounts = {m["mountPath"]: m["name"] for m in spec["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    volume = volumes[mounts[str(Path(path).parent)]]
    assert Path(path).name in one("ConfigMap")["data"]
    assert volume["configMap"]["name"] == one("ConfigMap")["metadata"]["name"]
    return rest


@pytest.mark.parametrize(("file", "job"), ray_jobs(), ids=label)
def test_a_ray_job_runs_the_program(tmp_path: Path, file: str, job: dict[str, Any]) -> None:
    command = shlex.split(job["entrypoint"])
    assert command[:3] == ["python", "-m", "tuner.run"]
    head = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    config = tuned(tmp_path, *arguments(command[3:], head))
    assert config.cluster.device == "cuda"
    (data,) = [m["mountPath"] for m in head["containers"][0]["volumeMounts"] if m["name"] == "data"]
    for path in (config.output_dir, config.model, config.data.train):
        assert str(path).startswith(f"{data}/")


def test_the_cron_job_submits_the_program(tmp_path: Path) -> None:
    spec = one("CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    command = [*container["command"], *container["args"]]
    assert command[:4] == ["python", "-m", "cluster.jobs", "submit"]
    ours, theirs = command[3 : command.index("--") + 1], command[command.index("--") + 1 :]
    assert tuned(tmp_path, *arguments(theirs, spec)).study.name == "nightly"
    head = ray_cluster(one("RayCluster"))["headGroupSpec"]["template"]["spec"]
    assert arguments(theirs, head) == []  # the job finds the file at the same place
    assert f"http://{one('RayCluster')['metadata']['name']}-head-svc:8265" in ours
    jobs = pytest.importorskip("cluster.jobs")
    options = jobs._parser().parse_args([*ours, *theirs])
    assert options.arguments == theirs


def test_the_study_in_postgresql_is_the_one_that_the_manifest_starts(tmp_path: Path) -> None:
    text = one("ConfigMap")["data"]["tune.yaml"]
    commented = re.search(r"# (storage: postgresql\S+)", text)
    assert commented is not None
    file = tmp_path / "tune.yaml"
    file.write_text(text.replace(f"# {commented[1]}", commented[1]))
    url = parse_storage(str(load([f"--config={file}"])[0].study.storage))
    (container,) = one("StatefulSet")["spec"]["template"]["spec"]["containers"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    assert url.host == one("Service")["metadata"]["name"] == one("StatefulSet")["spec"]["serviceName"]
    assert (url.username, url.database) == (environment["POSTGRES_USER"], environment["POSTGRES_DB"])
    assert url.password is None
    (password,) = [e["valueFrom"] for e in container["env"] if e["name"] == "POSTGRES_PASSWORD"]
    head = ray_cluster(one("RayCluster"))["headGroupSpec"]["template"]["spec"]["containers"][0]
    (given,) = [e["valueFrom"]["secretKeyRef"] for e in head["env"] if e["name"] == "PGPASSWORD"]
    assert given == {**password["secretKeyRef"], "optional": True}


@pytest.mark.parametrize(("file", "job"), ray_jobs(), ids=label)
def test_deadlines_of_a_ray_job(file: str, job: dict[str, Any]) -> None:
    budget = tuned().study.time_budget
    assert budget is not None
    needed = job["preRunningDeadlineSeconds"] + budget + overrun_seconds(budget) + 600
    assert needed <= job["activeDeadlineSeconds"] < 86_400  # before the next night
    assert job["backoffLimit"] == 0
    # Kueue manages a RayJob only like this, and KubeRay allows a TTL only like this.
    assert job["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in job


def test_nights_do_not_overlap() -> None:
    cron = one("CronJob")["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    budget = tuned().study.time_budget
    assert budget is not None
    job = cron["jobTemplate"]["spec"]
    assert budget + overrun_seconds(budget) + 600 <= job["activeDeadlineSeconds"] < 86_400
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    for schedule in (cron["schedule"], one("RayCronJob")["spec"]["schedule"]):
        assert re.fullmatch(r"[0-5]?\d ([01]?\d|2[0-3]) \* \* \*", schedule)  # once a day


def test_kueue_and_the_alpha_gate_are_named() -> None:
    assert "kueue.x-k8s.io/queue-name" in one("RayJob")["metadata"]["labels"]
    text = (FOLDER / "raycronjob.yaml").read_text()
    assert "alpha" in text
    assert "featureGates" in text
