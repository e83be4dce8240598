"""`python -m diffusers_tsam` is the command `tsam`."""

from .cli import main


if __name__ == "__main__":
    main()
