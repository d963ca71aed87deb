"""The command line as ``python -m llmrec``."""

from llmrec.cli.main import main

if __name__ == "__main__":
    main()
