"""`python -m limiter`: the same as the command `limiter`."""

from limiter.cli import main

main()
