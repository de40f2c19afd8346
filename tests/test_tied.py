"""Parameters with several names: found, parted, and tied again."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_builder import build
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from autodecouple.errors import InputError
from autodecouple.passes.capturing.tied import tied_names, untie, untied, way_out

WIDTH = 4


class Language(nn.Module):
    """An embedding whose weight is the classifier's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x).tanh()
        y: Tensor = self.head(x.mean(1))
        return y


@dataclass(frozen=True)
class Ties:
    """A model as data: layers that run one after the other, and what they share with earlier ones.

    modules: for each layer, the layer whose module object it is; its own index if none
    weights: for each layer, the layer whose weight it uses
    """

    modules: tuple[int, ...]
    weights: tuple[int, ...]
    frozen: frozenset[int]
    nested: bool

    def model(self) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers: list[Any] = []
            for index, (module, weight) in enumerate(zip(self.modules, self.weights, strict=True)):
                layer = nn.Linear(WIDTH, WIDTH).requires_grad_(index not in self.frozen)
                if module < index:
                    layer = layers[module]
                elif weight < index:
                    layer.weight = layers[weight].weight
                layers.append(layer)
        blocks: list[nn.Module] = [nn.Sequential(layer, nn.Tanh()) if self.nested else layer for layer in layers]
        return nn.Sequential(*blocks, *blocks[:1] if self.nested else ())


@st.composite
def ties(draw: st.DrawFn) -> Ties:
    count = draw(st.integers(2, 6))
    shared = [draw(st.integers(0, index)) for index in range(count)]
    weights = [draw(st.integers(0, index)) for index in range(count)]
    kept = tuple(module if draw(st.booleans()) else index for index, module in enumerate(shared))
    frozen = frozenset(draw(st.sets(st.integers(0, count - 1), max_size=2)))
    return Ties(kept, tuple(weights), frozen, draw(st.booleans()))


Slots = list[tuple[nn.Module, str, object]]


def slots(model: nn.Module) -> Slots:
    """Every module and parameter slot of a model, in order, with the object that it holds."""
    found: Slots = []
    for _, module in model.named_modules(remove_duplicate=False):
        for kind in (module._modules, module._parameters, module._buffers):
            found += [(module, key, value) for key, value in kind.items()]
    return found


def same(a: Slots, b: Slots) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] == y[1] and x[2] is y[2] for x, y in zip(a, b, strict=True))


def partners(model: nn.Module) -> dict[str, list[str]]:
    """By brute force: for each name, all names of the same trainable parameter."""
    named = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return {a: [b for b, q in named if q is p] for a, p in named}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    y = model(x)
    if y.requires_grad:
        y.square().sum().backward()
    named = model.named_parameters(remove_duplicate=False)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named if p.requires_grad}


# --- laws -------------------------------------------------------------------------------------------------------------


@given(ties())
def test_tied_names_are_those_of_one_object(drawn: Ties) -> None:
    model = drawn.model()
    found = {frozenset(group) for group in tied_names(model)}
    assert found == {frozenset(group) for group in partners(model).values() if len(group) > 1}


@given(ties())
def test_an_untied_model_computes_the_same_with_parameters_of_its_own(drawn: Ties) -> None:
    """Every trainable name has its own parameter and memory; names, values and outputs are the same, frozen parameters
    are still shared, and the gradients under the names of one parameter add up to what it had."""
    model = drawn.model()
    x = torch.randn(3, WIDTH)
    together, before, state = partners(model), gradients(model, x), copy.deepcopy(model.state_dict())
    frozen = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    first = {group[0]: model.get_parameter(group[0]) for group in tied_names(model)}
    expected = model(x)
    parted = untie(model)
    assert tied_names(model) == ()
    assert {frozenset(g) for g in parted.names} == {frozenset(g) for g in together.values() if len(g) > 1}
    pointers = [p.data_ptr() for p in model.parameters() if p.requires_grad]
    assert len(set(pointers)) == len(pointers) == len(together)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(model.get_parameter(name) is parameter for name, parameter in (frozen | first).items())
    assert torch.equal(model(x), expected)
    after = gradients(model, x)
    for name, group in together.items():
        torch.testing.assert_close(sum(after[other] for other in group), before[name])


@given(ties())
def test_tying_again_puts_the_same_objects_back(drawn: Ties) -> None:
    model = drawn.model()
    before = slots(model)
    parted = untie(model)
    assert same(slots(model), before) == (not parted.names)
    parted.tie()
    assert same(slots(model), before)
    with pytest.raises(RuntimeError, match="inside"), untied(model) as parted:
        parted.tie_unused(())
        raise RuntimeError("inside")
    assert same(slots(model), before)


