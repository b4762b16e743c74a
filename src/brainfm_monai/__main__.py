"""``python -m brainfm_monai`` is the command ``brainfm-monai``."""

from brainfm_monai.cli import main

if __name__ == "__main__":
    main()
