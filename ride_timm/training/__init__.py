"""Train both stages: recipe, preflight, stages, state, run folder."""
