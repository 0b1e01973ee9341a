"""What of a stranger's may be read, shown and published: paths, limits, texts, and the tokens that must never leave.

Not here: whose recipe it is (each shell knows that), and what files mean (checkpoints).
"""
