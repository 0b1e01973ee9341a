"""Licence files are found by their names and known by their words."""

from __future__ import annotations

import pytest

from merger.models.licence import licence_files, licence_text, recognise_licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("\n   Apache License\n   Version 2.0, January 2004\n http://www.apache.org/licenses/", "apache-2.0"),
        ("MIT License\n\nPermission is hereby granted, free of charge, to any person\nobtaining a copy", "mit"),
        ("Redistribution and use in source and binary forms, with or without 3. Neither the name of", "bsd-3-clause"),
        ("Redistribution and use in source and binary forms, with or without modification", "bsd-2-clause"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version Release Date: July 23, 2024", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("Llama 4 Community License Agreement", "llama4"),
        ("# Gemma Terms of Use\n\nLast modified", "gemma"),
        ("Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date", "qwen-research"),
        ("Tongyi Qianwen LICENSE AGREEMENT\n\nTongyi Qianwen Release Date", "qwen"),
        ("DEEPSEEK LICENSE AGREEMENT\n\nVersion 1.0, 23 October 2023", "deepseek"),
        ("# Mistral AI Research License", "mrl"),
        ("Attribution-NonCommercial-ShareAlike 4.0 International\n\n====", "cc-by-nc-sa-4.0"),
        ("Creative Commons Attribution-NonCommercial 4.0 International Public License", "cc-by-nc-4.0"),
        ("Attribution 4.0 International", "cc-by-4.0"),
        ("                    GNU GENERAL PUBLIC LICENSE\n                       Version 3, 29 June 2007", "gpl-3.0"),
        ("GNU AFFERO GENERAL PUBLIC LICENSE Version 3", "agpl-3.0"),
        ("BigCode OpenRAIL-M v1 License Agreement", "bigcode-openrail-m"),
        ("CreativeML Open RAIL-M", "creativeml-openrail-m"),
        ("All rights reserved.", None),
        ("", None),
    ],
)  # fmt: skip
def test_known_by_its_words(text: str, licence: str | None) -> None:
    """The opening of each licence names it; of other words nothing is guessed."""
    assert recognise_licence(text) == licence


def test_which_files_they_are() -> None:
    """By name, whatever the case; of several the plainest name says what the licence is."""
    files = ["LICENSE", "license.txt", "LICENSE-MODEL", "NOTICE", "Notice.txt", "USE_POLICY.md", "COPYING",
             "config.json", "a/LICENSE", "NOTICES.py", "licences/x.LICENSE", "licensed.py"]  # fmt: skip
    found = ("COPYING", "LICENSE", "LICENSE-MODEL", "NOTICE", "Notice.txt", "USE_POLICY.md", "licences/x.LICENSE",
             "license.txt")  # fmt: skip
    assert licence_files(files) == found
    assert licence_text(files) == "COPYING"
    assert licence_text(["LICENSE-MODEL", "LICENSE.md"]) == "LICENSE.md"
    assert licence_text(["NOTICE"]) is None
