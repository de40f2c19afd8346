"""`python -m autodecouple` is the command line."""

from autodecouple.cli import main

main()
