"""The model card: what was merged, how, from which commits, under which licences, and how to use it.

What templates may name is made here, all of it plain data without a path of this machine. Not here: metadata
(metadata), how templates are filled in (templates), the lock file (facts), and which licence it is (licences).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml
from markupsafe import Markup

from merger.card.escape import link_address
from merger.card.facts import TITLE, MixtureFacts, PlanSummary, fold_alike, mixture_facts
from merger.card.licences import Judgement, keys, licence_of
from merger.card.metadata import GGUF, PROMPTS, embedder, front_matter, head_class, library, metadata
from merger.card.relations import Parameter, Relation, Relations, parameters
from merger.card.templates import fill, refuse_unused
from merger.card.terms import KINDS, Terms
from merger.lock.locked import display_name
from merger.methods.registry import Method, Paper
from merger.planning.plan import Plan
from merger.recipe.model import Publish, Recipe
from merger.runtime import requirement
from merger.safety.names import HUB, hub_path
from merger.safety.numbers import size

# ---- recipe ---------------------------------------------------------------------------------------------------------


def shown_recipe(planned: Plan) -> str:
    """The text, word for word but for the places of folders: in values, and where they stand in comments."""
    recipe = planned.locked.recipe
    named = {model.ref.path: f"./{model.name}" for model in planned.locked.models if model.located.commit is None}
    patterns = [of.match for stage in recipe.stages if (of := stage.mean_of) and of.of_folders]
    named |= {path: f"./{path.rstrip('/').split('/')[-1]}" for path in patterns}
    everything = {**named, **_template(recipe.publish)}
    places = {path: name for path, name in everything.items() if path.removeprefix("./") != name.removeprefix("./")}
    text = recipe.text.removeprefix("\ufeff")
    for start, end, anchored, value in reversed(_scalars(text) if places else []):
        found = next((path for path in places if value in (path, f"{path}/") or value.startswith(f"{path}+")), None)
        if found is not None:
            new = places[found] + value[len(found) :].removeprefix("/")
            text = text[:start] + _replace_value(text[start:end], value, new, anchored) + text[end:]
    for path in sorted(places, key=len, reverse=True):
        if path.count("/") > 1:
            text = text.replace(path.rstrip("/"), places[path])
    return text


def _template(publish: Publish) -> Mapping[str, str]:
    path = publish.template or publish.left_out
    return {} if path is None or hub_path(path) else {path: f"./{path.rstrip('/').split('/')[-1]}"}


def _scalars(text: str) -> list[tuple[int, int, bool, str]]:
    """Each value's beginning and end in the text, whether an anchor or a tag stands before it, and what it means."""
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    scalars: Iterable[Any] = (event for event in events if isinstance(event, yaml.ScalarEvent))
    return [
        (event.start_mark.index, event.end_mark.index, bool(event.anchor or event.tag), event.value)
        for event in scalars
    ]


def _replace_value(source: str, value: str, new: str, anchored: bool) -> str:
    """The value's source with another value; one that is escaped is quoted anew."""
    return source.replace(value, new) if anchored or value in source else json.dumps(new, ensure_ascii=False)


def bibtex(name: str, paper: Paper) -> str:
    """The entry for the paper of the method `name`.

    >>> print(bibtex("ties", Paper("Prateek Yadav, Derek Tam", 2023, "TIES", "https://arxiv.org/abs/2306.01708")))
    @misc{yadav2023ties,
      title = {TIES},
      author = {Prateek Yadav and Derek Tam},
      year = {2023},
      eprint = {2306.01708},
      archivePrefix = {arXiv},
      url = {https://arxiv.org/abs/2306.01708},
    }
    """
    surname = re.sub(r"[^a-z]", "", paper.by.lower().split()[0])
    arxiv = re.fullmatch(r"https://arxiv\.org/abs/([\d.]+)", paper.url)
    fields = {"title": paper.title, "author": paper.authors.replace(", ", " and "), "year": paper.year}
    if arxiv:
        fields |= {"eprint": arxiv[1], "archivePrefix": "arXiv"}
    lines = [f"  {key} = {{{value}}}," for key, value in {**fields, "url": paper.url}.items()]
    return "\n".join([f"@misc{{{surname}{paper.year}{name},", *lines, "}"])


