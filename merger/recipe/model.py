"""The recipe language as frozen dataclasses, in one shape whatever form the recipe was written in.

The three forms become one: a recipe is a tuple of modules, a module a tuple of slices, a slice a tuple of sources. The
`models:` form is one nameless module with one slice whose sources span all layers; `slices:` one nameless module.
Not here: reading text (parse) and what the models hold (plan).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from merger.errors import Problem, Span
from merger.recipe.settings import Parameters


@dataclass(frozen=True)
class ModelRef:
    """A model as recipes name it: ``org/name[@revision][+adapter]`` or a folder. Equal when all parts are equal.

    Args:
        path: Hub repo id or folder, as written.
        revision: branch, tag or commit on the Hub.
        adapter: a LoRA adapter to be added to it.
        at: where it stands in the recipe.
    """

    path: str
    revision: str | None = None
    adapter: ModelRef | None = None
    at: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        pinned = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return pinned if self.adapter is None else f"{pinned}+{self.adapter}"


@dataclass(frozen=True)
class Source:
    """One model's share in a slice.

    Args:
        model: the model.
        layer_range: ``[start, end)`` of the model's layers from zero; None: all of them (the `models:` form).
        parameters: settings for this model alone.
        added: True for a base model that the recipe names only as base_model.
        at: where the source stands in the recipe; `range_at`: its layer_range.
    """

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    added: bool = False
    at: Span | None = field(default=None, compare=False)
    range_at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Slice:
    """A run of output layers made from equally long runs of its sources' layers.

    Args:
        sources: the models, in the recipe's order.
        method: the name of the merge method in force here: the slice's own, else the recipe's.
        base_model: the base model in force here, or None.
        parameters: the slice's own settings.
        at: where the slice stands in the recipe.
    """

    sources: tuple[Source, ...]
    method: str
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Module:
    """A part of the model and the slices it is made of.

    Args:
        name: the module's name in the architecture (architecture.py says which there are); None: every module.
        slices: from the first layer to the last.
        parameters: the module's own settings.
        at: where the module stands in the recipe.
    """

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters = field(default_factory=dict)
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Lora:
    """The result is a LoRA adapter: of the adapters that the recipe merges, or of what a fine-tune changed in its base.

    Args:
        rank: how many directions each matrix has at most; None: as many as all the adapters together.
        alpha: the adapter's lora_alpha; None: its rank, with which B A counts once.
        core: whether adapters are merged in the directions that they have (Core Space), not as whole matrices.
        extracted: whether it is what a fine-tune changed.
        include: a regular expression that the names of tensors must match somewhere; None: all do.
        exclude: one that they must not match.
        embeddings: whether embeddings are taken apart too; else the adapter holds them whole.
        distribute_scale: whether singular values are shared between A and B; else B has them.
        skip_rest: whether tensors that are no matrices are left out; else the adapter holds them whole.
    """

    rank: int | None = None
    alpha: float | None = None
    core: bool = False
    extracted: bool = False
    include: str | None = None
    exclude: str | None = None
    embeddings: bool = False
    distribute_scale: bool = False
    skip_rest: bool = False


@dataclass(frozen=True)
class Publish:
    """Where the result goes and how: the recipe's `publish:` block.

    Args:
        repo: ``owner/name`` on the Hub, or None.
        private: whether a repo that has to be created is private.
        license: the licence identifier that the card states.
        create_pr: open a pull request instead of committing to main.
        template: a file or folder of Jinja2 templates for the card, relative to the working directory.
        at: where the block stands in the recipe; `license_at`, `template_at`: those values.
    """

    repo: str | None = None
    private: bool = False
    license: str | None = None
    create_pr: bool = False
    template: str | None = None
    at: Span | None = field(default=None, compare=False)
    license_at: Span | None = field(default=None, compare=False)
    template_at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Args:
        path: the file's name as the user gave it.
        text: the file's text, as it was.
        modules: what is made of what.
        base_model: the recipe's own base_model, or None.
        parameters: the settings at the top level.
        dtype: ``float32``, ``float16``, ``bfloat16``, or None: follow the base model, else the first model.
        seed: for methods that draw random numbers.
        publish: where the result goes.
        lora: for a result that is a LoRA adapter: of what kind; None: it is a model.
        warnings: what is allowed but has no effect, or is likely not meant.
    """

    path: str
    text: str
    modules: tuple[Module, ...]
    base_model: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    publish: Publish = field(default_factory=Publish)
    lora: Lora | None = None
    warnings: tuple[Problem, ...] = field(default=(), compare=False)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every slice of every module, in the recipe's order."""
        return tuple(piece for module in self.modules for piece in module.slices)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model once, in the order of its first mention: the sources of each slice, then its base model."""
        sources = [source.model for piece in self.slices for source in piece.sources]
        bases = [piece.base_model for piece in self.slices if piece.base_model is not None]
        own = [self.base_model] if self.base_model is not None else []
        return tuple(dict.fromkeys([*sources, *bases, *own]))

    @property
    def merges_adapters(self) -> bool:
        """Whether its models are adapters, and its result is one."""
        return self.lora is not None and not self.lora.extracted

    @property
    def adapters(self) -> tuple[ModelRef, ...]:
        """Every adapter that is added to one of the models once, in the order of the models."""
        return tuple(dict.fromkeys(ref.adapter for ref in self.models if ref.adapter is not None))

    @property
    def donor(self) -> ModelRef:
        """The model whose config and side files the result takes: the base model, else the recipe's first model."""
        base = self.base_model or self.slices[0].base_model
        return base or self.models[0]
