"""The rules of the recipe's `tensors:`: tensors taken from one model as they are.

Not here: tensors that are copied because the recipe does not speak about them (make).
"""

from __future__ import annotations

from collections.abc import Iterator

from merger.errors import Problem, did_you_mean
from merger.lock.locked import LockedModel
from merger.models.architecture import is_head
from merger.models.checkpoint import FLOATS, TensorInfo
from merger.planning.inputs.base import PASSTHROUGH, Job, Operand
from merger.planning.jobs.common import NOT_ALL_PREDICT, Making, shape_text
from merger.planning.jobs.fit import ONE_VOCABULARY
from merger.planning.tokens import disagreements
from merger.recipe.model import Taken


class Rules:
    """The rules of the recipe's `tensors:`, each of which takes the tensors it speaks about from one model."""

    def __init__(self, making: Making) -> None:
        self._making = making
        self._unused = dict.fromkeys(making.locked.recipe.tensors)

    def about(self, name: str) -> Taken | None:
        """The one that speaks about a tensor."""
        rule = next((rule for rule in self._making.locked.recipe.tensors if rule.matches(name)), None)
        if rule is not None:
            self._unused.pop(rule, None)
        return rule

    def take(self, rule: Taken, out: str, number: int, leading: TensorInfo) -> Iterator[Job]:
        """The job that takes a tensor from a rule's model in place of `leading` of the model of that number."""
        giver, model, leader = (
            self._making.locked.index(rule.model),
            self._making.locked.model(rule.model),
            self._making.locked.numbered(number),
        )
        name = head_in(model, out) if is_head(out) else leading.name
        if leader.architecture.predicts(leading.name):
            name = leader.architecture.moved_behind(leading.name, model.architecture.stacks)
        tensor = model.checkpoint.tensors.get(name)
        if tensor is None and leader.architecture.predicts(leading.name):
            yield self._making.copy(out, number, leading, NOT_ALL_PREDICT)
        elif tensor is None:
            self._refuse(rule, f"{model.name} has no tensor {name}", "are they of one architecture, and saved in full?")
        else:
            yield from self._of_another(rule, out, (giver, tensor), (number, leading))

    def _of_another(
        self, rule: Taken, out: str, given: tuple[int, TensorInfo], led: tuple[int, TensorInfo]
    ) -> Iterator[Job]:
        """The same once the tensor is known; both with the numbers of their models."""
        (giver, tensor), (number, leading) = given, led
        model, leader = self._making.locked.numbered(giver), self._making.locked.numbered(number)
        source, own = self._making.source(giver, tensor, out), self._making.source(number, leading, out)
        if self._making.tokens is None and model.by_token(tensor) and (told := disagreements([leader, model])):
            self._refuse(rule, f"the vocabularies differ: {told[model.ref]}", ONE_VOCABULARY)
        elif source.shape != own.shape:
            what = f"{tensor.name} is {shape_text(leading)} in {leader.name}, but {shape_text(tensor)} in {model.name}"
            self._refuse(rule, what, "only a tensor of the same shape can take its place")
        else:
            followed = self._making.config_models_dtype(leader, leading) if tensor.dtype in FLOATS else tensor.dtype
            dtype = self._making.dtype if self._making.dtype and tensor.dtype in FLOATS else followed
            why = f"the recipe takes {rule.filter} from {model.name}"
            yield Job(out, dtype, source.shape, PASSTHROUGH, (Operand(source, {"scale": 1.0}),), why=why)

    def _refuse(self, rule: Taken, what: str, hint: str) -> None:
        if not any(problem.at == rule.at for problem in self._making.findings.mismatches):
            problem = Problem(what, rule.at, f"tensors[{rule.filter}]", hint)
            self._making.findings.mismatches.append(problem)

    def tell_unused(self) -> None:
        """A rule that speaks about no tensor is misspelt."""
        words = dict.fromkeys(
            word for name in self._making.locked.config_model.checkpoint.tensors for word in name.split(".")
        )
        for rule in self._unused:
            what = f"no tensor's name contains {rule.filter!r}, or rules above it speak about all that do"
            hint = did_you_mean(rule.filter, [word for word in words if not word.isdigit()])
            self._making.findings.about_recipe(what, rule.at, f"tensors[{rule.filter}]", hint)


def head_in(model: LockedModel, name: str) -> str:
    """The name of the tensor that is the model's head, where the output's is called `name`."""
    own = model.checkpoint.tensors.get(name)
    tensor = model.embedding if own is None or model.is_tied else own
    return name if tensor is None else tensor.name
