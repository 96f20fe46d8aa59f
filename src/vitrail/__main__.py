"""`python -m vitrail`, where the console script is not on the path."""

from vitrail.cli import main

if __name__ == "__main__":
    main()
