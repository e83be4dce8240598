"""The paper's experiments as a tool: `python -m diffusers_tsam.evaluation generate | score | report | sweep`.

Installed with the extra `[eval]`; the pipelines know nothing of it. docs/evaluation.md has a command for every table.
"""
