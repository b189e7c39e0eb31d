"""The differentiable search: it finds what was planted, in both forms; keeps budget and limits; answers alike to the same seed; leaves the model as it was."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from elastic_models import Drift, elastic_model, rows

from llmdistill.elastic.axes import Axes
from llmdistill.elastic.cost import flops, num_parameters
from llmdistill.elastic.decisions import Decisions
from llmdistill.elastic.differentiable import Differentiable, Paths, schedule
from llmdistill.elastic.question import Limit, Question, Supernet, best, excess, front, search
from llmdistill.elastic.repair import within_limits
from llmdistill.elastic.rows import mean_loss
from llmdistill.elastic.space import Space, Subnet
from llmdistill.elastic.subnet import with_subnet
from llmdistill.models.anatomy import Axis, stacks

WIDTHS = (8, 32, 16)
"""Neurons of the planted model's layers that do anything; its last layer in order does nothing at all."""

SHARPNESS = 0.5


def planted(name: str) -> tuple[Any, Space, Subnet]:
    """A model of which much does nothing, and the least sub-network that computes the same."""
    order = (0, 2, 1)
    orders: dict[str, Any] = {"encoder": order, "decoder": order} if name.startswith("t5") else {"decoder": order}
    model, space = elastic_model(name, Axes(ffn=(0.25, 0.5), heads=(0.5,), depth=(0.5,)), torch.float32, **orders)
    with torch.no_grad():
        model.lm_head.weight.mul_(SHARPNESS / model.lm_head.weight.std())  # so that what is missing shows
        for stack in stacks(model):
            for number, layer in enumerate(stack.layers):
                for place in layer.places:
                    if number == order[-1] and place.inputs in (Axis.HEADS, Axis.NEURONS):
                        place.module.weight.zero_()
                        if place.module.bias is not None:
                            place.module.bias.zero_()
                    elif place.inputs is Axis.NEURONS:
                        place.module.weight[:, WIDTHS[number] :] = 0.0
                    elif place.inputs is Axis.HEADS and stack.name == "encoder":
                        place.module.weight[:, 2 * stack.head_width :] = 0.0
    decisions = Decisions(space)
    choices = decisions.largest()
    for number, decision in enumerate(decisions.open):
        if decision.axis == "depth" or (decision.axis == "heads" and decision.stack == "encoder"):
            choices[number] = 0
        elif decision.axis == "ffn":
            choices[number] = decision.values.index(WIDTHS[decision.layer or 0])
    return model, space, decisions.subnet(choices)


def question_of(model: Any, space: Space, *, budget: float, limits: tuple[Limit, ...] = (), num_rows: int = 4) -> Question:
    """Accuracy falls with the distance from what the whole model says."""
    examples, loss = rows(num_rows), Drift(model)
    least = mean_loss(model, examples, loss)

    def accuracy(subnet: Subnet) -> float:
        with with_subnet(model, subnet):
            return math.exp(least - mean_loss(model, examples, loss))

    def costs(subnet: Subnet) -> dict[str, float]:
        return {"flops": float(flops(space, subnet, prompt_tokens=9, new_tokens=5)), "parameters": float(num_parameters(space, subnet))}

    supernet = Supernet(model=model, examples=examples, loss=loss)
    return Question(space=space, accuracy=accuracy, costs=costs, cost="flops", limits=limits, budget=budget, supernet=supernet)


@pytest.mark.parametrize("paths", Paths)
@pytest.mark.parametrize("name", ["t5 v1.1", "llama"])
def test_it_finds_what_was_planted(name: str, paths: Paths) -> None:
    model, space, least = planted(name)
    question = question_of(model, space, budget=100)
    assert question.accuracy(least) == pytest.approx(1)
    assert question.accuracy(space.smallest()) < 0.5
    found = search(Differentiable(paths=paths), question, seed=0)
    assert least in question.asked, [(one.costs["flops"], one.accuracy) for one in front(found, "flops")]
    assert question.num_spent <= question.budget
    assert len(found) >= 45


@pytest.mark.parametrize("paths", Paths)
def test_it_keeps_limits_and_asks_about_nothing_over_them(paths: Paths) -> None:
    model, space, least = planted("t5 v1.1")
    costs = question_of(model, space, budget=1).costs(least)
    question = question_of(model, space, budget=60, limits=(Limit(cost="parameters", most=costs["parameters"] * 1.01),))
    found = search(Differentiable(paths=paths), question, seed=1)
    assert all(one.keeps(question.limits) for one in found)
    assert best(found, "flops", question.limits).accuracy > 0.97


@pytest.mark.parametrize("budget", [1, 2, 10, 37])
@pytest.mark.parametrize("paths", Paths)
def test_no_budget_is_exceeded_or_left_unused(budget: float, paths: Paths) -> None:
    model, space = elastic_model("llama grouped")
    question = question_of(model, space, budget=budget)
    search(Differentiable(paths=paths), question, seed=0)
    assert budget - 1 < question.num_spent <= budget + 1e-9
    assert len(question.asked) >= max(1, budget * 0.4 - 1)


