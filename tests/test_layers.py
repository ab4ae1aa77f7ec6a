"""Imports point down only, so that each part can be read, and used, without those above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first; a module may import from its own rank only within its own package.
RANKS = [
    {
        "config",
        "config_checks",
        "config_reading",
        "mesh_checks",
        "compilation_cache",
        "pipeline.cells",
        "pipeline.dualpipe",
        "pipeline.schedules",
        "pipeline.settings",
    },
    {
        "precision",
        "parallel.mesh",
        "parallel.transport",
        "parallel.dispatch",
        "parallel.exchange",
        "parallel.gather",
    },
    {"model"},
    {"parallel", "pipeline"},
    {"data", "checkpoint"},
    {"convert"},
    {"inspection", "pretrained", "scaling"},
    {"generation"},
    {"training", "evaluation", "serving"},
    {"posttrain", "planning"},
    {"cli"},
]
# Siblings of one rank that may see each other.
ALLOWED = {
    ("config_checks", "config"),
    ("config_checks", "config_reading"),
    ("config_checks", "mesh_checks"),
    ("mesh_checks", "config"),
    ("config_checks", "pipeline.schedules"),
    ("config_checks", "pipeline.settings"),
    ("pipeline.settings", "config"),
    ("pipeline.settings", "mesh_checks"),
    ("pipeline.settings", "pipeline.schedules"),
    ("pipeline.settings", "pipeline.cells"),
    ("pipeline.schedules", "pipeline.cells"),
    ("pipeline.schedules", "pipeline.dualpipe"),
    ("pipeline.dualpipe", "pipeline.cells"),
    ("parallel.mesh", "parallel.transport"),
    ("parallel.exchange", "parallel.transport"),
    ("parallel.gather", "parallel.mesh"),
    ("parallel.exchange", "parallel.dispatch"),
}


def imports(path):
    """The modules that a file imports, also inside functions, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(dotted):
    """(package, rank) of a module of dsv3_jax; None for anything else."""
    names = dotted.split(".")
    if names[0] != "dsv3_jax" or len(names) == 1:
        return None
    for name in (".".join(names[1:3]), names[1]):
        for rank, members in enumerate(RANKS):
            if name in members:
                return name, rank
    raise AssertionError(f"{dotted} has no rank: add it to RANKS")


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def upward(path):
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = part(dotted)
    if here is None:
        return []
    wrong = []
    for name in imports(path):
        there = part(name)
        if there is None or there[0] == here[0] or (here[0], there[0]) in ALLOWED:
            continue
        if there[1] >= here[1] and not (here[0] == "parallel" and there[0] == "parallel.mesh"):
            wrong.append(f"{dotted} imports {name}")
    return wrong


@pytest.mark.parametrize("path", files("dsv3_jax"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_of_dsv3_jax(path):
    assert upward(path) == []


@pytest.mark.parametrize("path", files("pallas_kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_stand_alone(path):
    above = {name for name in imports(path) if name.split(".")[0] in ("dsv3_jax", "tests", "configs", "flax")}
    assert not above


def test_generation_needs_no_training():
    for path in files("dsv3_jax/generation"):
        assert not {name for name in imports(path) if name.startswith("dsv3_jax.training")}, path


def test_configs_need_only_the_config_module():
    for path in files("configs"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("dsv3_jax.")}
        assert ours <= {"config"}, path


def test_an_upward_import_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    bad = tmp_path / "dsv3_jax" / "model" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from dsv3_jax.training import step\n")
    assert (
        upward(bad)
        == [
            "dsv3_jax.model.bad imports dsv3_jax.training",
            "dsv3_jax.model.bad imports dsv3_jax.training.step",
        ]
        or len(upward(bad)) == 2
    )
