"""Constants used by both command options and recipes; separate from `schema`, which would slow down `--help`."""

from __future__ import annotations

from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPE: Dtype = "auto"
BEAMS = 20
EXACT = False
BATCH = 64
CUTOFFS = (1, 5, 10)
RESAMPLES = 2000
Form = Literal["records", "long", "trec", "recbole", "rectools"]
"""The file format of ranked lists: one record per request; or one row per ranked item, also as a TREC run, as RecBole's
``.inter`` or with the columns of RecTools."""
