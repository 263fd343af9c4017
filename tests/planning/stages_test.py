"""Checks that a describable verb runs when called, and is described on request."""

import inspect

import pytest

import gin
from musicrl_jax.planning.stages import describable


def draw(folder, count=2):
    return [folder] * count


def test_a_verb_is_described_only_on_request():
    stage = describable(draw)
    assert stage("a") == ["a", "a"]
    assert stage("a", describe=True) == ("draw", {"folder": "a", "count": 2})
    assert inspect.signature(stage) == inspect.signature(draw)
    with pytest.raises(TypeError, match="unexpected keyword argument 'describe_it'"):
        stage("a", describe_it=True)


def test_gin_fills_in_a_described_stage():
    gin.clear_config()
    verb = gin.external_configurable(describable(draw), "draw_for_a_plan", module="tests")
    with gin.config_scope("votes"):
        gin.parse_config("votes/draw_for_a_plan.folder = 'b'")
        assert verb(describe=True).arguments == {"folder": "b", "count": 2}
    gin.clear_config()
