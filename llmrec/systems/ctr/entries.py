"""The registry entries of the CTR networks."""

from llmrec.entries import BaselineEntry

BASELINES = {
    "din": BaselineEntry("llmrec.systems.ctr.networks:DIN", ("ctr",), needs="torch"),
    "deepfm": BaselineEntry("llmrec.systems.ctr.networks:DeepFM", ("ctr",), needs="torch"),
    "dcn": BaselineEntry("llmrec.systems.ctr.networks:DCN", ("ctr",), needs="torch"),
    "autoint": BaselineEntry("llmrec.systems.ctr.networks:AutoInt", ("ctr",), needs="torch"),
}
