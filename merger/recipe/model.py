"""The recipe language as frozen dataclasses, in one shape whatever form the recipe was written in.

The three forms become one: a recipe is a tuple of modules, a module a tuple of slices, a slice a tuple of sources. The
`models:` form is one nameless module with one slice whose sources span all layers; `slices:` one nameless module.
Several documents are one recipe, the result's, with the others as its stages.
Not here: reading text (parse) and what the models hold (plan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merger.errors import Problem, Span
from merger.recipe.searched import Searched


@dataclass(frozen=True)
class Rule:
    """One value for the tensors whose name contains `filter` (None: every tensor).

    Args:
        values: one number, or a gradient: numbers spread evenly from a slice's first layer to its last.
        filter: a case-sensitive substring of the tensor's name.
        at: where the value stands in the recipe.
    """

    values: tuple[float, ...]
    filter: str | None = None
    at: Span | None = field(default=None, compare=False)

    def matches(self, tensor: str) -> bool:
        """Whether this rule speaks about the tensor of this name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor

    def value_at(self, position: float) -> float:
        """The gradient's value at `position`, 0 for the slice's first layer and 1 for its last."""
        x = position * (len(self.values) - 1)
        low = int(x)
        high = min(low + 1, len(self.values) - 1)
        share = x - low
        return (1.0 - share) * self.values[low] + share * self.values[high]


@dataclass(frozen=True)
class Setting:
    """What a recipe gives for one parameter at one place: rules, of which the first that matches counts."""

    rules: tuple[Rule, ...]

    def value_at(self, tensor: str, position: float) -> float | None:
        """The value for a tensor at a position in its slice; None where no rule speaks about it."""
        rule = next((rule for rule in self.rules if rule.matches(tensor)), None)
        return None if rule is None else rule.value_at(position)


Parameters = Mapping[str, Setting]
"""A `parameters:` block: settings by the parameter's name."""


def first_value(levels: Sequence[Parameters], name: str, tensor: str, position: float) -> float | None:
    """The value of parameter `name` from the first of `levels` whose setting speaks about this tensor."""
    for level in levels:
        value = level[name].value_at(tensor, position) if name in level else None
        if value is not None:
            return value
    return None


@dataclass(frozen=True)
class ModelRef:
    """A model as recipes name it: ``org/name[@revision][+adapter]`` or a folder. Equal when all parts are equal.

    Args:
        path: Hub repo id or folder, as written.
        revision: branch, tag or commit on the Hub.
        adapter: a LoRA adapter to be added to it.
        checkpoints: it is the mean of these, until they are looked up and a stage makes it.
        at: where it stands in the recipe.
    """

    path: str
    revision: str | None = None
    adapter: ModelRef | None = None
    checkpoints: Checkpoints | None = None
    at: Span | None = field(default=None, compare=False)

    def __str__(self) -> str:
        pinned = self.path if self.revision is None else f"{self.path}@{self.revision}"
        return pinned if self.adapter is None else f"{pinned}+{self.adapter}"


@dataclass(frozen=True, kw_only=True)
class Measure(ModelRef):
    """Statistics that are measured on the way, in place of those that lie somewhere; `path` calls them for readers.

    Args:
        kind: what is measured.
        model: of which model.
        measure: on which texts, as `merger measure --data` has them, or random-tokens.
        tokens: on how many tokens; 65,536, unless it is said.
        length: how many of them follow each other in one sequence; 512, unless it is said.
        seed: for tokens drawn by chance.
        blocks: of Gram matrices blocks of so many inputs along the diagonal, and nothing else.
        merged: whether each layer is fed what the merge's own earlier layers make of the texts, as RegMean++ has it.
    """

    kind: str
    model: ModelRef
    measure: str
    tokens: int = 65_536
    length: int = 512
    seed: int = 0
    blocks: int | None = None
    merged: bool = False


