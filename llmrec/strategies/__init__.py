"""Strategies: how a language model scores, ranks, rates or generates, given a backend and a task.

A strategy is a class, or a function that returns an object. It is called with a `llmrec.strategies.asking.Prompting`
and the keys of the recipe's ``eval`` that it accepts, and implements `llmrec.strategies.asking.Strategy`. To add one:

- a file here; a strategy with several label questions per request is a generator, run by `llmrec.strategies.rounds`,
  which also has the shortest example
- its entry in ``STRATEGIES`` of `llmrec.registry`: the families that it answers, the keys of ``eval`` that it accepts
  (a new key is a field of `llmrec.recipe.schema.EvalSection`), and whether its answer depends on the order of
  candidates; `llmrec.tasks.direct.is_strategy_supported` decides which templates of the direct family are compatible
  with it
- its number of questions in `llmrec.strategies.counting`, if it scores labels, and its row in docs/ranking-methods.md
"""
