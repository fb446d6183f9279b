"""`python -m lorary`: the same as the command `lorary`."""

from lorary.cli import main

if __name__ == "__main__":
    main()
