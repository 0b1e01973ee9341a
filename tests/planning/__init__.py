"""Tests of the plan: what will be made, before any tensor is read."""
