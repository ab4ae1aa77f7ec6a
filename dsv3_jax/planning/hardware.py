"""The machines that plans are made for: what a device can do, and how devices are connected.

Peaks are the vendors' dense figures. What a link carries is one direction of one device. Prices are an
assumption, dated, and never a quotation: every command takes another one.
"""

import math
import re
from typing import NamedTuple

GB, TERA, GIB = 1e9, 1e12, 2.0**30

PRICES_AS_OF = "assumed: cloud list prices of 2025, rounded; H800 as in DeepSeek-V3, section 1"


class PlanError(ValueError):
    """A plan that cannot be made; the message names the value and the fix."""


class Chip(NamedTuple):
    """One kind of device."""

    name: str
    platform: str  # "tpu" or "gpu".
    hbm: float  # Bytes that a program can have.
    hbm_bandwidth: float  # Bytes/s.
    bf16: float  # FLOP/s.
    fp8: float  # FLOP/s; that of bf16 where the tensor cores have none.
    near: float  # Bytes/s out of a device: NVLink inside a node, or all ICI links of a TPU.
    far: float  # Bytes/s out of a device between nodes or slices.
    torus: int  # Dimensions of the ICI torus; 0: nodes of GPUs.
    price: float  # Dollars a device-hour: see `PRICES_AS_OF`.

    @property
    def near_name(self) -> str:
        """What the near link is called."""
        return "ICI" if self.torus else "NVLink"


# HBM of TPUs is what their compiler lets a program have; of GPUs, the driver's total less 1%.
# TPU: cloud.google.com/tpu/docs/{v5e,v5p,v6e}. NVIDIA: datasheets. H800: an H100 with less NVLink.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * GIB, 819 * GB, 197 * TERA, 197 * TERA, 200 * GB, 3.1 * GB, 2, 1.20),
        Chip("v5p", "tpu", 95.73 * GIB, 2765 * GB, 459 * TERA, 459 * TERA, 600 * GB, 6.25 * GB, 3, 4.20),
        Chip("v6e", "tpu", 31.25 * GIB, 1640 * GB, 918 * TERA, 918 * TERA, 400 * GB, 12.5 * GB, 2, 2.70),
        Chip("a100", "gpu", 79.1 * GIB, 2039 * GB, 312 * TERA, 312 * TERA, 300 * GB, 25 * GB, 0, 1.50),
        Chip("h100", "gpu", 78.9 * GIB, 3350 * GB, 989 * TERA, 1979 * TERA, 450 * GB, 50 * GB, 0, 2.50),
        Chip("h800", "gpu", 78.9 * GIB, 3350 * GB, 989 * TERA, 1979 * TERA, 200 * GB, 50 * GB, 0, 2.00),
        Chip("h200", "gpu", 139.0 * GIB, 4800 * GB, 989 * TERA, 1979 * TERA, 450 * GB, 50 * GB, 0, 3.50),
    )
}


class Topology(NamedTuple):
    """Devices and how they lie: a torus of TPUs, or nodes of GPUs."""

    chip: Chip
    shape: tuple[int, ...]  # Of the torus; (nodes, GPUs a node).
    text: str

    @property
    def n_devices(self) -> int:
        """All of them."""
        return math.prod(self.shape)

    @property
    def node(self) -> int:
        """Devices that the near link joins."""
        return self.n_devices if self.chip.torus else self.shape[-1]


def parse_topology(text: str) -> Topology:
    """`v5p:16x16x16`, `v6e:16x16` (chips), `h100:256x8` (nodes x GPUs a node), `h200:2` (GPUs of one node).

    Raises:
      PlanError: no such chip, or a shape that it is not sold in.
    """
    name, _, shape = text.lower().partition(":")
    examples = "v5p:16x16x16, v6e:16x16, h200:2, h100:256x8"
    if name not in CHIPS:
        raise PlanError(
            f"topology = {text!r}: no chip {name!r}; choose one of {', '.join(CHIPS)}: {examples}"
        )
    chip = CHIPS[name]
    if not re.fullmatch(r"\d+(x\d+)*", shape) or 0 in (sizes := tuple(map(int, shape.split("x")))):
        raise PlanError(f"topology = {text!r}: expected CHIP:SHAPE, for example {examples}")
    if chip.torus and len(sizes) != chip.torus:
        example = "x".join(["4"] * chip.torus)
        raise PlanError(f"topology = {text!r}: {name} slices have {chip.torus} sides, as {name}:{example}")
    if not chip.torus and len(sizes) > 2:
        raise PlanError(f"topology = {text!r}: NODESxGPUS, as {name}:256x8, or the GPUs of a node, {name}:8")
    return Topology(chip, sizes if len(sizes) > 1 else (1, *sizes), text.lower())
