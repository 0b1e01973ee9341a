"""The Action: a job on GitHub checks, plans, searches or makes the recipes that its event is about."""
