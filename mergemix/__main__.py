"""`python -m mergemix` is `mergemix`."""

from mergemix.cli import main

if __name__ == "__main__":
    main()
