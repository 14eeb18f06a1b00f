"""Choosing an instance: cost, filter, score, pick. One policy a file; to add one, a file and a line in `POLICIES`."""

from __future__ import annotations

from proxy.scheduling.ascend import Ascend
from proxy.scheduling.least_load import LeastLoad
from proxy.scheduling.policy import Ask, Policy, Prefix
from proxy.scheduling.power_of_two import PowerOfTwo
from proxy.scheduling.prefix_affinity import PrefixAffinity
from proxy.scheduling.random_choice import RandomChoice
from proxy.scheduling.round_robin import RoundRobin
from proxy.scheduling.session import Session

__all__ = ["POLICIES", "Ask", "Policy", "Prefix", "make_policy"]

POLICIES: dict[str, type[Policy]] = {
    one.name: one for one in (LeastLoad, Ascend, RoundRobin, PowerOfTwo, RandomChoice, PrefixAffinity, Session)
}


def make_policy(name: str, role: str, seed: int | None = None) -> Policy:
    return POLICIES[name](role, seed)