class Stubborn(nn.Parameter):
    """Cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("no copies")


@given(ties(), st.integers(0, 5))
def test_a_failure_leaves_the_model_as_it_was(drawn: Ties, place: int) -> None:
    """Whatever parameter it is that cannot be copied, and however many were copied before it."""
    model = drawn.model()
    groups = tied_names(model)
    names = [name for group in groups[place % len(groups) :][:1] for name in group] if groups else []
    stubborn = Stubborn(torch.zeros(model.get_parameter(names[0]).shape)) if names else None
    for name in names:
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, stubborn)
    before = slots(model)
    if names:
        with pytest.raises(InputError, match="no copies"):
            untie(model)
    assert same(slots(model), before)


@given(ties(), st.data())
def test_names_that_are_not_used_share_one_that_is(drawn: Ties, data: st.DataObject) -> None:
    """Used names stay apart; each other one follows the first used name of its parameter; and ties still come back."""
    model = drawn.model()
    before, groups = slots(model), tied_names(model)
    used = data.draw(st.sets(st.sampled_from(sorted(partners(model))))) if partners(model) else set()
    parted = untie(model)
    left = parted.tie_unused(used)
    for group in groups:
        alive = [name for name in group if name in used]
        homes = {name: model.get_parameter(name) for name in group}
        for a, b in itertools.combinations(group, 2):
            lead_a, lead_b = (n if n in alive else (alive or group)[0] for n in (a, b))
            assert (homes[a] is homes[b]) == (lead_a == lead_b)
    assert left.names == tuple(apart for group in groups if len(apart := tuple(n for n in group if n in used)) > 1)
    left.tie()
    assert same(slots(model), before)


# --- what a parameter brings along ------------------------------------------------------------------------------------


class Scaled(nn.Parameter):
    """A subclass with a field of its own."""

    scale: float = 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_type_memory_format_attributes_and_hooks_come_along(dtype: torch.dtype) -> None:
    """A weight-decay mark or a gradient hook on the tied parameter held for every use of it: it still does."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    weight = Scaled(torch.randn(2, 2, 3, 3, dtype=dtype).to(memory_format=torch.channels_last))
    weight.scale, weight.no_weight_decay = 3.0, True  # type: ignore[attr-defined]
    seen: list[nn.Parameter] = []
    weight.register_hook(lambda gradient: gradient * 2)
    weight.register_post_accumulate_grad_hook(seen.append)
    model[0].weight = model[1].weight = weight
    parted = untie(model)
    fresh: Any = model[1].weight
    assert model[0].weight is weight
    assert type(fresh) is Scaled
    assert (fresh.dtype, fresh.requires_grad, fresh.stride()) == (dtype, True, weight.stride())
    assert fresh.scale == 3.0 and fresh.no_weight_decay
    fresh.sum().backward()
    assert torch.equal(fresh.grad, torch.full_like(fresh, 2))
    assert len(seen) == 1 and seen[0] is fresh
    parted.tie()


def test_meta_tensors_stay_meta() -> None:
    with torch.device("meta"):
        model = Language()
    with untied(model):
        assert model.head.weight is not model.embedding.weight
        assert model.head.weight.is_meta


