"""Stages: composed they are the model, apart they are alone, coupled they are backpropagation."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from graph_strategies import DRAWS, Program, leaves, programs, touch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stage_builder import SMALL, Built, build, target
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import autodecouple
from autodecouple.options import Wish
from autodecouple.passes import verify
from autodecouple.passes.inference import emit_inference
from autodecouple.passes.insert import STAGE, drawn_in_kernels, draws
from autodecouple.passes.trace import as_call
from autodecouple.pipeline import analyse, decide
from autodecouple.randomness import Randomness

SWEEP = settings(max_examples=5, suppress_health_check=list(HealthCheck))
SLOW = settings(max_examples=50, suppress_health_check=list(HealthCheck))
COUNTS = st.integers(1, 6)


def equal(a: Any, b: Any) -> bool:
    x, y = pytree.tree_flatten(a), pytree.tree_flatten(b)
    same = [torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(x[0], y[0], strict=True)]
    return x[1] == y[1] and all(same)


def call(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = as_call(inputs)
    return model(*args, **kwargs)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def clear(built: Built) -> None:
    for module in (built.model, *(code.head for code in built.codes if code.head is not None)):
        module.zero_grad(set_to_none=True)


def losses(built: Built, inputs: Any) -> tuple[Tensor, ...]:
    """Those of the one graph that has the plan in it."""
    values = list(built.values(inputs).values())
    rows = next(len(value) for value in values if isinstance(value, Tensor) and value.ndim)
    found, _ = built.module(*values, target(rows), Randomness(0))
    return tuple(found)


# --- law 1: transparent forward ---------------------------------------------------------------------------------------


def check_composed(program: Program, n_stages: int) -> None:
    built = build(program.model(), program.inputs(), n_stages)
    for rows in (4, 2, 7):
        original = program.model()
        built.model.load_state_dict(original.state_dict())
        torch.manual_seed(3)
        expected = program.call(original, rows)
        torch.manual_seed(3)
        found = built.output(built.run(program.inputs(rows))[-1])
        assert equal(expected, found), f"{len(built.codes)} stages, {rows} rows"
        assert equal(list(original.buffers()), list(built.model.buffers())), "buffers after the forward"


@SWEEP
@given(programs(), COUNTS)
def test_stages_composed_are_the_model(program: Program, n_stages: int) -> None:
    """Law 1: bitwise, dropout and BatchNorm on, at several batch sizes, with one random stream for both."""
    check_composed(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(), COUNTS)
def test_stages_composed_are_the_model_for_many(program: Program, n_stages: int) -> None:
    check_composed(program, n_stages)


def check_inference(program: Program, n_stages: int) -> None:
    """ "cpu" and "cpu:0" are two devices to the compiler and one to torch: the graph is cut apart, and runs here."""
    built = build(program.model(), program.inputs(), n_stages, devices=["cpu", "cpu:0"] * 3)
    inference = emit_inference(built.graph, built.plan)
    if len(built.plan.stages) == 1:
        assert inference is None, "the user's own module does"
        return
    assert inference is not None
    original = program.model()
    for rows in (4, 1, 7):
        if rows > 1:  # other statistics than the initial ones
            built.model.load_state_dict(original.state_dict())
            for model in (original, built.model):
                torch.manual_seed(0)  # dropout in front of BatchNorm changes its statistics
                with torch.no_grad():
                    program.call(model.train(), rows)
        expected = program.call(original.eval(), rows)
        found = inference(*built.values(program.inputs(rows)).values())
        assert equal(leaves(expected), list(found))
    check_moves(inference, built)


def check_moves(inference: fx.GraphModule, built: Built) -> None:
    """Every operation has all its tensors on one device, and no value is moved twice to the same one; a parameter
    that a stage owns is never moved: the data goes to it."""
    moves = [node for node in inference.graph.nodes if getattr(node.target, "__name__", "") == "to_device"]
    assert len({node.args for node in moves}) == len(moves)
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert not [node for node in moves if node.args[0].op == "get_attr" and node.args[0].target in trained]
    home = {id(p): i for i, code in enumerate(built.codes) for p in code.body.parameters()}
    place: dict[fx.Node, Any] = {node: node.args[1] for node in moves}
    for node in inference.graph.nodes:
        sources = [place[source] for source in node.all_input_nodes if place.get(source) is not None]
        if node.op == "get_attr":
            value = inference.get_parameter(node.target) if node.target in dict(inference.named_parameters()) else None
            index = home.get(id(value)) if value is not None else None
            place[node] = torch.device(built.plan.stages[index].device) if index is not None else None
        elif node.op == "call_function" and node not in place:
            assert len(set(sources)) <= 1, f"{node.name} has its inputs on {sources}"
            place[node] = sources[0] if sources else None


@SWEEP
@given(programs(), st.integers(2, 6))
def test_inference_over_several_devices_is_the_model_in_evaluation_mode(program: Program, n_stages: int) -> None:
    check_inference(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(), st.integers(2, 6))
def test_inference_over_several_devices_is_the_model_in_evaluation_mode_for_many(p: Program, n_stages: int) -> None:
    check_inference(p, n_stages)


class WrittenBase(nn.Module):
    """Writes into a view, then reads the base, both behind the last parameter of the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        half = h[:, :4]
        half *= 0.5
        late = h[:, 4:]
        y = self.last(h)
        late += 1
        z: Tensor = y + h.sum(1, keepdim=True)
        return z


