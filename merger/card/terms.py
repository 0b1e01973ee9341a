"""What the licences of models ask of who publishes something made of them: a table, and words for its columns.

A summary by programmers, and no legal advice: the texts count. Not here: what follows for a merge (licences).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What a licence asks, or forbids, in the word that tables and sentences use."""

    CREDIT = "credit"
    NOTICE = "notice"
    SHARE_ALIKE = "share alike"
    SAME_TERMS = "same terms"
    USES = "restricted uses"
    NAME = "name"
    NON_COMMERCIAL = "non-commercial"
    NO_DERIVATIVES = "no derivatives"


KINDS: Mapping[Kind, str] = {
    Kind.CREDIT: "name the makers and keep the licence's text; many ask to say what was changed",
    Kind.NOTICE: "pass on the file NOTICE, or one with a given sentence",
    Kind.SHARE_ALIKE: "publish under this licence alone, without further restrictions",
    Kind.SAME_TERMS: "pass its terms on: the result is under them, whatever else it is under",
    Kind.USES: "some uses are forbidden, and the prohibition is passed on",
    Kind.NAME: "the result's name, or a sentence beside it, has to say what it was made of",
    Kind.NON_COMMERCIAL: "no commercial use, of the result either",
    Kind.NO_DERIVATIVES: "nothing that is made of it may be published",
}


@dataclass(frozen=True)
class Terms:
    """A licence.

    Args:
        name: its identifier: the Hub's where it has one.
        title: its name for people.
        url: its text.
        asks: what it asks, the strictest last.
        covers: other licences whose conditions are met by publishing under this one.
        notice: the sentence that the file NOTICE has to hold.
        built_with: the words that have to stand beside the model.
        begins: what the result's name has to begin with.
    """

    name: str
    title: str
    url: str
    asks: tuple[Kind, ...]
    covers: tuple[str, ...] = ()
    notice: str | None = None
    built_with: str | None = None
    begins: str | None = None


_SPDX = "https://spdx.org/licenses/"
_CC = "https://creativecommons.org/licenses/"
_FREE: tuple[Kind, ...] = ()
_CREDIT = (Kind.CREDIT,)
_APACHE = (Kind.CREDIT, Kind.NOTICE)
_ALIKE = (Kind.CREDIT, Kind.SHARE_ALIKE)
_RAIL = (Kind.CREDIT, Kind.SAME_TERMS, Kind.USES)
_LLAMA = (Kind.CREDIT, Kind.NOTICE, Kind.SAME_TERMS, Kind.USES)
_RESEARCH = (Kind.CREDIT, Kind.SAME_TERMS, Kind.NON_COMMERCIAL)


def _cc(name: str, title: str, *more: Kind) -> Terms:
    path = name.removeprefix("cc-").rpartition("-")
    return Terms(name, f"Creative Commons {title} {path[2]}", f"{_CC}{path[0]}/{path[2]}/", (Kind.CREDIT, *more))


def _llama(version: str, built_with: str | None, begins: str | None, brand: str = "Llama") -> Terms:
    title = f"{brand} {version} Community License"
    notice = f"{brand} {version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved."
    asks = (*_LLAMA, Kind.NAME) if built_with else _LLAMA
    url = f"https://www.llama.com/llama{version.replace('.', '_')}/license/"
    return Terms(f"llama{version}", title, url, asks, notice=notice, built_with=built_with, begins=begins)