def test_recurrent_layers_keep_their_lists_up_to_date() -> None:
    """nn.LSTM runs on a list of its parameters, filled when an attribute is set: putting another parameter into the
    module's dict would train one parameter and compute with another."""
    model = nn.ModuleList([nn.LSTM(4, 4), nn.LSTM(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    with untied(model):
        assert model[1]._flat_weights[1] is model[1].weight_hh_l0 is not model[0].weight_hh_l0
    assert model[1]._flat_weights[1] is model[0].weight_hh_l0

    shared = nn.LSTM(4, 4)
    model = nn.ModuleList([shared, shared])
    with untied(model):
        assert all(a is b for a, b in zip(model[1]._flat_weights, model[1].parameters(), strict=True))
        assert all(a is b for a, b in zip(model[0]._flat_weights, model[0].parameters(), strict=True))


def test_parametrized_weights() -> None:
    """The parameter of a normalised weight lies in its parametrization, under that name."""
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(2)))
    for index in range(2):
        key = f"original{index}"
        setattr(model[1].parametrizations.weight, key, getattr(model[0].parametrizations.weight, key))
    x = torch.randn(3, 4)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    assert len(tied_names(model)) == 2
    with untied(model):
        assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == list(state)
        with torch.no_grad():
            model[1].parametrizations.weight.original0.mul_(2)
        assert not torch.equal(model[1].weight, state["1.parametrizations.weight.original1"])
    assert torch.equal(model(x), expected)


def test_a_shared_parametrized_module_is_copied() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(3, 4)
    expected = model(x)
    with untied(model):
        assert parametrize.is_parametrized(model[2], "weight")
        assert torch.equal(model(x), expected)
    assert model[2] is layer


# --- modules with two names -------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One block under two names, with a buffer, a frozen parameter, a list of its own parts and a way to its parent."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4).requires_grad_(False), nn.ReLU())
        block.parts = [block[0]]  # type: ignore[assignment]
        block.parent = [self]  # type: ignore[assignment]
        self.first = self.second = block

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_a_module_with_two_names_is_copied() -> None:
    """Its forward is one object: parameters under one name would be those under the other. Buffers and frozen
    parameters stay one, and what the copy holds of itself is its own, what it holds of the model the model's."""
    model = Twice()
    block = model.first
    with untied(model) as parted:
        assert model.first is block and model.second is not block
        assert [len(names) for names in parted.names] == [2] * 4
        a, b = model.first, model.second
        assert b.parts[0] is b[0] and b.parent[0] is model
        assert a[1].running_mean is b[1].running_mean
        assert a[2].weight is b[2].weight and a[0].weight is not b[0].weight
    assert model.second is block


def test_a_module_that_cannot_be_copied_is_refused_by_name() -> None:
    model = Twice()
    model.first.source = (number for number in range(3))  # type: ignore[assignment]
    before = slots(model)
    with pytest.raises(InputError, match=r"'second', which has two names.*generator.*together"):
        untie(model)
    assert same(slots(model), before)


def test_modules_without_trainable_parameters_stay_shared() -> None:
    activation, norm = nn.ReLU(), nn.BatchNorm1d(4, affine=False)
    model = nn.Sequential(nn.Linear(4, 4), activation, norm, nn.Linear(4, 4), activation, norm)
    before = slots(model)
    assert untie(model).names == ()
    assert same(slots(model), before)


class Property(nn.Module):
    """Ties its weight whenever it is set."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Module()
        self.b.weight = self.a.weight

        class Tying(nn.Module):
            def __setattr__(inner, key: str, value: Any) -> None:
                super().__setattr__(key, self.a.weight if key == "weight" else value)

        self.b.__class__ = Tying


def test_a_model_that_ties_itself_is_refused() -> None:
    model = Property()
    with pytest.raises(InputError, match="'a.weight' = 'b.weight'.*Property ties them itself"):
        untie(model)


# --- what the user reads ----------------------------------------------------------------------------------------------


def test_the_note_names_the_parameters() -> None:
    model = Language()
    with untied(model) as parted:
        assert parted.note.endswith("train apart from equal values: 'embedding.weight' = 'head.weight'")
        assert "changed nothing" in parted.tie_unused({"head.weight"}).note
    many = nn.Sequential(*[nn.Linear(4, 4)] * 7)
    with untied(many) as parted:
        assert "'3.weight' and 3 more names; '0.bias'" in parted.note


def test_the_note_says_that_a_config_would_tie_again() -> None:
    model = Language()
    model.config = SimpleNamespace(tie_word_embeddings=True)  # type: ignore[assignment]
    with untied(nn.Sequential(model)) as parted:
        assert "config.tie_word_embeddings" in parted.note
        model.config.tie_word_embeddings = False
        assert "config" not in parted.note


def test_the_way_out_depends_on_the_names() -> None:
    """A parameter that one name uses many times, as in ALBERT, cannot be untied: the text must not offer it."""
    model = Language()
    assert 'tied="untie" makes them 2 parameters' in way_out(model, "head.weight")
    assert "cannot part it" in way_out(model, "layers.0.weight")


# --- from the model to stages -----------------------------------------------------------------------------------------


def tokens(rows: int) -> tuple[Tensor]:
    return (torch.randint(9, (rows, 5), generator=torch.Generator().manual_seed(rows)),)


def test_an_untied_language_model_can_be_cut() -> None:
    """Trap 4: tied ends leave no cut; untied, the stages composed are the model, and each end is trained."""
    model = Language()
    assert len(build(model, tokens(4), 3).codes) == 1
    with untied(model):
        built = build(model, tokens(4), 3)
        assert len(built.codes) == 3
        assert torch.equal(built.output(built.run(tokens(6))[-1]), model(*tokens(6)))
        owners = [{id(p) for p in code.body.parameters()} for code in built.codes]
        assert id(model.embedding.weight) in owners[0]
        assert id(model.head.weight) in owners[2]