@pytest.mark.parametrize("cut", ["linear", "layer_norm", "slice_1", "slice_2", "mul_"])
def test_a_value_is_moved_after_it_was_written_into(cut: str) -> None:
    """A value went to the next device right behind its own operation, and missed what was written into it later; the
    views of one memory must not part either."""
    model = WrittenBase()
    graph, candidates = analyse(model, torch.randn(4, 4))
    found = {candidate.node: candidate for candidate in candidates}
    if cut not in found or (found[cut].cut is None and found[cut].twin is None):
        assert "share memory" in found[cut].reason or "carry a gradient" in found[cut].reason
        return
    plan = decide(graph, candidates, Wish.checked(2, SMALL, ["cpu", "cpu:0"], cut_at=[cut]))
    inference = emit_inference(graph, plan)
    assert inference is not None
    x = torch.randn(5, 4)
    assert torch.equal(inference(x)[0], model.eval()(x))


class TrainingOnly(nn.Module):
    """The plan cuts behind an operation that only training has; before it, two names of one memory are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        side = x.abs()
        view = side[:, :1]
        h = self.first(x)
        view += 1
        h = h + side.sum(1, keepdim=True)
        if self.training:
            h = h.sigmoid()
        y: Tensor = self.last(h)
        return y


def test_a_cut_that_evaluation_does_not_have() -> None:
    """The stages meet as near to it as can be: memory that is written stays whole, parameters stay where they are."""
    model = TrainingOnly()
    graph, candidates = analyse(model, torch.randn(4, 4))
    plan = decide(graph, candidates, Wish.checked(2, SMALL, ["cpu", "cpu:0"], cut_at=["sigmoid"]))
    inference = emit_inference(graph, plan)
    assert inference is not None
    x = torch.randn(5, 4)
    assert torch.equal(inference(x)[0], model.eval()(x))
    moves = [node for node in inference.graph.nodes if getattr(node.target, "__name__", "") == "to_device"]
    assert [str(node.args[1]) for node in moves] == ["cpu", "cpu:0", "cpu:0"], "the input; features and side"


# --- law 2: isolation -------------------------------------------------------------------------------------------------


def check_isolation(program: Program, n_stages: int) -> None:
    built = build(program.model(), program.inputs(), n_stages)
    original = program.model()
    torch.manual_seed(0)
    touch(program.call(original)).backward()
    trained = set(gradients(original))
    names = {id(p): name for name, p in built.model.named_parameters()}
    found = losses(built, program.inputs())
    assert len(found) == len(built.codes)
    reached: Counter[str] = Counter()
    for loss, code in zip(found, built.codes, strict=True):
        loss.backward(retain_graph=True)
        mine = set(gradients(built.model))
        assert mine == {names[id(p)] for p in code.body.parameters() if p.requires_grad} & trained
        heads = [c.head for c in built.codes if c.head is not None and c is not code]
        assert not [p for head in heads for p in head.parameters() if p.grad is not None], "another stage's head"
        reached.update(mine)
        clear(built)
    assert set(reached) == trained, "every parameter that backpropagation trains"
    assert set(reached.values()) <= {1}, "in exactly one stage"
    wanted = {name for name, p in original.named_parameters() if p.requires_grad}
    assert sorted(verify.untrained_parameters(built.graph)) == sorted(wanted - trained), "and the others are named"


@SWEEP
@given(programs(), COUNTS)
def test_a_loss_reaches_its_own_stage_and_no_other(program: Program, n_stages: int) -> None:
    """Law 2: and together they reach all that backpropagation through the original reaches."""
    check_isolation(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(), COUNTS)
def test_a_loss_reaches_its_own_stage_and_no_other_for_many(program: Program, n_stages: int) -> None:
    check_isolation(program, n_stages)


def check_untouched(program: Program, n_stages: int) -> None:
    """Gradients of each stage with nothing run behind it, and with every later stage run before its backward."""
    built = build(program.model(), program.inputs(), n_stages)
    start = copy.deepcopy(built.model.state_dict())

    def step(until: int, index: int) -> dict[str, Tensor]:
        built.model.load_state_dict(start)
        clear(built)
        received, values = built.values(program.inputs()), []
        for k in range(until + 1):
            values.append(built.stage(k, received, Randomness(1)))
            received = {n: v.detach() if isinstance(v := values[k][n], Tensor) else v for n in built.codes[k].sends}
        code = built.codes[index]
        assert code.head is not None
        mask = {"mask": values[index][code.mask]} if code.mask else {}
        features = values[index][code.head_inputs[0]].detach().requires_grad_()
        code.head(features, target(4), **mask)[0].backward()
        values[index][code.head_inputs[0]].backward(features.grad)
        return gradients(built.model)

    for index in range(len(built.codes) - 1):
        alone, followed = step(index, index), step(len(built.codes) - 1, index)
        assert equal(alone, followed), f"stage {index}: a later stage wrote into what it had saved"


@SWEEP
@given(programs(), st.integers(2, 6))
def test_later_stages_write_into_nothing_of_an_earlier_one(program: Program, n_stages: int) -> None:
    """Trap 2: an in-place operation behind a cut corrupts the earlier stage's backward, or makes it fail."""
    check_untouched(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(), st.integers(2, 6))
