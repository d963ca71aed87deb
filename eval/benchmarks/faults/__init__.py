"""Fault injection for five commands: kills, full disks, damaged files, links, second processes, read-only folders.

``make bench NAME=faults`` tests ``run``, ``eval`` of a suite, ``export``, ``rank`` and ``augment`` with a small model
and table. It records how the call ended; then the command is run again, and its metrics, answers, lists, weights and
stores are compared with those of an undisturbed process. `zygote` forks the processes, `works` defines the commands and
the outputs to compare, `stops`, `damage` and `places` define the cases.
"""