_TABLE = (
    Terms("unlicense", "The Unlicense", f"{_SPDX}Unlicense.html", _FREE),
    Terms("cc0-1.0", "Creative Commons Zero 1.0", "https://creativecommons.org/publicdomain/zero/1.0/", _FREE),
    Terms("wtfpl", "WTFPL", f"{_SPDX}WTFPL.html", _FREE),
    Terms("mit", "MIT License", f"{_SPDX}MIT.html", _CREDIT),
    Terms("isc", "ISC License", f"{_SPDX}ISC.html", _CREDIT),
    Terms("zlib", "zlib License", f"{_SPDX}Zlib.html", _CREDIT),
    Terms("bsd", "BSD License", f"{_SPDX}BSD-3-Clause.html", _CREDIT),
    Terms("bsd-2-clause", "BSD 2-Clause License", f"{_SPDX}BSD-2-Clause.html", _CREDIT),
    Terms("bsd-3-clause", "BSD 3-Clause License", f"{_SPDX}BSD-3-Clause.html", _CREDIT),
    Terms("cdla-permissive-2.0", "CDLA Permissive 2.0", f"{_SPDX}CDLA-Permissive-2.0.html", _CREDIT),
    _cc("cc-by-3.0", "Attribution"),
    _cc("cc-by-4.0", "Attribution"),
    Terms("apache-2.0", "Apache License 2.0", f"{_SPDX}Apache-2.0.html", _APACHE),
    Terms("mpl-2.0", "Mozilla Public License 2.0", f"{_SPDX}MPL-2.0.html", _ALIKE),
    Terms("lgpl-3.0", "GNU Lesser General Public License 3.0", f"{_SPDX}LGPL-3.0-only.html", _ALIKE),
    Terms("gpl-2.0", "GNU General Public License 2.0", f"{_SPDX}GPL-2.0-only.html", _ALIKE),
    Terms("gpl-3.0", "GNU General Public License 3.0", f"{_SPDX}GPL-3.0-only.html", _ALIKE,
          covers=("lgpl-3.0", "mpl-2.0", "cc-by-sa-4.0")),
    Terms("agpl-3.0", "GNU Affero General Public License 3.0", f"{_SPDX}AGPL-3.0-only.html", _ALIKE,
          covers=("gpl-3.0", "lgpl-3.0", "mpl-2.0")),
    _cc("cc-by-sa-3.0", "Attribution-ShareAlike", Kind.SHARE_ALIKE),
    Terms("cc-by-sa-4.0", "Creative Commons Attribution-ShareAlike 4.0", f"{_CC}by-sa/4.0/", _ALIKE,
          covers=("cc-by-sa-3.0",)),
    Terms("openrail", "OpenRAIL", "https://www.licenses.ai/ai-licenses", _RAIL),
    Terms("openrail++", "CreativeML Open RAIL++-M", "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
          _RAIL),
    Terms("bigscience-openrail-m", "BigScience OpenRAIL-M",
          "https://bigscience.huggingface.co/blog/bigscience-openrail-m", _RAIL),
    Terms("bigscience-bloom-rail-1.0", "BigScience RAIL 1.0",
          "https://bigscience.huggingface.co/blog/the-bigscience-rail-license", _RAIL),
    Terms("creativeml-openrail-m", "CreativeML OpenRAIL-M",
          "https://huggingface.co/spaces/CompVis/stable-diffusion-license", _RAIL),
    Terms("bigcode-openrail-m", "BigCode OpenRAIL-M", "https://huggingface.co/spaces/bigcode/bigcode-model-license-agreement",
          _RAIL),
    Terms("deepseek", "DeepSeek License", "https://github.com/deepseek-ai/DeepSeek-LLM/blob/HEAD/LICENSE-MODEL", _RAIL),
    Terms("falcon", "Falcon LLM License", "https://falconllm.tii.ae/terms-and-conditions.html", (*_RAIL, Kind.NAME),
          built_with="Built using Falcon LLM technology from the Technology Innovation Institute"),
    Terms("gemma", "Gemma Terms of Use", "https://ai.google.dev/gemma/terms", _LLAMA,
          notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"),
    Terms("llama2", "Llama 2 Community License", "https://ai.meta.com/llama/license/", _LLAMA,
          notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All "
          "Rights Reserved."),
    _llama("3", "Built with Meta Llama 3", "Llama 3", brand="Meta Llama"),
    _llama("3.1", "Built with Llama", "Llama"),
    _llama("3.2", "Built with Llama", "Llama"),
    _llama("3.3", "Built with Llama", "Llama"),
    _llama("4", "Built with Llama", "Llama"),
    Terms("qwen", "Qwen License", "https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE",
          (*_LLAMA, Kind.NAME), built_with="Built with Qwen",
          notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
          "Reserved."),
    _cc("cc-by-nc-3.0", "Attribution-NonCommercial", Kind.NON_COMMERCIAL),
    _cc("cc-by-nc-4.0", "Attribution-NonCommercial", Kind.NON_COMMERCIAL),
    _cc("cc-by-nc-sa-3.0", "Attribution-NonCommercial-ShareAlike", Kind.SHARE_ALIKE, Kind.NON_COMMERCIAL),
    _cc("cc-by-nc-sa-4.0", "Attribution-NonCommercial-ShareAlike", Kind.SHARE_ALIKE, Kind.NON_COMMERCIAL),
    Terms("qwen-research", "Qwen Research License", "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
          (Kind.CREDIT, Kind.NOTICE, Kind.SAME_TERMS, Kind.NAME, Kind.NON_COMMERCIAL), built_with="Built with Qwen",
          notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. All Rights "
          "Reserved."),
    Terms("mrl", "Mistral AI Research License", "https://mistral.ai/licenses/MRL-0.1.md", _RESEARCH),
    Terms("mnpl", "Mistral AI Non-Production License", "https://mistral.ai/licenses/MNPL-0.1.md", _RESEARCH),
    Terms("fair-noncommercial-research-license", "FAIR Noncommercial Research License",
          "https://huggingface.co/facebook/fair-noncommercial-research-license/blob/main/LICENSE", _RESEARCH),
    _cc("cc-by-nd-4.0", "Attribution-NoDerivatives", Kind.NO_DERIVATIVES),
    _cc("cc-by-nc-nd-3.0", "Attribution-NonCommercial-NoDerivatives", Kind.NON_COMMERCIAL, Kind.NO_DERIVATIVES),
    _cc("cc-by-nc-nd-4.0", "Attribution-NonCommercial-NoDerivatives", Kind.NON_COMMERCIAL, Kind.NO_DERIVATIVES),
)  # fmt: skip

TERMS: Mapping[str, Terms] = {terms.name: terms for terms in _TABLE}
"""The licences by name, the ones that ask least first."""

ALIASES: Mapping[str, str] = {
    "apache2": "apache-2.0", "apache 2.0": "apache-2.0", "apache-2": "apache-2.0",
    "gpl-2.0-only": "gpl-2.0", "gpl-3.0-only": "gpl-3.0", "gpl-3.0-or-later": "gpl-3.0",
    "agpl-3.0-only": "agpl-3.0", "agpl-3.0-or-later": "agpl-3.0", "lgpl-3.0-only": "lgpl-3.0",
    "lgpl-3.0-or-later": "lgpl-3.0",
    "tongyi-qianwen": "qwen", "tongyi-qianwen-license-agreement": "qwen", "qwen-license": "qwen",
    "tongyi-qianwen-research": "qwen-research", "qwen-research-license": "qwen-research",
    "deepseek-license": "deepseek", "falcon-llm-license": "falcon", "falcon-180b-license": "falcon",
    "mistral-ai-research-license": "mrl", "mrl-0.1": "mrl", "mistral-ai-research-licence": "mrl",
    "mistral-ai-non-production-license": "mnpl", "mnpl-0.1": "mnpl",
    "gemma-terms-of-use": "gemma", "llama-2-community-license": "llama2", "llama-3-community-license": "llama3",
}  # fmt: skip
"""Other names that cards give them, in lower case."""

_HUB_NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
"""
HUB_NAMES = frozenset(_HUB_NAMES.split())
"""What the Hub takes for ``license``, besides other and unknown; as its answers listed them in 2026."""
