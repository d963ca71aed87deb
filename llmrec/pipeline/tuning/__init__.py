"""What is tuned beside a run's main job, and who judges it."""
