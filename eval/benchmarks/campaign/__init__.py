"""Fuzzes every reader of user input with malformed files, and counts the outcomes.

``make bench NAME=campaign`` generates the inputs of `surfaces` from a seed, and gives each to a worker: a process that
calls the function that a user would call (`calls`). A harmless input may be accepted; others must be rejected with an
`LlmrecError`. Any other error, a call of more than `watch.SECONDS` of processor time, a process that dies, and an error
message without a file, row, line, column or key are defects.
"""