def test_later_stages_write_into_nothing_of_an_earlier_one_for_many(program: Program, n_stages: int) -> None:
    check_untouched(program, n_stages)


class Written(nn.Module):
    """A tensor without gradient that crosses two cuts and is written into behind the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().sum(1, keepdim=True)
        h = self.second((self.first(x) + scale).relu()) + scale
        scale += 1
        y: Tensor = self.last(h.relu() * scale)
        return y


@pytest.mark.parametrize("loss", [SMALL, "bp"], ids=["detached", "coupled"])
def test_a_value_that_is_copied_at_two_cuts(loss: Any) -> None:
    """Each stage in between saves its own copy; the second copy's name did not fit the plan's any more."""
    x = torch.randn(4, 4)
    built = build(Written(), x, 3, loss)
    assert ["sum_1" in cut.copied for cut in built.plan.cuts] == [True, True]
    assert torch.equal(built.output(built.run(x)[-1]), built.model(x))
    found, _ = recorded(built.model, x, loss, 3)
    assert set(found) == {name for name, _ in built.model.named_parameters()}


class Chunked(nn.Module):
    """The features of one stage are a view that the next stage writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).sigmoid()
        view = h.view(-1, 2, 4)
        view += 1
        y: Tensor = self.last(view.flatten(1))
        return y


