"""Strategies: a backend and a task make a predictor.

A strategy is a class, or a function that returns an object. It is called with a `llmrec.strategies.asking.Prompting`
and the keys of the recipe's ``eval`` that it takes, and answers as `llmrec.strategies.asking.Strategy` says. To add
one: a file here, its entry in ``STRATEGIES`` of `llmrec.registry` (and in ``STRATEGY_KEYS`` if it takes keys, in
``POSITIONAL`` if its answer depends on where a candidate stands), and its name in the ``strategies`` of each
`llmrec.tasks.family.Family` that it answers.
"""
