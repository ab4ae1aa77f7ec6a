"""Meshes that do not fit are refused before anything is compiled, and every mesh that is proposed fits."""

import dataclasses
import itertools
import re

import pytest

from dsv3_jax.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from dsv3_jax.config_checks import check_mesh

CONFIG = Config(model=ModelConfig(n_layers=3, moe=MoEConfig(n_experts=12)), train=TrainConfig(batch_size=24))


def refused(devices=8, config=CONFIG, **mesh):
    return check_mesh(dataclasses.replace(config, mesh=MeshConfig(**mesh)), devices)


def proposals(problem):
    axes = re.compile(r"(pipe|data|expert)=(\d+)")
    parts = problem.fix.split("nearest that fit: ")[1].split(", or ")
    return [{name: int(size) for name, size in axes.findall(part)} for part in parts]


@pytest.mark.parametrize(
    ("mesh", "field", "text", "first"),
    [
        (dict(data=8, expert=3), "mesh.data", "data=8 x expert=3 does not fit 8", dict(data=8, expert=1)),
        (dict(data=-1, expert=3), "mesh.expert", "expert=3 does not fit 8", dict(data=2, expert=3)),
        (dict(data=1, expert=8), "mesh.expert", "must divide model.moe.n_experts", dict(data=1, expert=6)),
        (dict(data=5), "train.batch_size", "a micro-batch of 24 sequences", dict(data=6, expert=1)),
        (dict(pipe=4, data=2), "mesh.pipe", "at most model.n_layers = 3", dict(pipe=3, data=2, expert=1)),
    ],
)
def test_the_nearest_meshes_are_proposed(mesh, field, text, first):
    (problem,) = refused(**mesh)
    assert problem.field == field and text in problem.fix
    assert proposals(problem)[0] == first


def test_every_mesh_passes_or_is_refused_with_meshes_that_pass():
    sizes = (-1, 1, 2, 3, 5, 8, 16)
    outcomes = set()
    for pipe, data, expert in itertools.product(sizes, repeat=3):
        if [pipe, data, expert].count(-1) > 1:
            (problem,) = refused(pipe=pipe, data=data, expert=expert)
            assert "only one axis may be -1" in problem.fix
            continue
        found = refused(pipe=pipe, data=data, expert=expert)
        outcomes.add(bool(found))
        for problem in found:
            assert proposals(problem)
            for mesh in proposals(problem):
                assert refused(**mesh) == [], (pipe, data, expert, mesh)
    assert outcomes == {True, False}


def test_nodes_divide_the_ranks_of_experts():
    for node in (-1, 4):
        (problem,) = refused(data=1, expert=6, expert_node=node)
        assert (problem.field, problem.value) == ("mesh.expert_node", node)
        assert "mesh.expert = 6" in problem.fix
    assert refused(data=1, expert=6, expert_node=3) == []


def test_bad_sizes_and_dense_models():
    assert [p.field for p in refused(pipe=0, data=-2)] == ["mesh.pipe", "mesh.data"]
    dense = dataclasses.replace(CONFIG.model, moe=MoEConfig(n_dense_layers=3, n_experts=5))
    assert refused(config=dataclasses.replace(CONFIG, model=dense), data=1, expert=8) == []


def test_proposals_are_quick_on_a_large_machine():
    large = dataclasses.replace(
        CONFIG,
        model=ModelConfig(n_layers=61, moe=MoEConfig(n_experts=256)),
        train=TrainConfig(batch_size=15360),
    )
    for problem in refused(devices=4096, config=large, data=63, expert=65):
        assert proposals(problem)[0] == dict(data=60, expert=64)