def test_the_features_survive_a_write_through_a_view_of_them() -> None:
    built = build(Chunked(), torch.randn(4, 4), 2)
    first, _ = built.run(torch.randn(4, 4))
    name = built.codes[0].head_inputs[0]
    assert float(first[name].detach().min()) >= 0
    assert float(first[name].detach().max()) <= 1, "sigmoid, before the next stage added one"
    first[name].sum().backward()


# --- law 4: coupled stages are backpropagation ------------------------------------------------------------------------


class Recorder(torch.optim.SGD):
    """Changes nothing and keeps the gradients that it was given."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.0)
        self.seen: dict[int, Tensor] = {}

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.seen |= {id(p): p.grad.clone() for p in group["params"] if p.grad is not None}


def recorded(
    model: nn.Module, inputs: Any, loss: Any, count: int, cut_at: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], Any]:
    """The gradients by name, and the compiled pipeline, after one step through the stages' own machinery."""
    made: list[Recorder] = []

    def optimizer(params: list[nn.Parameter]) -> Recorder:
        made.append(Recorder(params))
        return made[-1]

    with autodecouple.compile(
        model,
        count,
        loss,
        example_inputs=inputs,
        criterion=lambda output, target: touch(output),
        optimizer=optimizer,
        schedule="sequential",
        cut_at=cut_at,
        devices=["cpu"],
        seed=5,
    ) as decoupled:
        decoupled.train_step(inputs, target(4))
        decoupled.synchronize()
        pipeline = decoupled._pipeline
    seen = {key: value for optimizer_ in made for key, value in optimizer_.seen.items()}
    return {name: seen[id(p)] for name, p in model.named_parameters() if id(p) in seen}, pipeline


