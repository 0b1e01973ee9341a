"""Laws over the registry: what holds for every method, and what each method claims. The cases are drawn."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from thorough import THOROUGH

from merger.methods.registry import Law, Method, methods
from merger.methods.steps.random import Rng, keep_by_rank

from .cases import KNOWN, Case, cases, cut_points
from .oracles import ORACLES

METHODS = {name: method for name, method in methods().items() if method.function.__module__.startswith("merger.")}
CLAIMS = [(name, law) for name, method in METHODS.items() for law in method.laws]
SUMMED_BY_BLOCK = (
    "slerp",
    "sce",
    "pcb",
    "multislerp",
    "karcher",
    "metagpt",
    "nan",
)  # by chunks, which whole blocks of the engine's size do not cut
every_method = pytest.mark.parametrize("name", METHODS)
lawful = settings(
    max_examples=400 if THOROUGH else 6,
    deadline=None,
    derandomize=not THOROUGH,
    suppress_health_check=[HealthCheck.filter_too_much],
)


def sizes(case: Case) -> torch.Tensor:
    """At each entry the magnitude of what the method may add up there: the unit of rounding."""
    weights = [
        abs(number) for name, value in case.arguments.items() if name != KNOWN for number in np.atleast_1d(value)
    ]
    return torch.stack([tensor.abs() for tensor in case.tensors]).sum(0) * max(1.0, *weights, 1.0) ** 2


def assert_close(one: torch.Tensor, other: torch.Tensor, unit: torch.Tensor) -> None:
    """Equal but for a few roundings of float32."""
    assert ((one - other).abs() <= 1e-6 * unit).all(), (one, other)


# What holds always


@every_method
@lawful
@given(data=st.data())
def test_result_has_the_inputs_shape_is_finite_and_new(name: str, data: st.DataObject) -> None:
    """The result has the inputs' shape and dtype, is finite, and is not one of the inputs, which stay as they were."""
    case = data.draw(cases(METHODS[name]))
    before = [tensor.clone() for tensor in case.tensors]
    result = case.run()
    assert result.shape == case.tensors[0].shape
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
    assert all(torch.equal(*pair) for pair in zip(case.tensors, before, strict=True))
    result.add_(1)
    assert all(torch.equal(*pair) for pair in zip(case.tensors, before, strict=True))


@every_method
@lawful
@given(data=st.data())
def test_same_seed_gives_the_same_bits(name: str, data: st.DataObject) -> None:
    """A second call, with other calls between, gives the same bits."""
    case = data.draw(cases(METHODS[name]))
    first = case.run()
    case.with_tensors([tensor + 1 for tensor in case.tensors]).run()
    assert torch.equal(first, case.run())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.unit != "matrix"])
@lawful
@given(data=st.data())
def test_both_bodies_give_the_same_bits(name: str, data: st.DataObject) -> None:
    """On torch's tensors the second bodies of a method's steps make what the compiled ones make, LAPACK's apart."""
    case = data.draw(cases(METHODS[name]))
    assert torch.equal(case.run_on_tensors(), case.run())


@every_method
@lawful
@given(data=st.data())
def test_blocked_is_whole(name: str, data: st.DataObject) -> None:
    """Cut into blocks anywhere, the result is the same: to the bit without norms, else to float32's rounding."""
    case = data.draw(cases(METHODS[name]))
    whole = case.run()
    blocked = case.run_in_blocks(data.draw(cut_points(case.tensors[0].numel())))
    if name in SUMMED_BY_BLOCK or case.arguments.get("rescale"):
        assert torch.allclose(blocked, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max()))
    else:
        assert torch.equal(blocked, whole)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.measure and method.unit == "entries"]
)
def test_what_is_measured_is_the_whole_tensor(name: str) -> None:
    """Of one whose second half is a hundred times as large as its first, cut between them."""
    method, draw = METHODS[name], np.random.default_rng(7)
    scale = np.repeat(np.float32([0.01, 1]), 500)
    count = method.models[1] or 3
    tensors = [torch.from_numpy(draw.standard_normal(1000, np.float32) * scale) for _ in range(count)]
    given = {param.argument: 0.3 if param.default is None else param.default for param in method.params}
    given |= {key: 0.3 for key in ("density", "select_topk") if key in given}
    given |= {param.argument: [given[param.argument]] * count for param in method.params if param.per_model}
    case = Case(method, tuple(tensors), given, Rng(0, "w"))
    torch.testing.assert_close(case.run_in_blocks([500]), case.run(), rtol=1e-5, atol=1e-7)


@every_method
@lawful
@given(data=st.data())
def test_float32_is_float64_but_for_rounding(name: str, data: st.DataObject) -> None:
    """The result is that of the formula evaluated in float64 over whole tensors, within float32's rounding."""
    case = data.draw(cases(METHODS[name]))
    defaults = {param.argument: param.default for param in case.method.params}
    arguments: dict[str, Any] = {**defaults, **case.arguments}
    if case.method.random:
        arguments["masks"] = [mask(case, model, arguments) for model in range(len(case.tensors))]
    answer = ORACLES[name]([tensor.double().numpy() for tensor in case.tensors], **arguments)
    result = case.run().double().numpy()
    wrong = np.min([np.abs(result - right) for right in answer.right], axis=0)
    assert (wrong <= 1.2e-6 * answer.size).all()