@dataclass(frozen=True)
class Checkpoints:
    """Those of a run whose mean is one model.

    Args:
        match: a pattern for names of branches and tags, such as step-*; of folders it is the model's own path.
        of_folders: whether it is.
        last: how many, the last ones; all of them, unless it is said.
        every: only those whose number is a multiple of this.
        by: how much each goes in: alike (uniform), rising (linear), or as a decay of the learning rate would have it
            (wsm-cosine, wsm-linear, wsm-1-sqrt).
        ema: in place of that, what remains of the mean so far with each checkpoint after the first.
        weights: in place of that, a number for each, the oldest first; what counts is their ratios.
    """

    match: str
    of_folders: bool = False
    last: int | None = None
    every: int | None = None
    by: str = "uniform"
    ema: float | None = None
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Source:
    """One model's share in a slice.

    Args:
        model: the model.
        statistics: where what was measured of the model lies, for methods that ask for it; or how it is measured.
        layer_range: ``[start, end)`` of the model's layers from zero; None: all of them (the `models:` form).
        parameters: settings for this model alone.
        added: True for a base model that the recipe names only as base_model.
        at: where the source stands in the recipe; `range_at`: its layer_range.
    """

    model: ModelRef
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    added: bool = False
    statistics: ModelRef | None = None
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
class Taken:
    """Tensors that one model gives as they are, whatever else the recipe says of them.

    Args:
        filter: a part of the tensors' names, case and all; of several rules the first that matches counts.
        model: the model that gives them.
        at: where the rule stands in the recipe.
    """

    filter: str
    model: ModelRef
    at: Span | None = field(default=None, compare=False)

    def matches(self, tensor: str) -> bool:
        """Whether the rule speaks about the tensor of this name."""
        return self.filter in tensor


@dataclass(frozen=True)
class TokenOf:
    """A token of a model: by its text, or by its id, or with neither the same token there."""

    model: ModelRef
    token: str | None = None
    id: int | None = None


@dataclass(frozen=True)
class TokenRow:
    """What a recipe says of one token of the result.

    Args:
        token: the token.
        source: where its row comes from in models that lack it; "zero": zeros; None: from where others come.
        force: whether that holds for the models that have the token, too.
        at: where the token stands in the recipe.
    """

    token: str
    source: TokenOf | str | None = None
    force: bool = False
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the result: the recipe's `tokenizer:` block, or its `tokenizer_source`.

    Args:
        source: "union": the base model's with the tokens of all others; "base": the base model's; else that model's.
        tokens: the tokens of which the recipe says where their rows come from.
        pad_to_multiple_of: the embedding's number of rows is a multiple of this.
        missing: how a token gets its row that none of the merged models has: "mean", "zero", "subword" or "omp".
        k: for "omp": how many shared tokens a row is put together from, at most.
        rows: "tokens": a row for each token and no more; "base": as many as the base model has, those behind the tokens
            being its own.
        at: where the block stands in the recipe.
    """

    source: ModelRef | str = "union"
    tokens: tuple[TokenRow, ...] = ()
    pad_to_multiple_of: int = 1
    missing: str = "mean"
    k: int = 64
    rows: str = "tokens"
    at: Span | None = field(default=None, compare=False)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """The models that it names."""
        named = [self.source, *(row.source.model for row in self.tokens if isinstance(row.source, TokenOf))]
        return tuple(dict.fromkeys(one for one in named if isinstance(one, ModelRef)))


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of the result.

    Args:
        text: "auto": the one that most of the models have; the name of one that is built in; or Jinja text.
        at: where it stands in the recipe.
    """

    text: str
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become one expert of each layer.

    Args:
        source_model: the model.
        positive_prompts: texts such as this expert shall be chosen for.
        negative_prompts: texts such as it shall not be chosen for.
        noise_scale: the standard deviation of what is added to its MLPs, at random.
        residual_scale: what its MLPs' output is multiplied by.
        at: where the expert stands in the recipe.
    """

    source_model: ModelRef
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: everything but the MLPs is the base model's.

    Args:
        experts: the models whose MLPs become experts, one expert each.
        shared_experts: one model at most, whose MLPs every token goes through.
        gate_mode: how the router's rows are made: from the prompts' hidden states, their embeddings, or by chance.
        experts_per_token: how many experts each token goes through; None: the layout's default.
        architecture: the beginning of the name of the layout to write; None: the first that fits the models.
        at: where `experts` stands in the recipe; `gate_mode_at`, `architecture_at`: those values.
    """

    experts: tuple[Expert, ...]
    shared_experts: tuple[Expert, ...] = ()
    gate_mode: str = "hidden"
    experts_per_token: int | None = None
    architecture: str | None = None
    at: Span | None = field(default=None, compare=False)
    gate_mode_at: Span | None = field(default=None, compare=False)
    architecture_at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Publish:
    """Where the result goes and how: the recipe's `publish:` block.

    Args:
        repo: ``owner/name`` on the Hub, or None.
        private: whether a repo that has to be created is private.
        license: the licence that the card states: the Hub's identifier, several joined by AND, or other.
        license_name: what a licence is called that the Hub has no identifier for.
        license_link: where that licence can be read.
        license_override: why it may be published although a parent's licence speaks against it.
        create_pr: open a pull request instead of committing to main.
        gguf: the types in which the result is written for llama.cpp as well, as GGUF files beside the others.
        safetensors: whether safetensors, config and tokenizer are written; else the GGUF files are all that there is.
        fp8: their matrices are brought to eight bits, with a scale a "block" or a "channel"; None: they are not.
        template: Jinja2 templates for the card: a file or folder, relative to the working directory, or on the Hub
            hf://owner/name/path@revision.
        left_out: the templates that a lock names of the machine on which it was made: they are not read.
        at: where the block stands in the recipe; `license_at`, `gguf_at`, `fp8_at`, `template_at`: those values.
    """

    repo: str | None = None
    private: bool = False
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_override: str | None = None
    create_pr: bool = False
    gguf: tuple[str, ...] = ()
    safetensors: bool = True
    fp8: str | None = None
    template: str | None = None
    left_out: str | None = None
    at: Span | None = field(default=None, compare=False)
    license_at: Span | None = field(default=None, compare=False)
    gguf_at: Span | None = field(default=None, compare=False)
    fp8_at: Span | None = field(default=None, compare=False)
    template_at: Span | None = field(default=None, compare=False)

    @property
    def plain(self) -> bool:
        """Whether the result's tensors are published as they are made."""
        return self.safetensors and self.fp8 is None