@pytest.mark.parametrize("behind", ["in place", "through a view"])
def test_a_coupled_stage_may_write_into_what_it_receives(behind: str) -> None:
    """What arrives at a coupled stage is a leaf, so that its gradient can go back: "a leaf Variable that requires grad
    is being used in an in-place operation" was the end of BatchNorm | ReLU(inplace=True)."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x))
            if behind == "in place":
                h = F.relu(h, inplace=True)
            else:
                h[:, :4] *= 0.5
            y: Tensor = self.last(h)
            return y

    model, twin, x = Model(), Model(), torch.randn(4, 4)
    twin.load_state_dict(model.state_dict())
    found, pipeline = recorded(model, x, "bp", 2, ("batch_norm",))
    assert pipeline.plan.cuts[0].copied == ("batch_norm",)
    touch(twin(x)).backward()
    assert equal(found, gradients(twin))


def check_coupled(program: Program, n_stages: int) -> None:
    count = len(build(program.model(), program.inputs(), n_stages, "bp").codes)
    found, _ = recorded(program.model(), program.inputs(), "bp", count)
    original = program.model()
    touch(program.call(original)).backward()
    expected = gradients(original)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@SWEEP
@given(programs(without=DRAWS), COUNTS)
def test_coupled_stages_give_the_gradients_of_backpropagation(program: Program, n_stages: int) -> None:
    """Law 4, through the machinery of the stages: what one sends back is what backpropagation would carry on."""
    check_coupled(program, n_stages)


@pytest.mark.slow
@SLOW
@given(programs(without=DRAWS), COUNTS)
def test_coupled_stages_give_the_gradients_of_backpropagation_for_many(program: Program, n_stages: int) -> None:
    check_coupled(program, n_stages)


def check_one_graph(program: Program, n_stages: int, coupled: list[bool]) -> None:
    kinds = ["bp" if bp else SMALL for bp in coupled]
    loss: Any = "bp"
    for count in range(n_stages, 0, -1):
        loss = kinds[: count - 1]
        try:
            found, pipeline = recorded(program.model(), program.inputs(), loss, count)
            break
        except autodecouple.errors.PartitionError:
            continue
    # the stages' parameters are untouched (the rate is zero), but their buffers have seen one batch
    model = pipeline.graph.model
    model.load_state_dict(program.model().state_dict())
    model.zero_grad()
    inputs = pytree.tree_leaves(program.inputs())
    values, _ = pipeline.module(*inputs, target(4), Randomness(5, 0, 0))
    assert len(values) == count - sum(coupled[: count - 1])
    sum(values).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


mixed = st.lists(st.booleans(), min_size=5, max_size=5)


@SWEEP
@given(programs(), COUNTS, mixed)
def test_the_one_graph_and_the_stages_train_alike(program: Program, n_stages: int, coupled: list[bool]) -> None:
    """The graph with the plan in it, run by autograd alone, is what the stages do one by one, however they couple."""
    check_one_graph(program, n_stages, coupled)


@pytest.mark.slow
@SLOW
@given(programs(), COUNTS, mixed)
def test_the_one_graph_and_the_stages_train_alike_for_many(
    program: Program, n_stages: int, coupled: list[bool]
) -> None:
    check_one_graph(program, n_stages, coupled)


# --- keyed random numbers ---------------------------------------------------------------------------------------------

X = torch.ones(64, 200)


def mask(randomness: Randomness, node: str = "dropout", p: float = 0.3) -> Tensor:
    return randomness.dropout(X, p, node)


def test_one_key_has_one_mask() -> None:
    assert torch.equal(mask(Randomness(0, 2, 1)), mask(Randomness(0, 2, 1)))


@pytest.mark.parametrize(
    "other",
    [
        (Randomness(1), "dropout"),
        (Randomness(0, 1), "dropout"),
        (Randomness(0, 0, 1), "dropout"),
        (Randomness(0), "dropout_1"),
        (Randomness(10, 0), "dropout"),
        (Randomness(0, 10), "dropout"),
    ],
    ids=["seed", "batch", "micro-batch", "node", "ten seeds", "ten batches"],
)
def test_another_key_has_another_mask(other: tuple[Randomness, str]) -> None:
    """Masks of two keys agree where chance has it: on p^2 + (1-p)^2 of the elements."""
    agree = float((mask(Randomness(0)) == mask(*other)).float().mean())
    assert abs(agree - (0.3**2 + 0.7**2)) < 0.02


def test_numbers_side_by_side_are_no_key() -> None:
    """Seed 1 and batch 11 must not be seed 11 and batch 1."""
    keys = {Randomness(a, b, c).key("n") for a in (1, 11, 111) for b in (1, 11, 111) for c in (1, 11, 111)}
    assert len(keys) == 27
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_dropout_keeps_the_mean_and_the_share(p: float) -> None:
    found = mask(Randomness(0), p=p)
    kept = found != 0
    assert abs(float(kept.float().mean()) - (1 - p)) < 0.02
    if p < 1:
        share = round((1 - p) * 2**16) / 2**16  # p comes in these steps, and the scale is the inverse of its step
        assert torch.allclose(found[kept], X[kept] / share), "what is kept is scaled"
        assert abs(float(found.mean()) - 1) < 0.06


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_dropped_independently(p: float) -> None:
    """Four of them share one random number, 16 bits each: every pattern comes as often as chance has it."""
    kept = (Randomness(3).dropout(torch.ones(400_000), p, "dropout") != 0).view(-1, 4).long()
    counts = torch.bincount(kept @ torch.tensor([1, 2, 4, 8]), minlength=16) / len(kept)
    for pattern, share in enumerate(counts.tolist()):
        ones = bin(pattern).count("1")
        assert abs(share - (1 - p) ** ones * p ** (4 - ones)) < 0.005


def test_a_mask_depends_on_neither_memory_nor_precision() -> None:
    """Element by element in the order of the indices: so channels_last and half precision drop what float32 drops."""
    x = torch.ones(2, 3, 5, 7)
    usual = Randomness(0).dropout(x, 0.4, "dropout")
    for other in (x.to(memory_format=torch.channels_last), x.bfloat16(), x.double()):
        found = Randomness(0).dropout(other, 0.4, "dropout")
        assert found.stride() == other.stride() and torch.equal(found != 0, usual != 0)


@pytest.mark.parametrize("p", [1e-9, 1 - 1e-9])
def test_dropout_of_nearly_nothing_and_nearly_all_stays_finite(p: float) -> None:
    assert torch.isfinite(Randomness(0).dropout(torch.ones(1000), p, "dropout")).all()


def test_dropout_has_the_gradient_of_its_mask() -> None:
    x = X.clone().requires_grad_()
    y = Randomness(0).dropout(x, 0.3, "n")
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_dropout_of_half_precision_stays_half() -> None:
    assert Randomness(0).dropout(X.bfloat16(), 0.3, "n").dtype == torch.bfloat16


class Attend(nn.Module):
    """Fused attention with dropout on its weights, options by name as users write them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 1, 2, 4)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.3, **self.options).reshape(-1, 8)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * torch.bernoulli(torch.full_like(x, 0.5))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x.view(-1, 2, 4))[0]
        return y.flatten(1)


