"""Conformance of every objective in the registry: its formula, isolation, streaming, the last stage, wrong targets.

These tests run over `autodecouple.objectives.OBJECTIVES`: one that is added is among them by its name, and fails until
`formulas.FORMULAS` says what it should compute. What only one objective has is tested beside it:

    normalisations of SCPL, modes of DeInfoReg and the bounds of its V, on heads alone    test_objectives
    Associated Learning's way back to the classes, and which term trains what             test_associated
    labels per token and position, rows that do not count                                 test_dense_objectives
    networks and decoders of heads on any shape    test_predsim, test_dgl, test_infonce, test_infopro, test_downstream
    coupled stages beside backprop                                                        test_streaming, test_coupled
    every executor under every schedule                                                   test_matrix
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BLOCKS, CLASSES, FAMILIES, ByHand, batch, captured, compiled, exact_batch
from formulas import FORMULAS, Given, layers, pooled, under
from graph_strategies import Program, programs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from training_tools import assert_same, delays, make_batches, sgd, train
from training_tools import compiled as compiled_cnn

import autodecouple
from autodecouple.errors import AutodecoupleError, InputError, PartitionError
from autodecouple.objectives import (
    DGL,
    OBJECTIVES,
    Associated,
    Auto,
    Backprop,
    DeInfoReg,
    Downstream,
    EarlyExit,
    InfoPro,
    LoCo,
    PredSim,
    SupCon,
)
from autodecouple.passes.capturing.bind import bind
from autodecouple.plans import Plan, TensorSpec
from autodecouple.randomness import Randomness
from autodecouple.schedules import Sequential, Streaming

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*had no two rows of one class")

ROOT = Path(__file__).resolve().parent.parent
NAMES = list(OBJECTIVES)
LOCAL = [name for name in NAMES if name != Backprop.name]
VARIANTS: dict[str, Any] = {
    "supcon eq2": SupCon(normalisation="eq2"),
    "supcon alg1": SupCon(normalisation="alg1", temperature=0.5, projector="linear"),
    "deinforeg unmerge": DeInfoReg(ce="unmerge", alpha=0.5, projector="mlp", widths=(8, 6)),
    "deinforeg paper": DeInfoReg(ce="paper", alpha=0.5, projector="mlp", widths=(8, 6)),
    "early_exit linear": EarlyExit(hidden=None),
    "predsim half": PredSim(beta=0.5),
    "dgl mlp": DGL("mlp", width=7),
    "dgl cnn": DGL("cnn"),
    "infopro ce": InfoPro(EarlyExit(), reconstruction=(1.0, 0.5)),
    "associated mse": Associated(width=5, reconstruction="mse", activation="sigmoid"),
    "downstream all": Downstream(blocks=3, budget=None),
    "auto poor": Auto(budget=1e-9),
    "mixed": ["associated", "supcon", "associated"],
    "coupled": ["infopro", "bp", "early_exit"],
    "overlapping": [LoCo(first=True), "bp", LoCo(SupCon())],
}
"""Other choices of objectives, and objectives beside each other."""
CASES = [*itertools.product(FAMILIES, NAMES), *itertools.product(FAMILIES, VARIANTS)]
QUICK = {
    *(("cnn", name) for name in ("supcon", "predsim", "infopro", "auto", "deinforeg", "associated")),
    *(("lstm", name) for name in ("dgl", "infonce", "loco", "bp")),
    ("transformer", "early_exit"),
}
"""Each objective once; those of the model's own blocks take longer."""


def slow_but(quick: Any, cases: Sequence[Any]) -> list[Any]:
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def loss_of(name: str) -> Any:
    return VARIANTS.get(name, name)


# 1. The formula of every stage: loss and gradient


def test_every_objective_has_its_formula() -> None:
    """Whoever adds an objective writes its paper's formula into formulas.py; all below then holds it to that."""
    assert set(NAMES) - {"auto", "bp"} == set(FORMULAS), "add the new objective to tests/formulas.py: FORMULAS"


def told_by_plan(loss: Any, plan: Plan) -> list[Any]:
    """The objective of each hidden stage: the one that was asked for, or what the plan says was made of it."""
    asked = list(loss) if isinstance(loss, list) else [loss] * len(plan.cuts)
    pairs = zip(asked, [stage.objective for stage in plan.stages[:-1]], strict=True)
    return [OBJECTIVES[name]() if getattr(each, "name", "") != name else each for each, name in pairs]


