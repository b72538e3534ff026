"""The manifests against the schemas that a cluster's API server has: an unknown field is an error."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kits.launching import ROOT

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema (extra `test`) is not installed")
kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate (extra `test`) is not installed"
)

MANIFESTS = sorted(path for kit in ("gpu", "tpu") for path in (ROOT / kit).glob("*.yaml"))
KUBERNETES = "1.33"  # a release that JobSet v0.12.0 supports
CODES_OF_A_WRONG_JOB = [1, 2]  # of trainjax.cli.main


def strict(schema: Any) -> Any:
    """A structural schema in which a field that is not named is an error, and not dropped in silence."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(part) for name, part in schema.items()}
    is_object = made.get("type") == "object" and isinstance(made.get("properties"), dict)
    is_open = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    return made | {"additionalProperties": False} if is_object and not is_open else made


@pytest.fixture(scope="module")
def check_jobset():
    made = json.loads(Path(__file__).with_name("jobset.json").read_text())
    (version,) = made["definition"]["spec"]["versions"]
    assert version["name"] == "v1alpha2"
    validator = jsonschema.Draft7Validator(strict(version["schema"]["openAPIV3Schema"]))

    def check(manifest: dict[str, Any]) -> None:
        assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        validator.validate(manifest)
        for job in manifest["spec"]["replicatedJobs"]:
            of_core = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}}
            check_core(of_core | {"spec": job["template"]["spec"]})
            pod = job["template"]["spec"]["template"]
            of_core = {"apiVersion": "v1", "kind": "Pod"}
            check_core(of_core | {"metadata": pod.get("metadata", {}), "spec": pod["spec"]})

    return check


def check_core(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def the_job(manifest: dict[str, Any]) -> dict[str, Any]:
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def the_pod(manifest: dict[str, Any]) -> dict[str, Any]:
    return the_job(manifest)["template"]["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_manifest_is_what_the_schemas_allow(path, check_jobset):
    check_jobset(read(path))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
@pytest.mark.parametrize(
    ("where", "typo"),
    [
        (lambda m: m["spec"], {"failurePolcy": {"maxRestarts": 1}}),
        (lambda m: m["spec"]["failurePolicy"], {"maxRestart": 1}),
        (lambda m: m["spec"]["failurePolicy"], {"maxRestarts": "many"}),
        (lambda m: m["spec"]["failurePolicy"]["rules"][0], {"action": "EndJobSet"}),
        (the_job, {"backofLimit": 0}),
        (the_pod, {"restartsPolicy": "Never"}),
        (lambda m: the_pod(m)["containers"][0], {"imagePullPolicyy": "Always"}),
        (lambda m: the_pod(m)["containers"][0], {"args": "sft"}),
    ],
)
def test_a_typo_is_found(path, where, typo, check_jobset):
    manifest = copy.deepcopy(read(path))
    where(manifest).update(typo)
    with pytest.raises(jsonschema.ValidationError):
        check_jobset(manifest)


def test_the_pod_is_checked_against_the_core_schema_too():
    (manifest,) = (read(path) for path in MANIFESTS if path.parent.name == "gpu")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": the_pod(manifest)}
    check_core(pod)
    with pytest.raises(kubernetes_validate.ValidationError):
        check_core(pod | {"spec": pod["spec"] | {"restartsPolicy": "Never"}})


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: f"{path.parent.name}/{path.name}")
class TestWhatNoSchemaChecks:
    def test_numbers_agree(self, path):
        manifest = read(path)
        (replicated,) = manifest["spec"]["replicatedJobs"]
        job, (container,) = the_job(manifest), the_pod(manifest)["containers"]
        hosts = replicated["replicas"] * job["completions"]
        (chips,) = (int(n) for n in container["resources"]["limits"].values())
        sizes = [int(n) for n in re.findall(r"--mesh\.\w+=(\d+)", " ".join(container["args"]))]
        assert job["completions"] == job["parallelism"]
        assert hosts * chips == math.prod(sizes)

    def test_a_wrong_job_ends_and_any_other_failure_goes_on(self, path):
        manifest = read(path)
        job, (container,) = the_job(manifest), the_pod(manifest)["containers"]
        (rule,) = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["values"] == CODES_OF_A_WRONG_JOB
        assert the_pod(manifest)["restartPolicy"] == "Never"  # or podFailurePolicy is refused
        assert job["backoffLimit"] == 0
        assert "--resume" in container["args"]
        assert manifest["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"

    def test_the_flags_are_those_of_the_job(self, path):
        from trainjax import cli
        from trainjax.recipes import sft

        job, *args = the_pod(read(path))["containers"][0]["args"]
        assert job == "sft"
        assert cli.parse(sft.Config, args, prog="trainjax sft").resume

    def test_volumes_are_mounted_that_are_there(self, path):
        pod = the_pod(read(path))
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        (out,) = (a for a in pod["containers"][0]["args"] if a.startswith("--out="))
        assert out.removeprefix("--out=").startswith(mounts["runs"])


def test_the_processes_on_gpus_find_one_another_by_what_the_manifest_sets():
    from trainjax.parallel import cluster

    (manifest,) = (read(path) for path in MANIFESTS if path.parent.name == "gpu")
    (container,) = the_pod(manifest)["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    by_kubernetes = {"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    found = cluster.find(given | by_kubernetes)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name, subdomain = manifest["metadata"]["name"], manifest["spec"]["network"]["subdomain"]
    assert found.kind == "Kubernetes"
    assert found.coordinator.split(":")[0] == f"{name}-{replicated['name']}-0-0.{subdomain}"
    assert (found.num_processes, found.process_id) == (the_job(manifest)["completions"], 1)
