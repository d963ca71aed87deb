"""Gives malformed inputs to everything that reads what a user names, and counts how each call ends.

``make bench NAME=campaign`` makes the inputs of `surfaces`, by a seed, and hands each to a worker: a process that calls
what a user would call (`calls`). An input is answered, where it does no harm, or refused with an `LlmrecError`; any
other error, a call that takes more than `watch.SECONDS` of processor time, and a process that dies are defects. So is a
refusal that names no file, row, line, column or key. ``--against FOLDER`` asks another checkout of llmrec the same.
"""
