"""Supervised fine-tuning: rows to optimiser steps, with adapters, of all weights, or of a rating head alone."""