class Fold(nn.Module):
    """A layer of images on (N, 8)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.view(-1, 8, 1, 1).expand(-1, -1, 2, 2))
        return y.mean((2, 3))


DRAWING = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout in place": lambda: nn.Dropout(0.5, inplace=True),
    "feature dropout": lambda: Fold(nn.Dropout2d(0.5)),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "feature alpha dropout": lambda: Fold(nn.FeatureAlphaDropout(0.5)),
    "attention": Attend,
    "causal attention": lambda: Attend(is_causal=True),
    "scaled attention": lambda: Attend(scale=0.3),
    "lstm": Recurrent,
    "rrelu": lambda: nn.RReLU(),
    "noise": Noise,
}


@pytest.mark.parametrize("name", DRAWING)
def test_whatever_draws_draws_by_its_key(name: str) -> None:
    """Same key, same numbers, whatever the default generator holds, and its state stays as it was; another batch,
    other numbers; and what draws inside a kernel is named in the plan's warnings."""
    model = nn.Sequential(nn.Linear(8, 8), DRAWING[name](), nn.Linear(8, 3))
    built = build(model, torch.randn(4, 8), 2)
    x, results = torch.randn(4, 8), []
    for seed, batch in ((0, 0), (1, 0), (2, 1)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(built.output(built.run(x, Randomness(7, batch))[-1]))
        assert torch.equal(before, torch.get_rng_state()), "the default generator was drawn from"
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    drawing = [node for node in built.graph.operations if draws(node)]
    assert drawing
    kernels = drawn_in_kernels(built.graph.train.graph)
    warned = any("inside a kernel" in warning for warning in built.plan.warnings)
    keyed = ("dropout", "lstm", "attention", "causal attention", "scaled attention")
    assert bool(kernels) == warned == (name not in keyed)


@pytest.mark.parametrize(("causal", "kind"), [(False, None), (True, None), (False, "bool"), (False, "float")])
def test_attention_written_out_is_the_kernel(causal: bool, kind: str | None) -> None:
    """With a dropout that spares next to all, keyed attention gives what the fused kernel gives, masks included.

    The smallest step of its p is 2**-16, by which what is kept is scaled.
    """
    q, k, v = (torch.randn(3, 2, 5, 4) for _ in range(3))
    keep = torch.rand(3, 1, 5, 5) < 0.7
    keep[..., 0] = True
    given = {None: None, "bool": keep, "float": torch.randn(3, 2, 5, 5)}[kind]
    found = Randomness(0).attention("n", q, k, v, given, 1e-9, causal)
    expected = F.scaled_dot_product_attention(q, k, v, given, 0.0, causal)
    torch.testing.assert_close(found, expected, rtol=4 * 2**-16, atol=1e-5)


def test_frozen_dropout_draws_nothing() -> None:
    """p=0, or a submodule in .eval(): nothing to key, nothing to warn of."""
    model = nn.Sequential(nn.Linear(8, 8), nn.AlphaDropout(0.0), nn.Dropout(0.5), nn.RReLU(), nn.Linear(8, 3))
    model[2].eval()
    model[3].eval()
    built = build(model, torch.randn(4, 8), 2)
    assert not [node.name for node in built.graph.operations if draws(node)]
    x = torch.randn(5, 8)
    assert torch.equal(built.output(built.run(x, Randomness(3))[-1]), model(x))
    assert not built.plan.warnings


# --- what the stages hold ---------------------------------------------------------------------------------------------


@SWEEP
@given(programs(), COUNTS)
def test_stages_hold_the_users_own_parameters_each_once(program: Program, n_stages: int) -> None:
    """Never two silent copies: the objects are the model's, and no trainable one stands in two stages."""
    built = build(program.model(), program.inputs(), n_stages)
    own = {id(t) for t in (*built.model.parameters(), *built.model.buffers())}
    for code in built.codes:
        assert {id(t) for t in (*code.body.parameters(), *code.body.buffers())} <= own
    owners = Counter(id(p) for code in built.codes for p in code.body.parameters() if p.requires_grad)
    assert set(owners.values()) <= {1}
    written = Counter(name for code in built.codes for name in code.written)
    assert set(written.values()) <= {1}


@SWEEP
@given(programs(), st.integers(2, 6))
def test_what_a_stage_sends_is_what_the_plan_says_crosses(program: Program, n_stages: int) -> None:
    """And it is free of the stage's graph, its shapes and dtypes those of the plan."""
    built = build(program.model(), program.inputs(), n_stages)
    for cut, code, values in zip(built.plan.cuts, built.codes, built.run(program.inputs()), strict=False):
        sent = {code.origin(name): values[name] for name in code.sends}
        assert sent.keys() == {spec.name for spec in cut.crossing}
        for spec in cut.crossing:
            value = sent[spec.name]
            if isinstance(value, Tensor):
                assert (tuple(value.shape), str(value.dtype)) == (spec.shape, f"torch.{spec.dtype}")
        assert built.codes[built.plan.cuts.index(cut)].head is not None


def test_buffers_that_a_stage_writes_are_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    built = build(model, torch.randn(4, 4), 3)
    written = [name for code in built.codes for name in code.written]
    assert sorted(written) == sorted(name for name, _ in model.named_buffers())


def test_the_code_of_a_stage_is_readable() -> None:
    built = build(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 4), 2)
    first, second = (code.text for code in built.codes)
    assert "def stage0(self, input_1)" in first
    assert "    # 0\n    linear = torch.ops.aten.linear.default(input_1" in first
    assert "head: SupConHead" in first
    assert "def stage1(self, linear_cut)" in second
    for text in (first, second):
        compile(text.partition("# head:")[0], "<stage>", "exec")


