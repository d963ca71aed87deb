"""The command line as ``python -m llmrec``."""

from llmrec.cli import main

if __name__ == "__main__":
    main()
