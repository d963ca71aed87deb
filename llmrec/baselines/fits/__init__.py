"""Fits of baselines, whoever asks for them: shown while they go on, and the expensive ones kept between runs."""
