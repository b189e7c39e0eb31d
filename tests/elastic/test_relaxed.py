"""The relaxed model: with one-hot probabilities it is the sub-network; its gradients are right; it leaves nothing behind. So does the expected cost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elastic_models import AXES, MODELS, elastic_model, rows
from torch import Tensor

from llmdistill.batches import collate
from llmdistill.elastic.axes import Axes
from llmdistill.elastic.cost import flops, num_parameters
from llmdistill.elastic.decisions import Decision, Decisions
from llmdistill.elastic.expected_cost import ExpectedCost, one_hot
from llmdistill.elastic.relaxed import RelaxedModel
from llmdistill.elastic.space import Space, Subnet
from llmdistill.elastic.subnet import running, with_subnet
from llmdistill.losses.multitask import Multitask

LOSS = Multitask(rationale_weight=0.3)


def exact(model: Any) -> None:
    """Norms in float64; the stock ones take their mean square in float32."""
    for norm in [module for module in model.modules() if type(module).__name__ in ("T5LayerNorm", "LlamaRMSNorm", "Qwen2RMSNorm")]:
        norm.forward = lambda hidden, norm=norm: F.rms_norm(hidden, vars(norm).get("weight", norm.weight).shape, norm.weight, norm.variance_epsilon)


def loss_of(model: Any, num: int = 2) -> Tensor:
    """Of padded rows, in float64 all through."""
    batch = collate(rows(num), causal=not model.config.is_encoder_decoder)
    return LOSS.sums_P(model, batch).double() @ torch.tensor(LOSS.weights, dtype=torch.float64)


def one_hots(decisions: Decisions, subnet: Subnet) -> list[Tensor]:
    return [one_hot(choice, len(decision.values)) for choice, decision in zip(decisions.choices(subnet), decisions.open, strict=True)]


def softmaxed(logits: Sequence[Tensor]) -> list[Tensor]:
    return [logit.softmax(-1) for logit in logits]


def random_logits(decisions: Decisions, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(decision.values), generator=generator, dtype=torch.float64, requires_grad=True) for decision in decisions.open]


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_one_hot_probabilities_are_the_subnet(name: str, even: bool) -> None:
    axes = Axes(ffn=AXES.ffn, heads=AXES.heads, depth=(0.5, 0.7), width=(1.0,) if name == "llama" and even else AXES.width, rank=AXES.rank, even=even)
    orders = {} if "low rank" in name else {"decoder": (2, 1, 0)}
    model, space = elastic_model(name, axes, torch.float64, **orders)
    exact(model)
    decisions = Decisions(space)
    relaxed = RelaxedModel(model, decisions)
    seen = set()
    for subnet in [space.largest(), space.smallest(), *(space.sample(random.Random(seed)) for seed in range(12))]:
        with torch.no_grad():
            with with_subnet(model, subnet):
                expected = loss_of(model)
            with relaxed.running(one_hots(decisions, subnet)):
                found = loss_of(model)
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
        seen.add(round(expected.item(), 6))
    assert len(seen) >= 8


@pytest.mark.parametrize("name", ["t5 v1.0", "llama low rank"])
def test_in_float32_and_bfloat16_too(name: str) -> None:
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model, space = elastic_model(name, dtype=dtype)
        decisions = Decisions(space)
        for seed in range(3):
            subnet = space.sample(random.Random(seed))
            with torch.no_grad():
                with with_subnet(model, subnet):
                    expected = loss_of(model)
                with RelaxedModel(model, decisions).running(one_hots(decisions, subnet)):
                    assert loss_of(model).item() == pytest.approx(expected.item(), rel=close)


@pytest.mark.parametrize("name", ["t5 v1.0", "t5 low rank", "llama grouped", "llama low rank"])
def test_gradients_of_the_loss_are_finite_differences(name: str) -> None:
    model, space = elastic_model(name, dtype=torch.float64)
    exact(model)
    decisions = Decisions(space)
    relaxed, logits = RelaxedModel(model, decisions), random_logits(decisions)
    with relaxed.running(softmaxed(logits)):
        gradients = torch.autograd.grad(loss_of(model), logits, materialize_grads=True, allow_unused=True)
    assert all(bool(gradient.any()) == matters(name, decision) for gradient, decision in zip(gradients, decisions.open, strict=True))
    step, generator = 1e-5, random.Random(0)
    for place in generator.sample(range(len(logits)), min(8, len(logits))):
        choice = generator.randrange(len(logits[place]))
        sides = []
        for sign in (1, -1):
            moved = [logit.detach().clone() for logit in logits]
            moved[place][choice] += sign * step
            with torch.no_grad(), relaxed.running(softmaxed(moved)):
                sides.append(loss_of(model).item())
        assert gradients[place][choice].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-4, abs=1e-6), decisions.open[place].name


def test_the_mean_of_a_last_width_is_the_mean_of_outputs() -> None:
    """Of one decision about the last linear before the head, the relaxed hidden state is the probabilities' mean of the hidden states before the last norm."""
    model, space = elastic_model("llama grouped", Axes(ffn=(0.25, 0.5), heads=(1.0,), depth=(1.0,)), torch.float64)
    decisions = Decisions(space)
    place = decisions.place("ffn", "decoder", 2)
    assert place is not None
    p = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    probabilities = one_hots(decisions, space.largest())

    def before_norm() -> Tensor:
        seen: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            loss_of(model)
        handle.remove()
        return seen[0]

    alone = []
    for choice in range(3):
        probabilities[place] = one_hot(choice, 3)
        with with_subnet(model, decisions.subnet([int(one.argmax()) for one in probabilities])):
            alone.append(before_norm())
    probabilities[place] = p
    with RelaxedModel(model, decisions).running(probabilities):
        torch.testing.assert_close(before_norm(), sum(weight * one for weight, one in zip(p, alone, strict=True)))


