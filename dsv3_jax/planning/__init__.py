"""Plans of runs: what fits, how fast it can be, what it costs, before any machine is rented.

hardware   chips, links and prices; topologies as text
shapes     the program's own state on devices that are not here
residuals  what its forward pass leaves for the backward pass
memory     HBM by kind
stages     memory of a pipeline's rank
flops, traffic, roofline, cost
compiled   the training step compiled for TPUs ahead of time, and the compiler's own analysis
search     meshes, ZeRO modes and remat policies, ranked
laws       DeepSeek LLM's scaling laws
report     all of it as text
"""

from dsv3_jax.planning.hardware import PlanError, parse_topology

__all__ = ["PlanError", "parse_topology"]
