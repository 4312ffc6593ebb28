"""What a plan decides on: blocks of a network, and each product of an attention by itself.

Products are apart because they are another trade: they have no weights to shrink, take half of the time where images
are large, and round probabilities, most of which are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

from calibration.sites import Site
from targets.base import Timed

_OUTER = ("down_blocks", "up_blocks")
"""Lists of stages, which hold the lists of blocks."""


def units_of(sites: Mapping[str, Site]) -> dict[str, tuple[str, ...]]:
    """Return unit -> its sites, in the order of execution.

    A unit is an entry of a list of blocks (``down_blocks.0.resnets.1``, ``transformer_blocks.7``), a layer that is in
    none (``conv_in``), or a product.
    """
    found: dict[str, list[str]] = {}
    for name, site in sites.items():
        found.setdefault(name if site.kind == "product" else _block_of(name), []).append(name)
    return {unit: tuple(names) for unit, names in found.items()}


def _block_of(name: str) -> str:
    words = name.split(".")
    for index, (word, following) in enumerate(pairwise(words)):
        if following.isdigit() and word not in _OUTER:
            return ".".join(words[: index + 2])
    return name


def unit_ms(
    profile: Iterable[Timed], sites: Mapping[str, Site], units: Mapping[str, tuple[str, ...]]
) -> dict[str, float]:
    """Return unit -> the milliseconds that a runtime spent on it; what belongs to none is under the empty name.

    Args:
        profile: of an engine, whose layers say which nodes of the graph became them.
        sites: of that graph.
        units: -> their sites.
    """
    of_site = {name: unit for unit, names in units.items() for name in names}
    of_node = {site.node.name or "": of_site[name] for name, site in sites.items()}
    found = dict.fromkeys([*units, ""], 0.0)
    for timed in profile:
        owners = _owners([timed.layer.name, *timed.layer.origin.split(",")], of_node, of_site, units)
        for unit in owners:
            found[unit] += timed.ms / len(owners)
    return found


def _owners(
    origins: list[str], of_node: Mapping[str, str], of_site: Mapping[str, str], units: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """Return the units that a layer belongs to: those of the operators in it, else the block that it stands in."""
    operators = [unit for origin in origins for unit in _operators_of(origin.strip(), of_node, of_site)]
    if operators:
        return list(dict.fromkeys(operators))
    blocks = (_block_of(origin.strip().partition("/")[0]) for origin in origins)
    return [next((block for block in blocks if block in units), "")]


def _operators_of(origin: str, of_node: Mapping[str, str], of_site: Mapping[str, str]) -> list[str]:
    site = origin.partition("#")[0]
    if "#" in origin and site in of_site:  # a value that is rounded, by the site that reads it
        return [of_site[site]]
    while origin:
        if origin in of_node:
            return [of_node[origin]]
        origin = origin.rpartition("/")[0]
    return []
