"""The line, wired: check, plan, merge."""
