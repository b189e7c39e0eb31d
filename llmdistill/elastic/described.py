"""A space, and what was taken out of it, in words: what `llmdistill extract` prints."""

from __future__ import annotations

from llmdistill.elastic.choice import Subnet, write
from llmdistill.elastic.cost import num_parameters
from llmdistill.elastic.space import Space

STOCK = "Stock transformers loads it."
NOT_STOCK = "It loads where llmdistill is imported: its layers differ in size, are low-rank, or have a width that transformers' Llama does not take."


def legal_values(space: Space, active: Subnet) -> str:
    """Every axis with the values that `--subnet` takes, and the sub-network that the checkpoint has chosen."""
    axes = {"width": space.widths}
    for shape, legal in zip(space.shape.stacks, space.stacks, strict=True):
        of_stack = {"depth": legal.depths, "heads": legal.heads, "ffn": legal.ffn_widths} | ({"rank": legal.ranks} if shape.ranks else {})
        axes |= {f"{shape.name}.{axis}": values for axis, values in of_stack.items()}
    longest = max(map(len, axes))
    table = "\n".join(f"  {axis:{longest}}  {', '.join(map(str, values))}" for axis, values in axes.items())
    number = f"{space.num_subnets:,}" if space.num_subnets < 10**12 else f"{space.num_subnets:.1e}"
    return f"""{number} sub-networks{", the layers of each alike" if space.even else ""}; the values of each axis:

{table}

--subnet takes AXIS=VALUE with commas between, or largest or smallest; heads, ffn and rank also one value for each layer that stays, with + between.
What is not said is the largest there is. The smallest: {write(space.smallest(), space)}
Chosen in this checkpoint: {write(active, space)}"""


def taken_out(space: Space, subnet: Subnet, *, stock: bool) -> str:
    """Which sub-network it is, how large, and what loads it."""
    parameters, before = num_parameters(space, subnet), num_parameters(space, space.largest())
    return f"""sub-network: {write(subnet, space)}
parameters: {parameters:,} of {before:,} ({100 * parameters / before:.1f}%)
{STOCK if stock else NOT_STOCK}"""
