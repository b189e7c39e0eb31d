"""What a sub-network holds and computes, by arithmetic on shapes: parameters, bytes, floating-point operations.

Operations are those of matrix products and attention, two for a multiplication with its addition, as the decode engine makes them: each token once, the keys
and values of earlier ones kept, so that a token attends to itself and those before it. Norms, activations, softmax and look-ups are left out: they are of a
lower order in the sizes, though not always in milliseconds, which are for measuring.
"""

from __future__ import annotations

from llmdistill.elastic.choice import Subnet
from llmdistill.elastic.shape import StackShape
from llmdistill.elastic.space import Space


def num_parameters(space: Space, subnet: Subnet) -> int:
    """Numbers that its extraction holds; a tied matrix counts once."""
    space.check(subnet)
    shape, width = space.shape, subnet.width
    total = shape.vocabulary * width
    if not shape.tied_head:
        total += _linear(min(shape.head_rank, width), width, shape.vocabulary)
    for stack, legal, choice in zip(shape.stacks, space.stacks, subnet.stacks, strict=True):
        total += stack.num_buckets * choice.heads[0] + width  # table of position biases, last norm
        shared = {name for name, _ in stack.shared}
        for place, layer in enumerate(legal.kept_layers(choice.depth)):
            total += stack.num_norms * width
            sizes = {"width": width, "heads": choice.heads[place], "ffn_width": choice.ffn_widths[place]}
            ranks = stack.cut_ranks(layer, choice.ranks[place], **sizes)
            for role in stack.roles:
                inputs, outputs = stack.sizes(role, **sizes)
                total += _linear(ranks.get(role, 0), inputs, outputs) + outputs * (role in stack.biases)
                if f"{layer}.{role}" in shared:
                    total -= ranks[role] * inputs
    return total


def num_bytes(space: Space, subnet: Subnet, *, bytes_per_parameter: int = 4) -> int:
    """Bytes of its weights, all in one dtype."""
    return num_parameters(space, subnet) * bytes_per_parameter


def flops(space: Space, subnet: Subnet, *, prompt_tokens: int, new_tokens: int) -> int:
    """Operations of answering one prompt of so many tokens with so many tokens."""
    space.check(subnet)
    if prompt_tokens < 1 or new_tokens < 1:
        raise ValueError(f"prompt_tokens is {prompt_tokens} and new_tokens {new_tokens}: give 1 or more of each")
    shape, width = space.shape, subnet.width
    total = new_tokens * _linear(min(shape.head_rank, width), width, shape.vocabulary)
    for stack, legal, choice in zip(shape.stacks, space.stacks, subnet.stacks, strict=True):
        if len(shape.stacks) == 1:
            tokens, encoded = prompt_tokens + new_tokens - 1, 0
        else:
            tokens, encoded = (prompt_tokens, 0) if stack.name == "encoder" else (new_tokens, prompt_tokens)
        pairs = tokens**2 if stack.name == "encoder" else tokens * (tokens + 1) // 2
        for place, layer in enumerate(legal.kept_layers(choice.depth)):
            sizes = {"width": width, "heads": choice.heads[place], "ffn_width": choice.ffn_widths[place]}
            ranks = stack.cut_ranks(layer, choice.ranks[place], **sizes)
            for role in stack.roles:
                times = encoded if role in ("cross_k", "cross_v") else tokens
                total += times * _linear(ranks.get(role, 0), *stack.sizes(role, **sizes))
            total += 2 * choice.heads[place] * stack.head_width * (pairs + tokens * encoded * _has_cross(stack))  # scores, and the mean of the values
    return 2 * total


def _linear(rank: int, inputs: int, outputs: int) -> int:
    """Multiplications of a linear for one token, which are also its numbers without the bias; a rank of 0 is a dense one."""
    return inputs * outputs if rank == 0 else rank * (inputs + outputs)


def _has_cross(stack: StackShape) -> bool:
    return "cross_q" in stack.roles
