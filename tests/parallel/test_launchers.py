"""Which process this is, as each launcher says it; and that the scripts in launch/ say what is read here."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from dsv3_jax.config_reading import ConfigError
from dsv3_jax.parallel.launchers import FIRST_PORT, PORTS, Place, find_place, first_host

LAUNCH = Path(__file__).parents[2] / "launch"
FLAGS = {"--coordinator": "node1:8476", "--num-processes": "4", "--process-id": "3"}
JAX = {"JAX_COORDINATOR_ADDRESS": "node1:8476", "JAX_NUM_PROCESSES": "4"}
# What `srun --nodes=3 --ntasks=11` sets in its last task, and mpirun in rank 5 of 8 on two hosts.
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[07,09-10]",
    "SLURM_PROCID": "10", "SLURM_NTASKS": "11", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "2",
    "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-node1-77@1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        ({}, {}),
        ({"--num-processes": "1"}, SLURM),  # Each of several tasks a run of its own.
        ({}, {"JOB_COMPLETION_INDEX": "2"}),  # An indexed Job of independent runs.
        ({}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}),  # A batch script, not `srun`.
        ({}, SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}),
        ({}, {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}),
    ],
)
def test_alone(flags, environment):
    assert find_place(flags, environment) is None


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        (FLAGS, {}, ("node1:8476", 4, 3)),
        ({}, JAX | {"JAX_PROCESS_ID": "2"}, ("node1:8476", 4, 2)),
        ({}, JAX | {"JOB_COMPLETION_INDEX": "0"}, ("node1:8476", 4, 0)),
        ({"--coordinator": "[fe80::1]:99"}, SLURM, ("[fe80::1]:99", 11, 10)),  # A flag corrects a launcher.
        (FLAGS, SLURM | MPI | JAX, ("node1:8476", 4, 3)),
        ({}, MPI | JAX | {"JAX_NUM_PROCESSES": ""}, ("node1:8476", 8, 5)),
        ({}, SLURM | MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 8, 5)),  # mpirun within an allocation.
    ],
)
def test_places(flags, environment, expected):
    place = find_place(flags, environment)
    assert (place.coordinator, place.count, place.index) == expected


@pytest.mark.parametrize(("environment", "host"), [(SLURM, "gpu07"), (MPI, "10.96.0.1")])
def test_a_launcher_gives_all_one_address_and_other_jobs_another(environment, host):
    def address(**changes):
        return find_place({}, environment | changes).coordinator

    name, port = address().rsplit(":", 1)
    assert name == host and FIRST_PORT <= int(port) < FIRST_PORT + PORTS
    assert address() == address(SLURM_PROCID="3", SLURM_NODEID="0", OMPI_COMM_WORLD_RANK="7")
    assert address() != address(SLURM_JOB_ID="4712", PMIX_NAMESPACE="prterun-node1-78@1")


def test_all_ranks_on_one_host_need_no_name():
    place = find_place({}, MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"})
    assert place.coordinator.startswith("127.0.0.1:") and (place.count, place.index) == (8, 5)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],login", "node001"),
        ("rack[1-2]n[07,09-12],login", "rack1n07"),
        ("a1-b[3]-c,d", "a1-b3-c"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (SLURM, (2,)),  # Three tasks on this node, local rank 2; how many GPUs is not known.
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}, (4, 5)),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, None),  # --gpus-per-task has given each its own.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x11)", "SLURM_NODEID": "10"}, None),  # One a node: all.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2),4", "SLURM_NODEID": "2"}, (2,)),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "7"}, None),  # JAX reads it itself.
        (MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (2, 3)),
        (JAX | {"JAX_PROCESS_ID": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
    ],
)
def test_several_processes_on_a_host_share_its_gpus(environment, devices):
    assert find_place({}, environment).local_devices == devices


@pytest.mark.parametrize(
    ("flags", "environment", "lines"),
    [
        (
            {"--coordinator": "node1:8476"},
            {},
            [
                "  --num-processes = None: is missing, how many processes the job has: give it, or "
                "JAX_NUM_PROCESSES, as the others are given",
                "  --process-id = None: is missing, which of them this one is, from 0: give it, or "
                "JAX_PROCESS_ID, as the others are given",
            ],
        ),
        (
            {"--process-id": "4", "--num-processes": "4"},
            {"JAX_COORDINATOR_ADDRESS": "node1:8476"},
            ["  --process-id = '4': processes count from 0; below --num-processes = 4"],
        ),
        (
            {"--coordinator": "node1"},
            {"JAX_NUM_PROCESSES": "two", "JOB_COMPLETION_INDEX": "-1"},
            [
                "  --coordinator = 'node1': must be HOST:PORT of process 0, for example node1:8476",
                "  JAX_NUM_PROCESSES = 'two': must be a whole number, at least 1",
                "  JOB_COMPLETION_INDEX = '-1': must be a whole number, at least 0",
            ],
        ),
        (
            {},
            JAX | {"JAX_COORDINATOR_ADDRESS": "http://node1:70000", "JAX_PROCESS_ID": "0"},
            [
                "  JAX_COORDINATOR_ADDRESS = 'http://node1:70000': must be HOST:PORT of process 0, for "
                "example node1:8476"
            ],
        ),
        (
            {},
            MPI | {"OMPI_MCA_orte_hnp_uri": ""},  # Open MPI 5 on several hosts does not say where rank 0 is.
            [
                "  --coordinator = None: is missing, HOST:PORT of process 0, the same for all: give it, or "
                "JAX_COORDINATOR_ADDRESS, as the others are given"
            ],
        ),
    ],
)
def test_what_is_half_given_or_wrong_is_named_with_its_value_and_fix(flags, environment, lines):
    with pytest.raises(ConfigError) as caught:
        find_place(flags, environment)
    assert str(caught.value).splitlines()[1:] == lines


def test_kubernetes():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    name, spec = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    (container,) = spec["containers"]
    environment = {item["name"]: item["value"] for item in container["env"]}
    count = job["spec"]["completions"]
    assert job["spec"]["parallelism"] == count
    for index in range(count):  # Kubernetes sets the index.
        place = find_place({}, environment | {"JOB_COMPLETION_INDEX": str(index)})
        assert place == Place(f"{name}-0.{spec['subdomain']}:8476", count, index)
    assert spec["subdomain"] == service["metadata"]["name"]
    # What will not get better is not tried again; a lost process (4) and a stop (143) are.
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    options = [argument.split("=")[0] for argument in container["args"]]
    assert container["command"] == ["python", "train.py"] and options == ["--config", "--workdir"]


@pytest.fixture
def script(tmp_path):
    """Runs a script of launch/ with `srun`, `gcloud` and `scontrol` that write down how they were called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("export ACTIVATED=1\n")
    for name in ("srun", "gcloud", "scontrol"):
        fake = tmp_path / "bin" / name
        # Ends with the next of the codes in `codes`.
        fake.write_text(
            '#!/bin/bash\n[ -z "$SLURM_JOB_ID" ] || [ "$ACTIVATED" = 1 ] || exit 99\n'
            f'echo "{name}" >> calls; for x in "$@"; do echo "  $x" >> calls; done\n'
            "code=$(head -n 1 codes); sed -i 1d codes; exit ${code:-0}\n"
        )
        fake.chmod(0o755)

    def run(name, *arguments, codes=(), **variables):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "calls").unlink(missing_ok=True)
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PAUSE": "0"}
        done = subprocess.run(
            ["bash", LAUNCH / name, *arguments],
            cwd=tmp_path,
            env=path | variables,
            capture_output=True,
            text=True,
        )
        called = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, called, done.stderr

    return run