@pytest.mark.parametrize("name", ["t5 low rank", "qwen2"])
def test_the_model_is_as_before_also_after_errors(name: str) -> None:
    model, space = elastic_model(name)
    model.train()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    decisions = Decisions(space)
    relaxed, logits = RelaxedModel(model, decisions), random_logits(decisions)
    with with_subnet(model, space.smallest()):
        with pytest.raises(RuntimeError, match="on purpose"), relaxed.running(softmaxed(logits)):  # noqa: PT012 - the error within is what is tested
            loss_of(model).backward()
            raise RuntimeError("on purpose")
        assert running(model) == space.smallest()
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    ours = [hook for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
    assert not [hook for hook in ours if "relaxed" in getattr(hook, "__module__", "")]
    assert all((logit.grad is not None and bool(logit.grad.any())) == matters(name, decision) for logit, decision in zip(logits, decisions.open, strict=True))


def test_wrong_probabilities_are_refused() -> None:
    model, space = elastic_model("qwen2")
    decisions = Decisions(space)
    relaxed = RelaxedModel(model, decisions)
    with pytest.raises(ValueError, match="a vector for each open decision"), relaxed.running([torch.ones(2)]):
        pass


def matters(name: str, decision: Decision) -> bool:
    """A rank does in the layers that elastic_models.low_rank factorises."""
    if decision.axis != "rank":
        return True
    return (decision.stack, decision.layer) in ([("decoder", 1), ("encoder", 0)] if name.startswith("t5") else [("decoder", 0), ("decoder", 2)])


def costs_of(space: Space) -> Any:
    def costs(subnet: Subnet) -> dict[str, float]:
        return {"flops": float(flops(space, subnet, prompt_tokens=9, new_tokens=5)), "parameters": float(num_parameters(space, subnet))}

    return costs


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", ["t5 v1.1", "qwen2"])
def test_expected_cost_is_exact_for_dense_models_and_for_means(name: str, even: bool) -> None:
    """Operations of each sub-network, and their mean over all of a small space under random probabilities."""
    _, space = elastic_model(name, Axes(ffn=(0.5,), heads=(0.5,), depth=(0.4,), width=(0.5,), even=even))
    decisions, costs = Decisions(space), costs_of(space)
    expected = ExpectedCost(costs, decisions, ["flops", "parameters"])
    subnets = [space.sample(random.Random(seed)) for seed in range(40)]
    assert expected.errors(subnets) == {"flops": pytest.approx(0, abs=1e-12), "parameters": pytest.approx(0, abs=1e-12)}
    if even:
        probabilities = [one.detach() for one in softmaxed(random_logits(decisions))]
        mean = 0.0
        for choices in itertools.product(*(range(len(decision.values)) for decision in decisions.open)):
            weight = torch.stack([one[choice] for one, choice in zip(probabilities, choices, strict=True)]).prod()
            mean += float(weight) * costs(decisions.subnet(choices))["flops"]
        assert expected(probabilities)[0].item() == pytest.approx(mean)


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", ["t5 low rank", "llama low rank"])
def test_expected_cost_is_exact_for_ranks_that_heads_and_neurons_bound(name: str, even: bool) -> None:
    _, space = elastic_model(name, replace(AXES, even=even))
    errors = ExpectedCost(costs_of(space), Decisions(space), ["flops"]).errors([space.sample(random.Random(seed)) for seed in range(40)])
    assert errors == {"flops": pytest.approx(0, abs=1e-12)}


def test_expected_cost_says_how_wrong_it_is() -> None:
    """About milliseconds that are no sum of parts: large products are done at a higher rate."""
    _, space = elastic_model("t5 v1.1")

    def costs(subnet: Subnet) -> dict[str, float]:
        return {"latency_ms": (costs_of(space)(subnet)["flops"] / 1e6) ** 0.7}

    errors = ExpectedCost(costs, Decisions(space), ["latency_ms"]).errors([space.sample(random.Random(seed)) for seed in range(40)])
    assert 0 < errors["latency_ms"] < 0.1


def test_gradients_of_the_expected_cost_are_finite_differences() -> None:
    _, space = elastic_model("t5 low rank")
    decisions = Decisions(space)
    expected, logits = ExpectedCost(costs_of(space), decisions, ["parameters"]), random_logits(decisions)
    gradients = torch.autograd.grad(expected(softmaxed(logits))[0], logits)
    for place, logit in enumerate(logits):
        for choice in range(len(logit)):
            sides = []
            for sign in (1, -1):
                moved = [one.detach().clone() for one in logits]
                moved[place][choice] += sign * 1e-4
                sides.append(expected(softmaxed(moved))[0].item())
            assert gradients[place][choice].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-4, abs=1e-3)
