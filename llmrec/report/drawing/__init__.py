"""Plots as SVG: shapes on a canvas, scales, and one function a kind of plot."""
