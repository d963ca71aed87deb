"""Reads files of any format as typed columns."""
