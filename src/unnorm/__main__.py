"""`python -m unnorm`, so that `torchrun -m unnorm` works."""

from unnorm.cli import main

if __name__ == "__main__":
    main()