# ---- render ---------------------------------------------------------------------------------------------------------


GIVES, BASE, ADAPTER = "model", "base model", "LoRA adapter"
CONFIG_ONLY, STAGE = "config and tokenizer only", "stage"

NO_PARTS: Mapping[str, Any] = {
    "related": Relations(), "lineage": "", "pictures": {}, "evaluation": None, "metadata": {}, "chats": False,
    "search": None,
}  # fmt: skip
"""The parts of the card that are known only at the end, as they are before: how the parents relate; the family as a
tree of text; pictures by name, each with its `alt` and its `place` beside the card; a table with its `columns`, `rows`,
a `note` and a `verdict` of sentences; more keys for the front matter; whether there is a chat template; and what a
search has found, as run.found has it."""


@dataclass(frozen=True)
class ParentRow:
    """A row of the card's table of parents."""

    name: str
    url: Markup
    commit: str | None
    licence: str | None
    role: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A row of the card's table of stages: a document of the recipe, its methods and what it is made of."""

    name: str | None
    methods: str
    models: tuple[str, ...]


def render(planned: Plan, table: Mapping[str, Method], name: str, parts: Mapping[str, Any] = NO_PARTS) -> str:
    """The text of README.md.

    Args:
        name: ``owner/name``, or the folder's last part.
        parts: what else the card shows; each name of `NO_PARTS` that is not there is as there.

    Raises:
        RecipeError: the recipe's own template cannot be rendered.
    """
    recipe, more = planned.locked.recipe, {**NO_PARTS, **parts}
    named = dict.fromkeys(piece.method for of in recipe.documents for piece in of.slices)
    mixed = [] if recipe.mixture is None else [mixture_facts(planned, recipe.mixture)]
    made: list[Method | MixtureFacts] = [*(table[method] for method in named), *mixed]
    used = [] if recipe.is_conversion else made
    facts = PlanSummary(planned, f"{HUB if '/' in name else './'}{name}")
    data = metadata(planned, used, keys(facts.licence.licences), more.pop("metadata"))
    content = {**_content(planned, table, used, facts), **_about(facts, data), "name": name, **more}
    body = fill(planned.locked.templates, recipe.publish, content)
    return f"{front_matter(data)}{body.strip()}\n"


def rehearse(planned: Plan, table: Mapping[str, Method]) -> None:
    """Fill the recipe's own templates in before anything is made: with none of what is known at the end, and with all.

    Raises:
        RecipeError: one of them breaks, or stands for nothing.
    """
    publish = planned.locked.recipe.publish
    if planned.locked.templates:
        refuse_unused(planned.locked.templates, publish)
        render(planned, table, publish.repo or "merged")
        render(planned, table, publish.repo or "merged", _SOME_PARTS)


_A_RELATION = Relation("layer 0", 0.5, 0.25, (1.0, 0.5), 0.75)
_SOME_PARTS: Mapping[str, Any] = {
    "related": Relations((_A_RELATION,), (_A_RELATION,), ("a sentence",)),
    "lineage": "a tree",
    "pictures": {name: {"alt": "words", "place": "a.png"} for name in ("lineage", "settings", "movement")},
    "evaluation": {
        "columns": ["model", "task"],
        "rows": [["one", "0.5"]],
        "note": "a sentence",
        "verdict": ["a sentence"],
    },
    "chats": True,
    "search": {
        "sentence": "a sentence",
        "table": "a.csv",
        "numbers": [["weight", "0 to 1", "0.5"]],
        "columns": ["measured", "this model"],
        "rows": [["loss", "0.5"]],
        "told": ["a sentence"],
        "pictures": [{"alt": "words", "place": "a.png"}],
    },
}


