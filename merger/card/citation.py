"""Papers as BibTeX. Not here: which papers there are (methods)."""

from __future__ import annotations

import re

from merger.methods.registry import Paper


def bibtex(name: str, paper: Paper) -> str:
    """The entry for the paper of the method `name`, with what is known of it: of its authors, whom it is called by.

    >>> print(bibtex("ties", Paper("Yadav et al.", 2023, "TIES-Merging", "https://arxiv.org/abs/2306.01708")))
    @misc{yadav2023ties,
      title = {TIES-Merging},
      author = {Yadav and others},
      year = {2023},
      eprint = {2306.01708},
      archivePrefix = {arXiv},
      url = {https://arxiv.org/abs/2306.01708},
    }
    """
    authors = paper.authors.replace(" et al.", " and others").replace(" & ", " and ")
    surname = re.sub(r"[^a-z]", "", paper.authors.lower().split()[0])
    arxiv = re.fullmatch(r"https://arxiv\.org/abs/([\d.]+)", paper.url)
    fields = {"title": paper.title, "author": authors, "year": paper.year}
    if arxiv:
        fields |= {"eprint": arxiv[1], "archivePrefix": "arXiv"}
    lines = [f"  {key} = {{{value}}}," for key, value in {**fields, "url": paper.url}.items()]
    return "\n".join([f"@misc{{{surname}{paper.year}{name},", *lines, "}"])
