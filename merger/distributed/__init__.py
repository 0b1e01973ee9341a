"""Shares of a plan, made by several processes or machines."""
