"""Members that differ in more than values are refused; the error names every difference."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jaxensemble.errors import InputError, MemberError
from torch_bridge.members.same_network import check_members, find_differences, list_members


class Block(nn.Module):
    def __init__(self, act: Callable = F.relu, p: float = 0.1, eps: float = 1e-5, stride: int = 1, scale: float = 1.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=stride)
        self.norm = nn.BatchNorm2d(2, eps=eps)
        self.dropout = nn.Dropout(p)
        self.act = act
        self.scale = scale
        self.table = torch.arange(3.0)


def scaled(factor: float) -> Callable:
    return lambda x: x * factor


CASES = {
    "activation": (lambda: Block(F.gelu), "the root module, act"),
    "closure": (lambda: Block(scaled(3.0)), "the root module, act"),
    "partial": (lambda: Block(functools.partial(F.leaky_relu, negative_slope=0.2)), "the root module, act"),
    "p": (lambda: Block(p=0.2), "dropout, p: 0.2 in member 1, 0.1 in member 0"),
    "eps": (lambda: Block(eps=1e-6), "norm, eps: 1e-06 in member 1, 1e-05 in member 0"),
    "stride": (lambda: Block(stride=2), "conv, stride: (2, 2) in member 1, (1, 1) in member 0"),
    "attribute": (lambda: Block(scale=2.0), "the root module, scale: 2.0 in member 1, 1.0 in member 0"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_option_that_differs_is_named(name: str) -> None:
    make, message = CASES[name]
    with pytest.raises(MemberError) as caught:
        check_members([Block(), make()])
    assert message in str(caught.value)


def test_equal_members_pass_whatever_their_values() -> None:
    check_members([Block(scaled(2.0)), Block(scaled(2.0)), Block(scaled(2.0))])


def test_every_offender_is_listed_once_with_its_members() -> None:
    members = [Block(), Block(p=0.3), Block(p=0.3), Block(eps=1e-3)]
    with pytest.raises(MemberError) as caught:
        check_members(members)
    text = str(caught.value)
    assert "dropout, p: 0.3 in members 1, 2, 0.1 in member 0" in text
    assert "norm, eps: 0.001 in member 3, 1e-05 in member 0" in text


def test_mode_of_a_submodule_is_compared_and_told_once() -> None:
    frozen, evaluated = Block(), Block().eval()
    frozen.norm.eval()
    assert [d.where for d in find_differences(Block(), frozen)] == ["norm, mode"]
    assert [d.where for d in find_differences(Block(), evaluated)] == ["the root module, mode"]


def test_keys_shapes_dtypes_and_gradients_are_compared() -> None:
    changed = Block()
    changed.register_parameter("extra", nn.Parameter(torch.ones(1)))
    changed.conv.weight = nn.Parameter(torch.ones(2, 1, 5, 5))
    assert changed.conv.bias is not None
    changed.conv.bias.requires_grad_(False)
    changed.norm.half()
    found = {d.where: (d.theirs, d.ours) for d in find_differences(Block(), changed)}
    assert found["extra"] == ("float32[1]", "nothing")
    assert found["conv.weight"] == ("float32[2, 1, 5, 5]", "float32[2, 1, 3, 3]")
    assert found["conv.bias"] == ("float32[2], frozen", "float32[2]")
    assert found["norm.weight"] == ("float16[2]", "float32[2]")


def test_plain_tensor_attributes_are_compared_by_value() -> None:
    changed = Block()
    changed.table = torch.arange(3.0) + 1
    assert [d.where for d in find_differences(Block(), changed)] == ["the root module, table"]


def test_ties_are_compared() -> None:
    def pair(tied: bool) -> nn.Module:
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        if tied:
            module[1].weight = module[0].weight
        return module

    assert [d.where for d in find_differences(pair(True), pair(False))] == ["0.weight = 1.weight"]
    assert not list(find_differences(pair(True), pair(True)))


def test_parametrisations_and_hooks_made_anew_are_equal() -> None:
    def normed() -> nn.Sequential:
        module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
        nn.utils.spectral_norm(module[1])
        return module

    module = normed()
    assert not list(find_differences(module, normed()))
    assert not list(find_differences(module[0], copy.deepcopy(module[0])))
    assert list(find_differences(normed(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))


def test_a_class_that_differs_and_a_module_that_is_missing() -> None:
    first, other = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Tanh())
    found = {d.where: (d.theirs, d.ours) for d in find_differences(first, other)}
    assert found["1, class"] == ("torch.nn.modules.activation.Tanh", "torch.nn.modules.activation.ReLU")
    assert found["2, module"] == ("torch.nn.modules.activation.Tanh", "nothing")


def test_attributes_with_cycles_end() -> None:
    def looped() -> nn.Module:
        module = nn.Identity()
        holder: list = [1]
        holder.append(holder)
        module.holder = holder  # type: ignore[assignment]
        return module

    assert not list(find_differences(looped(), looped()))


def test_one_object_twice_is_two_members() -> None:
    model = Block()
    check_members([model, model, copy.deepcopy(model)])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "at least one module; got none"),
        (nn.Linear(1, 1), r"Pass \[model\]"),
        ([nn.Linear(1, 1), 3], "1: int"),
    ],
    ids=["none", "one module", "a stranger"],
)
def test_what_is_no_list_of_modules_is_refused(models: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_members(models)


def test_module_lists_and_generators_are_taken() -> None:
    assert len(list_members(nn.ModuleList([nn.Linear(1, 1)] * 2))) == 2
    assert len(list_members(nn.Linear(1, 1) for _ in range(3))) == 3
