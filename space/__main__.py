"""`python -m space`; in the Space itself this file is app.py. Not here: anything else."""

from space.app import main

if __name__ == "__main__":
    main()
