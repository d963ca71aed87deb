"""Strategies: a backend and a task make a predictor.

A strategy is a class, or a function that returns an object. It is called with a `llmrec.strategies.asking.Prompting`
and the keys of the recipe's ``eval`` that it takes, and answers as `llmrec.strategies.asking.Strategy` says. To add
one:

- a file here; one that asks several label questions a request is a generator that `llmrec.strategies.rounds` plays,
  and `llmrec.strategies.rounds` is the shortest example
- its entry in ``STRATEGIES`` of `llmrec.registry`: the families that it answers, the keys of ``eval`` that it takes (a
  new key is a field of `llmrec.recipe.schema.EvalSection`), and whether its answer depends on where a candidate is;
  which templates of the direct family it reads is decided in `llmrec.tasks.direct.fits`
- its number of questions in `llmrec.strategies.counting`, if it scores labels, and its row in docs/strategies.md
"""