def test_every_node_of_the_one_graph_knows_its_stage() -> None:
    """Up to the losses, in order: nothing of a later stage stands before an earlier one's, heads aside."""
    built = build(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), X[:4, :4], 3)
    operations = [n for n in built.module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    stages = [node.meta[STAGE] for node in operations]
    assert stages == sorted(stages)
    assert set(stages) == {0, 1, 2}


@pytest.mark.parametrize("inputs", [{"x": 1, "bias": 2}, {"bias": 2, "x": 1}], ids=["in order", "turned round"])
def test_inputs_by_name_reach_their_stage(inputs: dict[str, int]) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x).relu()) + bias
            return y

    model = Late()
    values = {"x": torch.randn(4, 4), "bias": torch.randn(4, 3)}
    built = build(model, {name: values[name] for name in inputs}, 2)
    assert len(built.codes) == 2
    assert torch.equal(built.output(built.run(values)[-1]), call(model, values))


class Plain(nn.Module):
    """A group norm right behind every cut, in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(2, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x))
        return x.mean((2, 3))


def test_a_group_norm_behind_a_cut_does_not_crash() -> None:
    """torch 2.13 crashes in its backward where the input is channels_last and needs no gradient: the process died."""
    x = torch.randn(4, 4, 6, 6).to(memory_format=torch.channels_last)
    options: dict[str, Any] = {"devices": ["cpu"], "cut_at": ["convs.0", "convs.1"], "schedule": "sequential"}
    with autodecouple.compile(Plain(), 3, SMALL, example_inputs=(x,), **options) as decoupled:
        assert all(decoupled.train_step(x, target(4)).losses)
        text = "".join(decoupled.code)
    assert text.count("plain_memory(") == 2
