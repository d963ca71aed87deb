"""Strategies: a backend and a task make a predictor.

A strategy is a class, or a function that returns an object. It is called with a `llmrec.strategies.asking.Prompting`
and the keys of the recipe's ``eval`` that it takes, and answers as `llmrec.strategies.asking.Strategy` says. To add
one:

- a file here; one that asks several label questions a request is a generator that `llmrec.strategies.rounds` plays,
  and `llmrec.strategies.windows` is the shortest example
- its entry in ``STRATEGIES`` of `llmrec.registry`; in ``STRATEGY_KEYS`` if it takes keys of ``eval``, with a new key in
  `llmrec.recipe.schema.EvalSection`; in ``POSITIONAL`` if its answer depends on where a candidate stands
- its name in the ``strategies`` of each `llmrec.tasks.family.Family` that it answers; which templates of the direct
  family it reads is decided in `llmrec.tasks.direct.fits`
- its number of questions in `llmrec.strategies.counting`, if it scores labels, and its row in docs/strategies.md
"""
