"""Runs the paper's experiments: `python -m diffusers_tsam.evaluation generate | score | report | sweep`.

The extra `[eval]` installs it; pipelines do not import it. docs/evaluation.md has a command for every table.
"""