def mask(case: Case, model: int, arguments: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Which entries of a model a random method keeps, as 1 and 0."""
    tensor, density = case.tensors[model], arguments["density"][model]
    if "epsilon" not in arguments:
        return case.rng.mask(model, tensor.numel(), density).reshape(tensor.shape).astype(np.float64)
    kept = keep_by_rank(tensor.numpy(), model, density, arguments["epsilon"][model], case.rng)
    return kept.reshape(tensor.shape).astype(np.float64)


@every_method
def test_docstring_example_runs(name: str) -> None:
    """The example in the docstring gives what it says."""
    function = METHODS[name].function
    examples = doctest.DocTestFinder(recurse=False).find(
        function, name, globs=vars(importlib.import_module(function.__module__)).copy()
    )
    runner = doctest.DocTestRunner()
    results = [runner.run(example) for example in examples]
    assert sum(result.attempted for result in results) >= 2
    assert not sum(result.failed for result in results)


@every_method
def test_docstring_opens_with_one_sentence(name: str) -> None:
    """The line for menus and cards is one sentence on one line, and a paper has a link."""
    method = METHODS[name]
    assert inspect.cleandoc(method.function.__doc__ or "").splitlines()[0] == method.summary
    assert method.summary.endswith(".")
    assert ". " not in method.summary
    assert method.paper is None or method.paper.url.startswith("https://")


# What a method claims


def zero(case: Case, law: Law, data: st.DataObject) -> None:
    """Zeros give zeros."""
    assert not case.with_tensors([torch.zeros_like(tensor) for tensor in case.tensors]).run().any()


def idempotent(case: Case, law: Law, data: st.DataObject) -> None:
    """With every parameter at its default, copies of one tensor give that tensor."""
    case = data.draw(cases(case.method, only_required=True))
    case = case.with_tensors([case.tensors[0]] * len(case.tensors))
    assert_close(case.run(), case.tensors[0], sizes(case))


def permutation(case: Case, law: Law, data: st.DataObject) -> None:
    """The order of the models, each with its own parameters, does not matter."""
    order = data.draw(st.permutations(range(len(case.tensors))))
    arguments = {
        argument: [value[place] for place in order] if isinstance(value, list) else value
        for argument, value in case.arguments.items()
    }
    other = Case(case.method, tuple(case.tensors[place] for place in order), arguments, case.rng)
    answers = ORACLES[case.method.name]([tensor.double().numpy() for tensor in case.tensors], **case.arguments)
    doubtful = torch.from_numpy(np.ptp(answers.right, axis=0) > 1e-6 * answers.size)
    unit = torch.from_numpy(answers.size).masked_fill(doubtful, float("inf"))
    assert_close(other.run().double(), case.run().double(), unit)


def scale(case: Case, law: Law, data: st.DataObject) -> None:
    """Inputs times a power of two give the result times it, to the bit."""
    factor = 2.0 ** data.draw(st.integers(-8, 8))
    assert torch.equal(case.with_tensors([tensor * factor for tensor in case.tensors]).run(), case.run() * factor)


def endpoints(case: Case, law: Law, data: st.DataObject) -> None:
    """At 0 the result is the first tensor, at 1 the second, to the bit and the sign of zero."""
    (parameter,) = law.settings
    for end in (0.0, 1.0):
        result = case.run(**{parameter: end})
        assert torch.equal(result.view(torch.int32), case.tensors[int(end)].view(torch.int32))


def full(case: Case, law: Law, data: st.DataObject) -> None:
    """With the law's settings the method equals another one, to the bit."""
    like = METHODS[str(law.like)]
    shared = {param.argument for param in like.params}
    given_to_both = {**case.arguments, **law.settings}
    other = {argument: value for argument, value in given_to_both.items() if argument in shared}
    assert torch.equal(case.run(**law.settings), like.function(list(case.tensors), **other))


LAWS: Mapping[str, Callable[[Case, Law, st.DataObject], None]] = {
    law.__name__: law for law in (zero, idempotent, permutation, scale, endpoints, full)
}


@pytest.mark.parametrize(("name", "law"), CLAIMS, ids=[f"{name}-{law.name}" for name, law in CLAIMS])
@lawful
@given(data=st.data())
def test_claimed_law_holds(name: str, law: Law, data: st.DataObject) -> None:
    """What a method claims of itself is so."""
    LAWS[law.name](data.draw(cases(METHODS[name])), law, data)


@every_method
def test_a_method_claims_laws_that_exist(name: str) -> None:
    """Every method claims at least one law, each a known one, and names parameters and methods that exist."""
    method: Method = METHODS[name]
    assert method.laws
    for law in method.laws:
        assert law.name in LAWS
        assert law.settings.keys() <= {param.argument for param in method.params}
        assert law.like is None or law.like in METHODS


@every_method
def test_every_method_has_an_oracle(name: str) -> None:
    """No method goes without a second evaluation."""
    assert name in ORACLES
