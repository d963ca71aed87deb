"""The recommendation tasks, such as rating prediction and sequential recommendation."""