@pytest.mark.parametrize("paths", Paths)
def test_the_same_seed_gives_the_same_answers_and_the_model_stays(paths: Paths) -> None:
    model, space = elastic_model("t5 low rank")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    asked = [list(search(Differentiable(paths=paths), question_of(model, space, budget=12), seed=seed)) for seed in (3, 3, 4)]
    assert asked[0] == asked[1] != asked[2]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    hooks = [hook for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks) for hook in hooks.values()]
    assert not [hook for hook in hooks if "relaxed" in hook.__module__]


def test_the_model_stays_when_the_budget_ends_or_asking_fails() -> None:
    """Steps cost more than is left once somebody else has spent; and accuracy may raise."""
    model, space = elastic_model("qwen2")
    plain = mean_loss(model, rows(2), Drift(model))
    question = question_of(model, space, budget=20)
    ask, spent = question.accuracy, question.spend

    def greedy(evaluations: float) -> None:
        spent(evaluations)
        question.num_spent += 2

    question.spend = greedy  # type: ignore[method-assign]
    search(Differentiable(), question, seed=0)
    assert question.left < 20

    def failing(subnet: Subnet) -> float:
        raise RuntimeError("on purpose")

    question = question_of(model, space, budget=20)
    question.accuracy = failing
    with pytest.raises(RuntimeError, match="on purpose"):
        search(Differentiable(), question, seed=0)
    assert mean_loss(model, rows(2), Drift(model)) == plain
    assert ask(space.largest()) == pytest.approx(1)


def test_schedules_fit_their_budgets() -> None:
    for budget in (1, 2, 5, 10, 30, 100, 300, 1000):
        for num_examples in (1, 8, 100, 1000):
            plan = schedule(Differentiable(), budget, num_examples)
            for_steps = (plan.num_first_rows * bool(plan.num_steps) + 3 * plan.num_rows * plan.num_steps * plan.num_weights) / num_examples
            assert for_steps + plan.num_asks <= budget + 1e-9
            assert plan.num_asks >= 1
            if budget >= 10 and num_examples >= 100:
                assert plan.num_steps >= 10
                assert for_steps > 0.35 * budget


def test_repair_changes_the_least_probable_first() -> None:
    _, space = elastic_model("qwen2")
    decisions = Decisions(space)

    def costs(subnet: Subnet) -> dict[str, float]:
        return {"neurons": float(sum(subnet.stacks[0].ffn_widths))}

    question = Question(space=space, accuracy=lambda _: 1.0, costs=costs, cost="neurons", limits=(Limit(cost="neurons", most=80),), budget=1)
    log_p = [[0.0] * len(decision.values) for decision in decisions.open]
    place = decisions.place("ffn", "decoder", 1)
    assert place is not None
    for number, decision in enumerate(decisions.open):
        if decision.axis in ("ffn", "depth") and number != place:
            log_p[number] = [-9.0] * (len(decision.values) - 1) + [0.0]
    repaired = within_limits(question, decisions, decisions.largest(), log_p)
    assert repaired[:place] + repaired[place + 1 :] == decisions.largest()[:place] + decisions.largest()[place + 1 :]
    generator = random.Random(0)
    for _ in range(50):
        choices = [generator.randrange(len(decision.values)) for decision in decisions.open]
        assert excess(costs(decisions.subnet(within_limits(question, decisions, choices, log_p))), question.limits) == 0
    question.limits = (Limit(cost="neurons", most=1),)  # cannot be kept: the nearest
    assert costs(decisions.subnet(within_limits(question, decisions, decisions.largest(), log_p)))["neurons"] == costs(space.smallest())["neurons"]


def test_what_it_cannot_do_is_refused() -> None:
    model, space = elastic_model("qwen2")
    question = question_of(model, space, budget=5)
    question.supernet = None
    with pytest.raises(ValueError, match="Supernet"):
        search(Differentiable(), question, seed=0)
    question.supernet = Supernet(model=model, examples=[], loss=Drift(model))
    with pytest.raises(ValueError, match="validation rows"):
        search(Differentiable(), question, seed=0)
    wrongs: list[dict[str, Any]] = [
        {"least_weight": 0.0},
        {"least_weight": 2.0, "most_weight": 1.0},
        {"gradient_share": 1.0},
        {"rows_per_step": 0},
        {"travel": 0.0},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="give"):
            Differentiable(**wrong)


def test_a_space_without_choices_asks_about_its_only_subnet() -> None:
    model, space = elastic_model("qwen2", Axes(ffn=(1.0,), heads=(1.0,), depth=(1.0,)))
    assert [one.subnet for one in search(Differentiable(), question_of(model, space, budget=5), seed=0)] == [space.largest()]
