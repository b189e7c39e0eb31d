"""`python -m llmdistill`, and `accelerate launch -m llmdistill`."""

from llmdistill.cli import main

if __name__ == "__main__":
    main()