@dataclass(frozen=True)
class Perplexity:
    """A text whose perplexity is measured.

    Args:
        text: a file, relative to the working directory, or ``hf://[datasets/]owner/name[@revision]/file`` on the Hub.
        window: how many tokens the model sees at once, at most; fewer where the model was made for fewer.
        stride: how many tokens the window moves at a time; half of it, unless it is said.
        limit: how many characters of the text are read, from its beginning.
        at: where the text is named.
    """

    text: str
    window: int = 512
    stride: int = 256
    limit: int = 100_000
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Evaluate:
    """What is measured of the result before it is published: the recipe's `evaluate:` block.

    Args:
        perplexity: a text, or a list of texts.
        tasks: tasks of lm-evaluation-harness: names, or YAML files of one's own.
        limit: how many examples of each task are tried, from its beginning; all of them, unless it is said.
        parents: measure the models that it is made of as well.
        dtype: in what the models are run: ``float32``, or ``bfloat16`` for half of the memory.
        at: where the block stands in the recipe.
    """

    perplexity: tuple[Perplexity, ...] = ()
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    parents: bool = False
    dtype: str = "float32"
    at: Span | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Args:
        path: the file's name as the user gave it.
        text: the file's text, as it was.
        modules: what is made of what; none for a mixture.
        name: the name under which other documents of the file take what this one makes.
        stages: the documents that make what this one is made of, each after those that it is made of itself.
        mean_of: of a stage that is the mean of a run's checkpoints, and no document: how they were chosen.
        base_model: the recipe's own base_model, or None.
        tensors: which tensors come from one model alone, by parts of their names.
        parameters: the settings at the top level.
        dtype: ``float32``, ``float16``, ``bfloat16``, or None: follow the base model, else the first model.
        seed: for methods that draw random numbers.
        allow_non_finite: whether NaN and infinities of the models are taken as they are; else they are refused.
        tokenizer: the result's tokenizer; None: that of the base model, else of the first model, as it is.
        chat_template: the result's chat template; None: the one that comes with its tokenizer.
        evaluate: what is measured of the result; None: nothing.
        publish: where the result goes.
        search: how the numbers that are left open are found; None: none are.
        lora: for a result that is a LoRA adapter: of what kind; None: it is a model.
        mixture: the mixture of experts that the recipe asks for, or None.
        warnings: what is allowed but has no effect, or is likely not meant.
        at: where the document begins; `name_at`, `allow_at`: where its name and allow_non_finite stand.
    """

    path: str
    text: str
    modules: tuple[Module, ...]
    name: str | None = None
    stages: tuple[Recipe, ...] = ()
    mean_of: Checkpoints | None = None
    base_model: ModelRef | None = None
    tensors: tuple[Taken, ...] = ()
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0
    allow_non_finite: bool = False
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    evaluate: Evaluate | None = None
    publish: Publish = field(default_factory=Publish)
    search: Searched | None = None
    lora: Lora | None = None
    mixture: Mixture | None = None
    warnings: tuple[Problem, ...] = field(default=(), compare=False)
    at: Span | None = field(default=None, compare=False)
    name_at: Span | None = field(default=None, compare=False)
    allow_at: Span | None = field(default=None, compare=False)

    @property
    def documents(self) -> tuple[Recipe, ...]:
        """The stages, and the recipe itself."""
        return (*self.stages, self)

    @property
    def written(self) -> tuple[Recipe, ...]:
        """Those of them that stand in its text."""
        return tuple(recipe for recipe in self.documents if recipe.mean_of is None)

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every slice of every module, in the recipe's order."""
        return tuple(piece for module in self.modules for piece in module.slices)

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every model once that is read, of all documents, in the order of its first mention."""
        made = {ModelRef(stage.name or "") for stage in self.stages}
        return tuple(dict.fromkeys(ref for recipe in self.documents for ref in recipe.parents if ref not in made))

    @property
    def parents(self) -> tuple[ModelRef, ...]:
        """Every model and stage once that this document names: the merged ones, then those that only give tokens."""
        return tuple(dict.fromkeys([*self.merged, *(self.tokenizer.models if self.tokenizer else ())]))

    @property
    def merged(self) -> tuple[ModelRef, ...]:
        """The models that tensors or the config come from: experts, sources, base models, those of `tensors`."""
        mixed = () if self.mixture is None else (*self.mixture.experts, *self.mixture.shared_experts)
        experts = [expert.source_model for expert in mixed]
        sources = [source.model for piece in self.slices for source in piece.sources]
        bases = [piece.base_model for piece in self.slices if piece.base_model is not None]
        own = [self.base_model] if self.base_model is not None else []
        return tuple(dict.fromkeys([*experts, *sources, *bases, *own, *(rule.model for rule in self.tensors)]))

    @property
    def is_conversion(self) -> bool:
        """Whether it takes one model as it is, for nothing but its form."""
        pieces = [(piece.method, [source.layer_range for source in piece.sources]) for piece in self.slices]
        return not self.publish.safetensors and len(self.references) == 1 and pieces == [("passthrough", [None])]

    @property
    def merges_adapters(self) -> bool:
        """Whether its models are adapters, and its result is one."""
        return self.lora is not None and not self.lora.extracted

    @property
    def adapters(self) -> tuple[ModelRef, ...]:
        """Every adapter that is added to one of the models once, in the order of the models."""
        return tuple(dict.fromkeys(ref.adapter for ref in self.models if ref.adapter is not None))

    @property
    def references(self) -> tuple[ModelRef, ...]:
        """All that is looked up: the models, then their adapters, then what was measured of them before."""
        return (*self.models, *self.adapters, *(each for each in self.statistics if each not in self.measures))

    @property
    def statistics(self) -> tuple[ModelRef, ...]:
        """Every place of statistics that is named beside a model once."""
        sources = (source for recipe in self.documents for piece in recipe.slices for source in piece.sources)
        return tuple(dict.fromkeys(source.statistics for source in sources if source.statistics is not None))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """Those of them that are measured on the way."""
        return tuple(each for each in self.statistics if isinstance(each, Measure))

    @property
    def config_model(self) -> ModelRef:
        """The model whose config and side files the result takes: the base model, else the recipe's first model."""
        base = self.base_model or self.slices[0].base_model
        return base or self.merged[0]

    @property
    def names_model(self) -> ModelRef:
        """The model after whose tensors the result's are named: its config model, or that of the stage which is it."""
        stages = {ModelRef(stage.name or ""): stage for stage in self.stages}
        ref = self.config_model
        while ref in stages:
            ref = stages[ref].config_model
        return ref
