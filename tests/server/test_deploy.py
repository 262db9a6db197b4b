"""What `server/deploy` holds is right by the tools that read it, where they are installed, and by what a server has."""

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jax_engine.config import EngineConfig
from jax_engine.core.stats import EngineStats
from jax_engine.server.app import ROUTERS
from jax_engine.server.cli.flags import Options, engine_config
from jax_engine.server.cli.root import command_line, server_settings
from jax_engine.server.metrics.metrics import Metrics
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "server" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# What Kubernetes and the group's controller put in.
VARIABLES = {"LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "leader"}
SERVE = next(command for command in command_line().commands if command.name == "serve")


def documents(*names):
    files = [file for file in MANIFESTS if not names or file.stem in names]
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def pod_templates():
    """(name, template) of every kind of pod."""
    for document in documents():
        spec, name = document.get("spec", {}), document.get("metadata", {}).get("name")
        if document.get("kind") == "Deployment":
            yield name, spec["template"]
        elif document.get("kind") == "LeaderWorkerSet":
            for role in ("leader", "worker"):
                yield f"{name} {role}", spec["leaderWorkerTemplate"][f"{role}Template"]


PODS = dict(pod_templates())


def understood(arguments, rank=None):
    """The settings of a `serve` command; fails for a flag or a value that it does not know."""
    assert arguments[0] == "serve"
    flags = {name: flag for flag in SERVE.flags for name in flag.names}
    values, sources = {}, {}
    variables = VARIABLES | ({} if rank is None else {"LWS_WORKER_INDEX": rank})
    for argument in arguments[1:]:
        argument = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], argument)
        if not argument.startswith("--"):
            assert "model" not in values, f"{argument}: a second model"
            values["model"] = argument
            continue
        name, _, text = argument.partition("=")
        assert name in flags, f"{name} is no flag of jax-engine serve"
        values[flags[name].field] = flags[name].value([text or "true"])
    options = Options(values, sources)
    config = engine_config(options)
    return config, server_settings(options, config)


def routes():
    """The paths of all routes."""
    service = Service(EngineConfig(), ServerSettings(), on_failure=lambda: None)
    return {route.path for make_router in ROUTERS for route in make_router(service).routes}


@pytest.mark.parametrize("name", PODS)
def test_the_commands_of_pods_are_understood_and_their_ports_and_probes_are_the_servers(name):
    spec = PODS[name]["spec"]
    (container,) = spec["containers"]
    config, settings = understood(container["args"], rank="1" if name.endswith("worker") else "0")
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
    if name.endswith("worker"):
        assert "readinessProbe" not in container, "it has no HTTP"
    else:
        assert ports["http"] == settings.port
        assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
        assert container["livenessProbe"]["httpGet"] == {"path": "/live", "port": "http"}
        assert {"/health", "/live"} <= routes()
        annotations = PODS[name]["metadata"]["annotations"]
        assert annotations["prometheus.io/port"] == str(settings.port)
        assert annotations["prometheus.io/path"] in routes()
        wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert spec["terminationGracePeriodSeconds"] > wait + settings.shutdown_timeout
    devices = {key: int(value) for key, value in container["resources"]["limits"].items() if "/" in key}
    (count,) = devices.values()
    assert count * getattr(config, "nnodes", 1) == config.tensor_parallel_size * config.data_parallel_size
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["cache"] in (DEPLOY / "Dockerfile").read_text()
    assert set(mounts) == {volume["name"] for volume in spec["volumes"]}


def test_services_and_autoscalers_point_at_pods_that_there_are():
    labels = [template["metadata"]["labels"] for template in PODS.values()]
    claims = {
        document["metadata"]["name"] for document in documents() if document.get("kind") == "PersistentVolumeClaim"
    }
    for document in documents():
        spec = document.get("spec", {})
        if document.get("kind") == "Service":
            matching = [own for own in labels if spec["selector"].items() <= own.items()]
            assert len(matching) == 1, document["metadata"]["name"]
            assert [port["targetPort"] for port in spec["ports"]] == ["http"]
        if document.get("kind") == "Deployment":
            assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
            volumes = spec["template"]["spec"]["volumes"]
            used = {
                volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume
            }
            assert used <= claims
    (autoscaler,) = documents("hpa")
    target = autoscaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) in {(d.get("kind"), d["metadata"]["name"]) for d in documents("gpu")}


def test_the_autoscaler_follows_a_metric_that_the_server_has():
    shown = Metrics("m").render([EngineStats(num_waiting=3)]).decode()
    families = {family.name: family for family in text_string_to_metric_families(shown)}
    (values,) = documents("prometheus_adapter")
    (rule,) = values["rules"]["custom"]
    name = rule["seriesQuery"].partition("{")[0]
    assert [sample.value for sample in families[name].samples] == [3]
    (autoscaler,) = documents("hpa")
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_a_group_of_hosts_has_one_that_answers_and_others_that_follow():
    (group,) = (document for document in documents() if document.get("kind") == "LeaderWorkerSet")
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    assert size == int(VARIABLES["LWS_GROUP_SIZE"])
    leader, worker = (PODS[f"jax-engine-slice {role}"]["spec"]["containers"][0] for role in ("leader", "worker"))
    config, settings = understood(leader["args"], rank="0")
    following, silent = understood(worker["args"], rank="1")
    assert (settings.headless, silent.headless) == (False, True)
    assert {config.nnodes, following.nnodes} == {size}
    assert (config.master_addr, config.master_port) == (following.master_addr, following.master_port)
    ports = {port["containerPort"] for port in leader["ports"]}
    assert {config.master_port, config.master_port + 1} <= ports
    for field in ("model", "tensor_parallel_size", "max_model_len"):
        assert getattr(config, field) == getattr(following, field)