def test_slurm(script, tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    code, calls, _ = script("slurm.sbatch", "--config=a b.py", codes=[0], **job)
    step = ["srun", "  --kill-on-bad-exit=1", "  python", "  train.py", "  --config=a b.py"]
    assert (code, calls) == (0, step)
    # A lost process: again. Saved on request: back into the queue.
    code, calls, error = script("slurm.sbatch", "--config=a b.py", codes=[4, 137, 143], **job)
    assert (code, calls) == (0, 3 * step + ["scontrol", "  requeue", "  7"])
    assert "attempt 2 of 3 ended with exit code 137" in error
    # What would fail again, and what failed too often.
    assert script("slurm.sbatch", "--config=a b.py", codes=[2], **job)[:2] == (2, step)
    assert script("slurm.sbatch", "--config=a b.py", codes=[4, 4], ATTEMPTS="2", **job)[:2] == (4, 2 * step)


def test_tpu(script):
    code, calls, _ = script(
        "tpu.sh", "--config=a b.py", "--config.train.steps=5", codes=[1, 0], TPU="t", ZONE="z"
    )
    once = ["gcloud", "  compute", "  tpus", "  tpu-vm", "  ssh", "  t", "  --zone=z", "  --worker=all"]
    once.append(
        "  --command=cd dsv3 && exec .venv/bin/python train.py --config=a\\ b.py --config.train.steps=5"
    )
    assert (code, calls) == (0, 2 * once)
    code, calls, error = script("tpu.sh", ZONE="z")
    assert code != 0 and calls == [] and "name the TPU slice: TPU=NAME" in error
