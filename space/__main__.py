"""`python -m space`; in the Space itself this file is app.py. Not here: anything else."""

from merger.safety.environment import hand_over

if __name__ == "__main__":
    hand_over()  # before anything that takes time: until then /proc shows the Space's secrets

from space.app import main

if __name__ == "__main__":
    main()