def trained_by(plan: Plan, top: int) -> range:
    """The stages that the loss of a stage trains: its own, those coupled to it, and the one before that overlaps."""
    first = top
    while first > 0 and plan.coupled_after(first - 1):
        first -= 1
    return range(first - int(first > 0 and plan.overlaps_after(first - 1)), top + 1)


def stages_with_loss(plan: Plan) -> list[int]:
    return [stage.index for stage in plan.stages if not plan.coupled_after(stage.index)]


def losses_by_hand(
    model: ByHand,
    plan: Plan,
    tails: Sequence[tuple[Any, dict[str, Tensor]]],
    x: Tensor,
    y: Tensor,
    criterion: Any = F.cross_entropy,
) -> list[Tensor | None]:
    """For every stage with a loss a forward of the stages that it trains, with the user's own modules, from features
    that are cut free; tails: the objective and the weights of each hidden stage's head."""
    losses, blocks = list[Tensor | None](), BLOCKS[model.family]
    told: Tensor | None = None
    with torch.no_grad():
        entering = [x]
        for name in blocks[:-1]:
            entering.append(model.block(name, entering[-1], x))
    for top in range(len(blocks)):
        if top not in stages_with_loss(plan):
            losses.append(None)
            continue
        h = entering[trained_by(plan, top).start]
        for stage in trained_by(plan, top):
            h = model.block(blocks[stage], h, x)
        if top == len(tails):
            losses.append(criterion(model.end(h, x), y))
            continue
        objective, weights = tails[top]
        mine = Given(
            h, model.mask(x), y, x, top / (len(tails) - 1), told if objective.encodes else None, model, criterion
        )
        loss, code = FORMULAS[objective.name](objective, weights, mine)
        told = code if objective.encodes else told
        losses.append(loss)
    return losses


def descend(parameters: list[Tensor], losses: list[Tensor | None], rate: float) -> None:
    total = sum(loss for loss in losses if loss is not None)
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter -= rate * gradient


def heads_of(decoupled: Any) -> list[dict[str, Tensor]]:
    """Copies of the heads' weights, one stage after the other."""
    heads = [stage.code.head for stage in decoupled.stages[:-1]]
    return [{} if head is None else {n: p.detach().clone() for n, p in head.named_parameters()} for head in heads]


def check_formula(family: str, loss: Any, batches: list[tuple[Tensor, Tensor]], criterion: Any = None) -> None:
    """Steps of plain gradient descent: losses and all weights, of the model and of heads, are those of the formulas."""
    rate, options = 0.05, {} if criterion is None else {"criterion": criterion, "example_target": batches[0][1]}

    def descent(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=rate)

    with compiled(family, loss, exact=True, optimizer=descent, **options) as decoupled:
        mine = ByHand(family, copy.deepcopy(decoupled.model).train())
        plan = decoupled.plan
        heads = [{n: w.requires_grad_() for n, w in head.items()} for head in heads_of(decoupled)]
        parameters = [*mine.model.parameters(), *(w for head in heads for w in head.values())]
        tails = list(zip(told_by_plan(loss, plan), heads, strict=True))
        for x, y in batches:
            found = decoupled.train_step(x, y).losses
            expected = losses_by_hand(mine, plan, tails, x, y, criterion or F.cross_entropy)
            for one, other in zip(found, expected, strict=True):
                assert one == (other if other is None else pytest.approx(other.item(), rel=1e-10, abs=1e-10))
            descend(parameters, expected, rate)
        for mine_, theirs in zip(mine.model.parameters(), decoupled.model.parameters(), strict=True):
            torch.testing.assert_close(theirs, mine_, rtol=1e-10, atol=1e-10)
        for index, (head, theirs) in enumerate(zip(heads, heads_of(decoupled), strict=True)):
            for part, value in theirs.items():
                note = functools.partial("{2} of head {0}: {1}".format, index, part)
                torch.testing.assert_close(value, head[part].detach(), rtol=1e-10, atol=1e-10, msg=note)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family, name", slow_but(QUICK, CASES))
@settings(max_examples=2, deadline=None)
@given(rows=st.lists(st.integers(2, 9), min_size=2, max_size=2), seed=st.integers(0, 2**16))
def test_every_stage_is_trained_by_the_formula(family: str, name: str, rows: list[int], seed: int) -> None:
    """To 1e-10 in float64, on any batches."""
    batches = [exact_batch(family, count, seed + index) for index, count in enumerate(rows)]
    check_formula(family, loss_of(name), batches)


