"""Kills, full disks, damaged files, links, second processes and read-only folders, done to five commands.

``make bench NAME=faults`` does each to ``run``, ``eval`` of a suite, ``export``, ``rank`` and ``augment`` of a small
model and table. What is looked at is how the call ended; then the command is given again, and its figures, answers,
lists, weights and stores are compared with those of a process that nothing disturbed. `zygote` forks the processes,
`works` says what the commands are and what must be equal, `stops`, `damage` and `places` make the cases.
"""