def _content(
    planned: Plan, table: Mapping[str, Method], used: Sequence[Method | MixtureFacts], facts: PlanSummary
) -> dict[str, Any]:
    recipe, repo, target = planned.locked.recipe, hub_path(facts.to or ""), facts.to or ""
    found = parameters(planned, table)
    parents = _parents(planned, [each for each in found if any(each.owners)])
    plan = {name: getattr(planned, name) for name in ("hash", "seed", "entries", "notes")}
    left = [{"why": why, "files": names} for why, names in facts.left_beside.items()]
    base = display_name(planned.locked.config_owner)
    return {
        "title": target.split("/")[-1],
        "address": repo or target,
        "target": target,
        "parents": parents,
        "shown": fold_alike(parents, lambda row: (row.role, row.settings, row.licence, row.commit is None)),
        "givers": _givers(planned, parents),
        "bases": [parent.name for parent in parents if parent.role == BASE],
        "adapters": [parent.name for parent in parents if parent.role == ADAPTER],
        "lora": _lora(planned),
        "all_local": all(parent.commit is None for parent in parents),
        "stages": [_stage(planned, table, each) for each in recipe.written] if len(recipe.written) > 1 else [],
        "any_local": any(parent.commit is None for parent in parents),
        "tokens": facts.tokens,
        "licence": _licence(planned, facts.licence),
        "methods": [_method(method) for method in used],
        "parameters": _in_force(found),
        "recipe": shown_recipe(planned),
        "plan": {**plan, "dtypes": facts.dtypes, "files": len(planned.files)},
        "beside": {"base": base, "doubts": planned.doubts, "left_out": left},
        "package": requirement(),
        "library": library(planned) if recipe.publish.safetensors else GGUF,
        "is_conversion": recipe.is_conversion,
        "embedder": embedder(planned),
        "on_hub": repo is not None,
        "first_file": planned.shards[0].name,
        "gguf": [{"kind": file.kind, "name": file.name} for file in planned.shards[0].beside],
        "class_name": planned.config.get("_class_name"),
        "auto_class": f"AutoModel{head_class(planned.config) or ''}",
    }


def _about(facts: PlanSummary, data: Mapping[str, Any]) -> dict[str, Any]:
    """What somebody wants to know who may use it, and the prompts of the example."""
    languages = data.get("language", [])
    begun, asked = next((PROMPTS[word] for word in languages if word in PROMPTS), PROMPTS["en"])
    return {
        "task": data.get("pipeline_tag", "").replace("-", " "),
        "languages": languages,
        "size": size(facts.plan.size),
        "context": facts.context,
        "begun": begun,
        "asked": asked,
    }


def _givers(planned: Plan, parents: Sequence[ParentRow]) -> list[str]:
    """What was merged; checkpoints under the name of their mean."""
    means = [stage for stage in planned.locked.recipe.stages if stage.mean_of is not None]
    within = {planned.locked.index(ref): stage.name or "" for stage in means for ref in stage.merged}
    given = [(number, parent) for number, parent in enumerate(parents) if parent.role == GIVES]
    return list(dict.fromkeys(within.get(number) or parent.name for number, parent in given))


def _lora(planned: Plan) -> dict[str, Any] | None:
    lora, config = planned.locked.recipe.lora, planned.config
    if lora is None:
        return None
    return {
        "extracted": lora.extracted,
        "core": lora.core,
        "rank": config["r"],
        "model": config["base_model_name_or_path"] or "",
        "auto_class": "AutoModelForCausalLM" if config["task_type"] == "CAUSAL_LM" else "AutoModel",
    }


def _licence(planned: Plan, found: Judgement) -> dict[str, Any]:
    return {
        "name": found.name,
        "stated": found.stated,
        "conflicts": [conflict.what for conflict in found.conflicts],
        "override": found.override,
        "notes": found.notes,
        "duties": [_duty(planned, terms) for terms in found.duties],
        "asks": _licence_asks(found),
        "built_with": list(dict.fromkeys(terms.built_with for terms in found.duties if terms.built_with)),
        "notices": [terms.notice for terms in found.duties if terms.notice],
    }


