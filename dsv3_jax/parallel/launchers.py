"""Which process of which job this one is, from flags or from what a launcher put into the environment.

    flags            --coordinator, --num-processes, --process-id
    JAX's variables  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    Open MPI         OMPI_COMM_WORLD_SIZE and _RANK; before SLURM, whose variables mpirun's processes see too
    SLURM            SLURM_STEP_NODELIST, SLURM_STEP_NUM_TASKS, SLURM_PROCID: what `srun` sets
    Kubernetes       JOB_COMPLETION_INDEX of an indexed Job, with JAX's variables for the rest

Each of the three values is taken from the first of these that has it, so that a flag corrects a launcher.
One process, however it is said, is a run alone. On TPU slices JAX finds everything by itself.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.config_reading import ConfigError, Problem

FLAGS = {
    "--coordinator": "HOST:PORT of process 0, the same for all",
    "--num-processes": "how many processes the job has",
    "--process-id": "which of them this one is, from 0",
}
# The same, as variables.
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Ports above Linux's ephemeral range: a connection that is opened cannot have taken them.
FIRST_PORT, PORTS = 61440, 4096


@dataclass(frozen=True)
class Place:
    """This process among those of its job."""

    coordinator: str  # HOST:PORT at which process 0 waits for the others.
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None  # GPUs of this host that are this process's; None: all.


class _Given(NamedTuple):
    """A value, and the flag or variable that it is from."""

    source: str
    text: str


def find_place(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> Place | None:
    """The place that flags and environment give this process; None for a run alone.

    Args:
      flags: texts of `FLAGS`, None where not given.
      environment: `os.environ`.

    Raises:
      ConfigError: values that are missing or make no sense, each with the flag or variable and the fix.
    """
    launched = _open_mpi(environment) or _slurm(environment) or (None, None, None)
    index = launched[2] or _variable(environment, "JOB_COMPLETION_INDEX")
    found = []
    for flag, variable, other in zip(FLAGS, VARIABLES, (*launched[:2], index), strict=True):
        text = flags.get(flag)
        found.append(_Given(flag, text) if text is not None else _variable(environment, variable) or other)
    # An index alone is an indexed Job of independent runs.
    if found[0] is None and found[1] is None and flags.get("--process-id") is None:
        return None
    if found[1] is not None and found[1].text.strip() == "1":
        return None
    coordinator, count, index = _checked(found)
    mine = None if "JAX_LOCAL_DEVICE_IDS" in environment else _share_of_devices(environment)
    return Place(coordinator, count, index, mine)


def _checked(found: list[_Given | None]) -> tuple[str, int, int]:
    problems = []
    for (flag, meaning), variable, given in zip(FLAGS.items(), VARIABLES, found, strict=True):
        if given is None:
            fix = f"is missing, {meaning}: give it, or {variable}, as the others are given"
            problems.append(Problem(flag, None, fix))
    address, count, index = found
    if address is not None and not _is_address(address.text):
        fix = "must be HOST:PORT of process 0, for example node1:8476"
        problems.append(Problem(*address, fix))
    for given, least in ((count, 1), (index, 0)):
        if given is not None and (not given.text.strip().isdecimal() or int(given.text) < least):
            problems.append(Problem(*given, f"must be a whole number, at least {least}"))
    if problems or address is None or count is None or index is None:
        raise ConfigError(problems)
    if int(index.text) >= int(count.text):
        fix = f"processes count from 0; below {count.source} = {count.text}"
        raise ConfigError([Problem(*index, fix)])
    return address.text, int(count.text), int(index.text)


def _is_address(text: str) -> bool:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):([0-9]+)", text)
    return match is not None and 0 < int(match[2]) < 2**16


def _variable(environment: Mapping[str, str], name: str) -> _Given | None:
    return _Given(name, environment[name]) if environment.get(name) else None


def _port(job: str) -> int:
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


_Launched = tuple[_Given | None, _Given | None, _Given | None]  # Coordinator, count, index.


def _open_mpi(environment: Mapping[str, str]) -> _Launched | None:
    count = _variable(environment, "OMPI_COMM_WORLD_SIZE")
    index = _variable(environment, "OMPI_COMM_WORLD_RANK")
    if count is None or index is None:
        return None
    address = None
    job = environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid") or ""
    # Open MPI 4 says where mpirun runs, and rank 0 is there unless a host file says otherwise.
    uri = re.search(r"tcp6?://\[?([^\],/]+?)[\],:]", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == count.text:
        address = _Given("OMPI_COMM_WORLD_LOCAL_SIZE", f"127.0.0.1:{_port(job)}")
    elif uri:
        host = f"[{uri[1]}]" if ":" in uri[1] else uri[1]
        address = _Given("OMPI_MCA_orte_hnp_uri", f"{host}:{_port(job)}")
    return address, count, index


def _slurm(environment: Mapping[str, str]) -> _Launched | None:
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:  # In an allocation or a batch script, but not started by `srun`.
        return None
    job = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    address = _Given("SLURM_STEP_NODELIST", f"{first_host(nodes)}:{_port(job)}")
    count = _variable(environment, "SLURM_STEP_NUM_TASKS") or _variable(environment, "SLURM_NTASKS")
    return address, count, _variable(environment, "SLURM_PROCID")


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "rack[1-2]n[07,09-12],login" is "rack1n07"."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0]) if match else nodes


def _share_of_devices(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """This process's GPUs where a launcher started several on a host and each sees all; None: all it sees."""
    if "OMPI_COMM_WORLD_RANK" in environment:
        texts = environment.get("OMPI_COMM_WORLD_LOCAL_RANK"), environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    elif "SLURM_STEP_NODELIST" in environment:
        texts = environment.get("SLURM_LOCALID"), _tasks_of_this_node(environment)
    else:
        return None
    if None in texts or not all(str(text).isdecimal() for text in texts):
        return None
    local, processes = int(texts[0] or 0), int(texts[1] or 1)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    # Unknown, it is one a process, as JAX assumes too.
    devices = len(visible.split(",")) if visible else processes
    if processes == 1 or devices < processes:  # Alone on the host, or given its own already.
        return None
    share = devices // processes
    return tuple(range(local * share, (local + 1) * share))


def _tasks_of_this_node(environment: Mapping[str, str]) -> str | None:
    """SLURM's "4(x2),3" means nodes of 4, 4 and 3 tasks."""
    tasks: list[str] = []
    for item in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item):
            tasks += [match[1]] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else None