def smoothed(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with weights of the classes and smoothing, from its definition."""
    weights, smoothing = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=scores.dtype), 0.2
    surprise = -scores.log_softmax(1)
    own = (weights[labels] * surprise[torch.arange(len(labels)), labels]).sum()
    every = (weights * surprise).sum() / CLASSES
    return ((1 - smoothing) * own + smoothing * every) / weights[labels].sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_criterion_is_the_users(family: str, name: str) -> None:
    """On the last stage, in the heads that ask for it, and nowhere else: torch's beside its definition."""
    batches = [exact_batch(family, 7, seed) for seed in range(2)]
    check_formula(family, name, batches, smoothed)
    weights, losses = torch.tensor([0.5, 1.0, 2.0, 1.0], dtype=torch.float64), []
    for criterion in (nn.CrossEntropyLoss(weights, label_smoothing=0.2), smoothed):
        with compiled(family, name, exact=True, criterion=criterion) as decoupled:  # one at a time: they share weights
            losses.append([loss for loss in decoupled.train_step(*batches[0]).losses if loss is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@pytest.mark.parametrize("name", ["downstream", "auto", "infonce", "bp"])
def test_targets_may_be_numbers_where_no_head_compares_classes(name: str) -> None:
    """The squared error of the scores, in place of their cross-entropy."""
    batches = [(exact_batch("cnn", rows, rows)[0], torch.randn(rows, CLASSES).double()) for rows in (6, 4)]
    check_formula("cnn", name, batches, lambda scores, numbers: (scores - numbers).square().mean())


def test_two_views_of_rows_of_their_own_classes_are_simclrs_batch() -> None:
    """SupCon of N rows in two views, all of other classes, is NT-Xent of these views; the code takes half of it."""
    first, second = (exact_batch("cnn", 5, seed)[0].flatten(1)[:, :6] for seed in (0, 1))
    z, y = F.normalize(torch.cat([first, second])), torch.arange(5).repeat(2)
    scores = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
    nt_xent = F.cross_entropy(scores, torch.arange(10).roll(5))
    features, labels = TensorSpec("h", (10, 6), "float64"), TensorSpec("target", (10,), "int64")
    for how, factor in (("code", 0.5), ("eq2", 10.0), ("alg1", 0.05)):
        head = SupCon(normalisation=how, projector="identity").head(features, labels)
        torch.testing.assert_close(head(torch.cat([first, second]), y)[0], factor * nt_xent, rtol=1e-10, atol=1e-10)


# 2. No loss reaches another stage


def trained_by_backprop(program: Program) -> set[str]:
    model = program.model()
    F.cross_entropy(program.call(model), torch.arange(4) % 3).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_isolation(program: Program, decoupled: Any, trained: set[str]) -> None:
    """Each loss reaches the parameters of its stage, all of them, its head's, and no others: by autograd."""
    inputs, y = bind(decoupled.graph, program.inputs()), torch.arange(4) % 3
    losses, _ = decoupled._compiled.module(*inputs, y, Randomness(0))
    plan, codes = decoupled.plan, decoupled._compiled.codes
    names = {id(p): name for name, p in decoupled.model.named_parameters()}
    bodies = [{names[id(p)] for p in code.body.parameters() if p.requires_grad} & trained for code in codes]
    for loss, top in zip(losses, stages_with_loss(plan), strict=True):
        reached = {names[id(p)] for p in with_gradient(loss, decoupled.model)}
        assert reached == set().union(*(bodies[stage] for stage in trained_by(plan, top))), top
        for stage, code in enumerate(codes):
            if code.head is not None:
                whole = [p for p in code.head.parameters() if p.requires_grad]
                assert len(with_gradient(loss, code.head)) == (len(whole) if stage == top else 0), (top, stage)
    assert set().union(*bodies) == trained


def with_gradient(loss: Tensor, module: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else []
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


class Noted(torch.optim.SGD):
    """Changes nothing, and remembers whether it was given a gradient."""

    was_given = False

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = (p for group in self.param_groups for p in group["params"])
        self.was_given = any(p.grad is not None and bool(p.grad.any()) for p in parameters)


def silent(head: Any) -> Any:
    """The head with a loss that says nothing."""

    def run(*args: Any, **kwargs: Any) -> Any:
        loss, signal = head(*args, **kwargs)
        return 0 * loss, signal

    return run


def check_overlapping(program: Program, compile_it: Callable[[], Any]) -> None:
    """Where stages overlap it is they, and no graph, that stop a gradient: with one loss at a time, whom it reaches."""
    with compile_it() as first:
        plan = first.plan
    for top in stages_with_loss(plan):
        with compile_it() as decoupled:
            for stage in decoupled.stages:
                if stage.run_head is not None and stage.index != top:
                    stage.run_head = silent(stage.run_head)
            decoupled.train_step(program.inputs(), torch.arange(4) % 3)
            reached = {stage.index for stage in decoupled.stages if stage.optimizer and stage.optimizer.was_given}
        assert top in reached <= set(trained_by(plan, top))


def check_each_isolated(program: Program, n_stages: int, choices: list[Any]) -> None:
    """One capture, each of these losses."""
    trained = trained_by_backprop(program)
    graph = autodecouple.capture(program.model(), program.inputs())
    for loss in choices:
        options: dict[str, Any] = {"devices": ["cpu"], "executor": "inline", "optimizer": Noted}
        compile_it = functools.partial(autodecouple.compile, graph, n_stages, loss, **options)
        try:
            decoupled = compile_it()
        except (InputError, PartitionError):  # too few cuts, or, of InfoNCE, none with positions
            continue
        if any(cut.overlaps for cut in decoupled.plan.cuts):
            check_overlapping(program, compile_it)
        else:
            check_isolation(program, decoupled, trained)
        decoupled.close()


SWEEP: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
GRAPHS = programs(min_steps=3, outputs=("tensor",))
MIXED = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3)


@pytest.mark.timeout(120)
@settings(max_examples=2, **SWEEP)
@given(program=GRAPHS, name=st.sampled_from(NAMES), mixed=MIXED)
def test_no_loss_reaches_another_stage(program: Program, name: str, mixed: list[str]) -> None:
    """Of one objective, and of others beside each other."""
    check_each_isolated(program, len(mixed) + 1, [name, mixed])


@pytest.mark.slow
@settings(max_examples=12, **SWEEP)
@given(program=GRAPHS, mixed=MIXED)
def test_no_loss_reaches_another_stage_of_any_objective(program: Program, mixed: list[str]) -> None:
    check_each_isolated(program, len(mixed) + 1, [*NAMES, mixed])


# 3. Streaming equals sequential


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(1, 9))
@pytest.mark.parametrize("name", NAMES)
def test_streaming_equals_sequential_at_every_depth(name: str, depth: int) -> None:
    """To the last bit, with dropout, BatchNorm, late stages, and whatever torch's default generator draws meanwhile;
    test_streaming draws lists of objectives beside each other."""
    batches = make_batches("dropout", [6, 6, 6, 4, 6, 2])
    torch.manual_seed(1)
    expected = train(compiled_cnn("dropout", 4, name, lanes=1, schedule=Sequential(), optimizer=sgd), batches)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with delays(depth):
        streamed = compiled_cnn("dropout", 4, name, schedule=Streaming(queue_depth=depth), optimizer=sgd)
        assert_same(train(streamed, batches), expected)
    assert torch.equal(torch.get_rng_state(), before)


# 4. The last stage


@pytest.mark.parametrize("name", [LOCAL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in LOCAL[1:])])
def test_a_detached_classifier_gives_the_last_stage_nothing(name: str) -> None:
    """SCPL's last stage has a loss of its own; the classifier, on detached features, is one more unit."""
    with compiled("cnn", name, cut_at=(), detach_classifier=True) as decoupled:
        plan, codes = decoupled.plan, decoupled._compiled.codes
        nodes = ("mean", "linear") if name == "infonce" else ("linear",)  # which reads positions
        assert plan.stages[-1].nodes == nodes and plan.cuts[-1].detached
        losses, _ = decoupled._compiled.module(*batch("cnn", 6, 0), Randomness(0))
        parameters = list(decoupled.model.parameters())
        found = torch.autograd.grad(losses[-1], parameters, allow_unused=True, retain_graph=True)
        reached = {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
        assert reached == {id(p) for p in codes[-1].body.parameters()}
        assert {id(p) for p in codes[-2].body.parameters()}.isdisjoint(reached)


def test_a_classifier_that_is_to_be_detached_and_coupled_is_refused() -> None:
    """It was coupled, without a word."""
    for loss in ("bp", ["supcon", "supcon", "supcon", "bp"]):
        with pytest.raises(InputError, match="detach_classifier=True trains the classifier on detached features"):
            autodecouple.plan(captured("cnn")[0], n_stages=4, loss=loss, detach_classifier=True, devices=["cpu"])
    plan = autodecouple.plan(captured("cnn")[0], n_stages=3, loss=["bp", "bp", "supcon"], detach_classifier=True)
    assert [cut.detached for cut in plan.cuts] == [False, False, True]


# 5. Associated Learning's inference


@pytest.mark.parametrize("family", ["transformer", *(pytest.param(f, marks=pytest.mark.slow) for f in ("cnn", "lstm"))])
@pytest.mark.parametrize("stage", [0, 2])
def test_associated_learning_answers_by_the_way_back(family: str, stage: int) -> None:
    """h_1(... h_k(b_k(f_k(... f_1(x))))), of which the last gives the paper's inference, an earlier one a shortcut."""
    x, y = exact_batch(family, 6, 1)
    with compiled(family, Associated(width=6), exact=True) as decoupled:
        decoupled.train_step(x, y)
        found = decoupled.exits.predict(x, stage)
        mine, heads, h = ByHand(family, copy.deepcopy(decoupled.model).eval()), heads_of(decoupled), x
        for name in BLOCKS[family][: stage + 1]:
            h = mine.block(name, h, x)
        code = layers(under("bridge.", heads[stage]), pooled(h, mine.mask(x)), torch.tanh).tanh()
        for level in range(stage, -1, -1):
            code = layers(under("decoder.", heads[level]), code, torch.tanh)
            code = code.tanh() if level else code
        torch.testing.assert_close(found, code, rtol=1e-10, atol=1e-10)


# What a user sees


WRONG: dict[str, tuple[Any, str]] = {
    "floats": (torch.rand(6), "int64 class indices.*target.long"),
    "small integers": (torch.arange(6, dtype=torch.int32) % CLASSES, "int64 class indices.*target.long"),
    "bits": (torch.ones(6, dtype=torch.bool), "int64 class indices.*target.long"),
    "one-hot": (torch.eye(6), r"\(6, 6\)"),
    "another number of rows": (torch.arange(5) % CLASSES, "6 rows"),
    "no rows": (torch.tensor(1), r"shape \(\)"),
    "another class": (torch.tensor([0, 1, 2, 3, 4, 0]), "class 4, .* has 4 classes"),
    "a class below zero": (torch.tensor([0, 1, 2, 3, -1, 0]), "class -1"),
    "a list": ([0, 1, 2, 3, 0, 1], "is list"),
    "nothing": (None, "target is missing"),
}


@pytest.mark.parametrize("name", NAMES)
def test_targets_that_do_not_fit_are_refused_before_anything_runs(name: str) -> None:
    x, y = batch("cnn", 6, 0)
    with compiled("cnn", name, optimizer=sgd) as decoupled:
        before = copy.deepcopy(decoupled.state_dict())
        for kind, (target, said) in WRONG.items():
            with pytest.raises(InputError, match=said):
                decoupled.train_step(x, target)
            assert_same(decoupled.state_dict(), before, kind)
        assert decoupled.train_step(x, y).losses


@pytest.mark.parametrize("name", NAMES)
def test_an_example_target_that_no_head_can_compare_with_is_refused_when_compiling(name: str) -> None:
    """Where there is a criterion for numbers, by the objectives that need classes; the others take it."""
    x, numbers = batch("cnn", 6, 0)[0], torch.rand(6, CLASSES)
    graph, _ = captured("cnn")
    options: dict[str, Any] = {"example_target": numbers, "criterion": F.mse_loss, "devices": ["cpu"]}
    takes = name in ("downstream", "auto", "infonce", "bp")
    try:
        with autodecouple.compile(graph, 4, name, example_inputs=(x,), **options) as decoupled:
            assert takes and decoupled.train_step(x, numbers).losses
    except AutodecoupleError as error:
        assert not takes and isinstance(error, InputError), error
        compares = getattr(OBJECTIVES[name](), "local", OBJECTIVES[name]()).name
        assert f"{compares!r} needs targets that are int64 class indices" in str(error)
        assert 'loss="bp"' in str(error)


def test_the_users_guide_has_every_objective() -> None:
    """A row of README.md's table, a name in its example of an error, and a source in the objective's own words."""
    text = (ROOT / "README.md").read_text()
    rows = [line.split("`")[1] for line in text.split("## Methods")[1].split("\n## ")[0].splitlines() if "| `" in line]
    assert rows[: len(NAMES)] == NAMES
    with pytest.raises(InputError) as refused:
        autodecouple.compile(nn.Linear(2, 2), 2, "supcom")
    assert f"InputError: {refused.value} CutError" in " ".join(text.split())
    for name, make in OBJECTIVES.items():
        told = type(make()).__doc__ or ""
        assert "Source: " in told or name in ("auto", "bp"), f"{name}: say in its docstring where it is from"
