"""Plans of a method in the worlds of plan_reference, and a short ladder."""

from __future__ import annotations

from typing import Any

from plan_reference import WORLDS, score_model

from sbm_fast.methods import make_plan
from sbm_fast.plan import Plan
from sbm_fast.sde import DDPMSchedule

LADDER = DDPMSchedule.linear(20)


def plan_of(method: str, name: str = "vp", predicts: str = "eps", **options: Any) -> Plan:
    world = WORLDS[name]
    return make_plan(method, score_model(world, predicts), world.sde, **options)
