"""The Space: Merger in the browser. A page, a queue of jobs with a worker, and an API, around the package's own `run`.

Not here: how a merge is made (merger), and the words for plans and problems (merger.cli.text, merger.cli.markdown).
"""
