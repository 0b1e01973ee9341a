"""The files beside a model that hold its licence, and which licence it is by the words it is known by.

Not here: what licences ask (card.terms).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

LICENCES = "licences/"
"""The folder beside a merge for the licences of its parents that are not its config model's."""

_NOTICE = re.compile(r"NOTICE(\.(txt|md))?", re.IGNORECASE)
_FILES = re.compile(rf"(LICEN[CS]E|COPYING|USE_POLICY)([-_.][\w.-]*)?|{_NOTICE.pattern}", re.IGNORECASE)
_TEXTS = re.compile(r"(LICEN[CS]E|COPYING)([-_.][\w.-]*)?", re.IGNORECASE)
_TITLE_CHARACTERS = 3_000
TITLE_BYTES = 4 * _TITLE_CHARACTERS
"""How much of a licence's text is looked at to tell which it is."""

_TITLES = (
    ("llama4", r"llama 4 community licen[cs]e"),
    ("llama3.3", r"llama 3\.3 community licen[cs]e"),
    ("llama3.2", r"llama 3\.2 community licen[cs]e"),
    ("llama3.1", r"llama 3\.1 community licen[cs]e"),
    ("llama3", r"llama 3 community licen[cs]e"),
    ("llama2", r"llama 2 community licen[cs]e"),
    ("gemma", r"gemma terms of use|gemma is provided under"),
    ("qwen-research", r"qwen research licen[cs]e agreement|tongyi qianwen research licen[cs]e"),
    ("qwen", r"(qwen|tongyi qianwen) licen[cs]e agreement"),
    ("deepseek", r"deepseek licen[cs]e agreement"),
    ("mrl", r"mistral ai research licen[cs]e"),
    ("mnpl", r"mistral ai non-production licen[cs]e"),
    ("falcon", r"(tii )?falcon(-| )?(llm|180b)( tii)? licen[cs]e"),
    ("bigscience-openrail-m", r"bigscience open(-| )?rail(-| )?m|bigscience rail licen[cs]e"),
    ("bigcode-openrail-m", r"bigcode open(-| )?rail(-| )?m"),
    ("creativeml-openrail-m", r"creativeml open ?rail(-| )?m"),
    ("cc-by-nc-nd-4.0", r"attribution-noncommercial-noderiv(ative)?s 4\.0|\bcc[- ]by[- ]nc[- ]nd[- ]4\.0"),
    ("cc-by-nc-sa-4.0", r"attribution-noncommercial-sharealike 4\.0|\bcc[- ]by[- ]nc[- ]sa[- ]4\.0"),
    ("cc-by-nc-4.0", r"attribution-noncommercial 4\.0|\bcc[- ]by[- ]nc[- ]4\.0"),
    ("cc-by-nd-4.0", r"attribution-noderiv(ative)?s 4\.0|\bcc[- ]by[- ]nd[- ]4\.0"),
    ("cc-by-sa-4.0", r"attribution-sharealike 4\.0|\bcc[- ]by[- ]sa[- ]4\.0"),
    ("cc-by-4.0", r"attribution 4\.0 international|\bcc[- ]by[- ]4\.0"),
    ("cc0-1.0", r"cc0 1\.0 universal"),
    ("agpl-3.0", r"gnu affero general public licen[cs]e"),
    ("lgpl-3.0", r"gnu lesser general public licen[cs]e version 3"),
    ("gpl-3.0", r"gnu general public licen[cs]e version 3"),
    ("gpl-2.0", r"gnu general public licen[cs]e version 2"),
    ("mpl-2.0", r"mozilla public licen[cs]e version 2\.0"),
    ("apache-2.0", r"apache licen[cs]e,? version 2\.0"),
    ("bsd-3-clause", r"redistribution and use in source and binary forms.*neither the name"),
    ("bsd-2-clause", r"redistribution and use in source and binary forms"),
    ("mit", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("unlicense", r"this is free and unencumbered software released into the public domain"),
)


def licence_files(files: Iterable[str]) -> tuple[str, ...]:
    """Those of a model's files that hold its licence and what else has to be passed on with it."""
    return tuple(sorted(name for name in files if _FILES.fullmatch(name) or name.startswith(LICENCES)))


def is_notice(name: str) -> bool:
    """Whether it is a file of sentences that every copy has to carry."""
    return _NOTICE.fullmatch(name) is not None


def licence_text(files: Iterable[str]) -> str | None:
    """The file that says what the licence is, if there is one; of several the one with the plainest name."""
    return min((name for name in files if _TEXTS.fullmatch(name)), key=lambda name: (len(name), name), default=None)


def recognise_licence(text: str) -> str | None:
    """The licence's identifier, as the Hub writes it where it has one; None: these are words of some other licence.

    >>> recognised("Apache License\\n  Version 2.0, January 2004")
    'apache-2.0'
    """
    opening = " ".join(re.sub(r"[*_#=]", " ", text[:_TITLE_CHARACTERS]).lower().split())
    return next((name for name, title in _TITLES if re.search(title, opening)), None)