def test_the_image_holds_every_package_and_its_extras_exist():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = {line.split()[-1] for line in lines if line.startswith("COPY") and len(line.split()) == 3}
    assert copied - {"./"} == set(project["tool"]["setuptools"]["package-dir"].values())
    extras = set(re.findall(r"EXTRA=(\w+)", "\n".join(lines)))
    assert extras == {"cuda", "tpu"} <= set(project["project"]["optional-dependencies"])
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == copied - {"./"} | {"pyproject.toml", "README.md", "LICENSE"}
    images = {template["spec"]["containers"][0]["image"] for template in PODS.values()}
    assert images == {f"jax-engine:{extra}" for extra in extras}
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert entry == 'ENTRYPOINT ["jax-engine"]'


def test_nginx_keeps_nothing_back_and_agrees_with_the_server():
    text = (DEPLOY / "nginx.conf").read_text()
    for line in ("proxy_buffering off;", "proxy_http_version 1.1;", "client_max_body_size 16m;"):
        assert line in text
    assert ServerSettings().max_request_body_bytes == 16 * 2**20
    (idle,) = re.findall(r"keepalive_timeout (\d+)s;", text)
    assert int(idle) < ServerSettings().timeout_keep_alive
    (closed,) = re.findall(r"location ~ \^/\(([^)]+)\)\$", text)
    assert {f"/{path}" for path in closed.split("|")} <= routes()


def test_skypilots_task_starts_a_server_that_it_can_ask():
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    command = task["run"].replace('"$MODEL"', task["envs"]["MODEL"]).split()
    assert command.pop(0) == "jax-engine"
    arguments = re.sub(r"(--[\w-]+) (?!--)", r"\1=", " ".join(command)).split()
    config, settings = understood(arguments)
    assert config.model == task["envs"]["MODEL"]
    assert task["resources"]["ports"] == settings.port
    assert task["service"]["readiness_probe"]["path"] in routes()


def tool(name):
    """The path of a tool, beside this interpreter or in the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_kubernetes_takes_the_manifests(file):
    validate = pytest.importorskip("kubernetes_validate")
    checked = 0
    for document in yaml.safe_load_all(file.read_text()):
        if document.get("kind") == "LeaderWorkerSet":  # a kind of its own; its pods are Kubernetes'
            for name in ("leaderTemplate", "workerTemplate"):
                template = document["spec"]["leaderWorkerTemplate"][name]
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
                validate.validate({**pod, "spec": template["spec"]}, "1.34", strict=True)
        elif "kind" in document:
            validate.validate(document, "1.34", strict=True)
        checked += 1
    assert checked


def test_kubernetes_refuses_what_it_does_not_know():
    validate = pytest.importorskip("kubernetes_validate")
    deployment = next(document for document in documents("gpu") if document["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, "1.34", strict=True)


def test_hadolint_takes_the_dockerfile():
    found = subprocess.run([tool("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stdout


def test_nginx_takes_the_configuration(tmp_path):
    command = [tool("nginx"), "-t", "-p", tmp_path, "-c", DEPLOY / "nginx.conf"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_skypilot_takes_the_task(tmp_path):
    if importlib.util.find_spec("sky") is None:
        pytest.skip("skypilot is not installed")
    script = "import sky, sys; print(sky.Task.from_yaml(sys.argv[1]).service.readiness_path)"
    command = [sys.executable, "-c", script, DEPLOY / "skypilot.yaml"]
    environment = {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "/health"


def test_tokens_pass_nginx_as_they_come(server, tmp_path):
    """The configuration as it is, but for ports; of its two servers one is not there."""
    with socket.socket() as free, socket.socket() as nobody:
        for one in (free, nobody):
            one.bind(("127.0.0.1", 0))
        port, closed = free.getsockname()[1], nobody.getsockname()[1]
    text = (DEPLOY / "nginx.conf").read_text().replace("listen 8080", f"listen 127.0.0.1:{port}")
    text = text.replace("127.0.0.1:8000", server.url.partition("//")[2]).replace(
        "127.0.0.1:8001", f"127.0.0.1:{closed}"
    )
    (tmp_path / "nginx.conf").write_text(text)
    command = [tool("nginx"), "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-g", "daemon off;"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        server.wait_for(lambda: answers(url), what="nginx's start", seconds=20)
        body = {"prompt": "Count:", "max_tokens": 60, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            times = [time.monotonic() for chunk in response.iter_text() if chunk.strip()]
        assert len(times) > 20, "what is kept back comes in few pieces"
        assert httpx.get(f"{url}/metrics").status_code == 403
        assert httpx.post(f"{url}/sleep").status_code == 403
        assert [httpx.get(f"{url}/health").status_code for _ in range(4)] == [200] * 4
    finally:
        process.terminate()
        assert process.wait(20) == 0


def answers(url):
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
