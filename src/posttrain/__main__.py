"""`python -m posttrain`: the command, where its script is not on the path."""

from posttrain.cli.app import main

main()