def _stage(planned: Plan, table: Mapping[str, Method], recipe: Recipe) -> Stage:
    """A row of the table of stages; of the result's own document without a name."""
    titles = dict.fromkeys(table[piece.method].title for piece in recipe.slices) if recipe.mixture is None else [TITLE]
    models = [planned.locked.model(ref) for ref in recipe.parents]
    own = recipe is not planned.locked.recipe
    return Stage(recipe.name if own else None, ", ".join(titles), tuple(display_name(model) for model in models))


def _duty(planned: Plan, terms: Terms) -> dict[str, Any]:
    """A licence of some parents: its name, its text, and of which models it is."""
    parents = [display_name(model) for model in planned.locked.parents if terms in licence_of(model).terms]
    return {"title": terms.title, "url": link_address(terms.url), "parents": parents}


def _licence_asks(found: Judgement) -> list[dict[str, Any]]:
    """What the licences ask, each with those that ask it."""
    asking = {kind: [terms.title for terms in found.duties if kind in terms.asks] for kind in KINDS}
    return [{"what": KINDS[kind], "licences": titles} for kind, titles in asking.items() if titles]


def _method(method: Method | MixtureFacts) -> dict[str, Any]:
    """What stands in its registration is Markdown of ours, or of the package that brings the method."""
    if isinstance(method, MixtureFacts):
        return asdict(method)
    own = {name: getattr(method, name) for name in ("name", "title", "summary")}
    return own | {
        "formula": Markup(f"$$ {method.formula} $$") if method.formula else None,
        "explanation": Markup(method.explanation),
        "paper": _paper(method.name, method.paper) if method.paper else None,
    }


def _paper(method: str, paper: Paper) -> dict[str, Any]:
    return {"title": paper.title, "url": link_address(paper.url), "authors": paper.by, "year": paper.year,
            "bibtex": bibtex(method, paper)}  # fmt: skip


def _in_force(found: Sequence[Parameter]) -> dict[str, Any]:
    """The names of those parameters that each parent has its own of, and the values of those that are for all."""
    for_all = [{"name": each.name, "value": value} for each in found if (value := each.course(""))]
    return {"columns": [each.name for each in found if any(each.owners)], "for_all": for_all}


def _parents(planned: Plan, own: Sequence[Parameter]) -> list[ParentRow]:
    """The models, each with what it has of these parameters; and the stages that have some."""
    rows = [_parent(planned, number) for number in range(len(planned.locked.parents))]
    owners = dict.fromkeys(owner for parameter in own for owner in parameter.owners if owner)
    known = {row.name for row in rows}
    rows += [ParentRow(name, Markup(), None, None, STAGE) for name in owners if name not in known]
    return [replace(row, settings=tuple(parameter.course(row.name) for parameter in own)) for row in rows]


def _parent(planned: Plan, number: int) -> ParentRow:
    model = planned.locked.models[number]
    pieces = [piece for recipe in planned.locked.recipe.written for piece in recipe.slices]
    bases = {planned.locked.index(piece.base_model) for piece in pieces if piece.base_model}
    mixture = planned.locked.recipe.mixture
    if mixture is not None and number not in [planned.locked.index(expert.source_model) for expert in mixture.experts]:
        bases.add(planned.locked.index(planned.locked.recipe.config_model))
    giving = any(number in job.givers for job in planned.jobs)
    role = (BASE if number in bases else GIVES) if giving else CONFIG_ONLY
    role = ADAPTER if model.lora is not None else role
    url = f"/{model.located.where}/tree/{model.located.commit}"  # a page of the Hub that the card lies on
    return ParentRow(
        display_name(model),
        link_address(url if model.located.commit else ""),
        model.located.commit,
        model.licence,
        role,
    )
